"""The sections of docs/conditions.md, from the words in reasons.py and from what the operator itself says of errors."""

from __future__ import annotations

from reasons import CONDITIONS, EVENTS, GROUPS, Group
from tables import code, table
from written_reasons import retry_seconds


def conditions_sections() -> str:
    """Conditions, groups of reasons, events."""
    return "\n\n".join([_conditions(), *map(_group, GROUPS), _events()])


def _conditions() -> str:
    rows = [(code(kind), *meanings) for kind, meanings in CONDITIONS.items()]
    text = (
        "`ScalingActive` is there only where `spec.autoscaling` is, or where somebody else's autoscaler fights with\n"
        "`spec.replicas`."
    )
    return f"## Conditions\n\n{table(('condition', 'True', 'False', 'Unknown'), rows)}\n\n{text}"


def _group(group: Group) -> str:
    cured = any(len(words) > 1 for words in group.reasons.values())
    again = retry_seconds()
    timed = cured and any(again.get(reason) for reason in group.reasons)
    head = ["reason", "meaning", *(["what to do"] if cured else []), *(["looked at again"] if timed else [])]
    rows = []
    for reason, words in group.reasons.items():
        row = [code(reason), words[0]]
        row += [words[1] if len(words) > 1 else ""] if cured else []
        row += [_time(again.get(reason))] if timed else []
        rows.append(row)
    return f"## {group.title}\n\n{group.where}\n\n{table(head, rows)}"


def _time(seconds: float | None) -> str:
    return f"after {seconds:g} s" if seconds else "after a change"


def _events() -> str:
    rows = [(code(reason), kind, meaning) for reason, (kind, meaning) in EVENTS.items()]
    text = (
        "Events tell transitions, each once. Beside these, a reason that makes `Degraded` true or `ScalingActive`\n"
        "false is a Warning of that name, and a change of `Ready` is an event with its reason."
    )
    return f"## Events\n\n{text}\n\n{table(('event', 'type', 'meaning'), rows)}"
