"""Text from tokens, with a detokenizer whose tokens are characters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_engine.request import FinishReason, GenerationOutput, TokenLogprob
from pagedserve_engine.text import StopFinder, TextAssembler, TextOutput


class Characters:
    """Each token is a character; an "é" needs the token after it, as half a character does."""

    def __init__(self) -> None:
        self._half = ""

    def push(self, token_ids: Sequence[int]) -> str:
        text = self._half + "".join(map(chr, token_ids))
        self._half = "é" if text.endswith("é") else ""
        return text.removesuffix("é")

    def flush(self) -> str:
        half, self._half = self._half, ""
        return half


def assemble(text: str, *, last: FinishReason = FinishReason.LENGTH, **options: object) -> list[TextOutput]:
    assembler = TextAssembler(Characters(), **options)  # type: ignore[arg-type]
    outputs: list[TextOutput] = []
    for at, character in enumerate(text):
        end = at == len(text) - 1
        news = GenerationOutput("r", [ord(character)], finish_reason=last if end else None)
        news.stop_token_id = ord(character) if end and last is FinishReason.STOP else None
        outputs.append(assembler.push(news))
        if outputs[-1].finish_reason is not None:
            break
    return outputs


def joined(outputs: list[TextOutput]) -> str:
    return "".join(output.text for output in outputs)


def test_text_passes_at_once_where_no_stop_string_is_asked_for() -> None:
    assert [output.text for output in assemble("abc")] == ["a", "b", "c"]


def test_half_a_character_waits_for_the_rest_and_is_not_lost_at_the_end() -> None:
    assert [output.text for output in assemble("aéb")] == ["a", "", "éb"]
    assert joined(assemble("aé")) == "aé"


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    outputs = assemble("one STOP two", stop=("STOP",))
    assert joined(outputs) == "one "
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "STOP")
    assert sum(len(output.token_ids) for output in outputs) == len("one STOP")


def test_a_stop_string_is_kept_where_it_is_asked_for() -> None:
    assert joined(assemble("one STOP two", stop=("STOP",), include_stop=True)) == "one STOP"


def test_what_only_looked_like_a_stop_string_is_sent_after_all() -> None:
    assert joined(assemble("a STO b ST", stop=("STOP",))) == "a STO b ST"


def test_the_earliest_of_several_stop_strings_wins_and_the_longer_one_at_the_same_place() -> None:
    finder = StopFinder(("b", "bc", "x"), include_stop=False)
    assert finder.push("abcx", armed=True) == "a"
    assert finder.found == "bc"


def test_stop_strings_count_only_after_min_tokens() -> None:
    assert joined(assemble("abab", stop=("b",), min_tokens=3)) == "aba"


def test_the_token_that_ends_a_request_is_no_text_but_where_it_was_asked_for() -> None:
    outputs = assemble("ab$", last=FinishReason.STOP, stop_token_ids=(ord("$"),))
    assert joined(outputs) == "ab"
    assert outputs[-1].stop_reason == ord("$")
    assert joined(assemble("ab$", last=FinishReason.STOP, include_stop=True)) == "ab$"


def test_an_end_token_of_the_model_is_no_reason_to_report() -> None:
    assert assemble("ab$", last=FinishReason.STOP)[-1].stop_reason is None


def test_log_probabilities_stay_with_their_tokens_when_a_stop_string_cuts() -> None:
    assembler = TextAssembler(Characters(), stop=("b",))
    news = GenerationOutput("r", [97, 98, 99], logprobs=[TokenLogprob(t, -1.0, 1) for t in (97, 98, 99)])
    output = assembler.push(news)
    assert [entry.token_id for entry in output.logprobs or ()] == output.token_ids == [97, 98]


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_where_the_first_complete_stop_string_begins(text: str, stops: list[str]) -> None:
    """The first to be complete, then the earliest and longest of those that end at the same place."""
    outputs = assemble(text, stop=tuple(stops)) if text else []
    ends = [at for at in range(1, len(text) + 1) if any(text[:at].endswith(stop) for stop in stops)]
    if not ends:
        assert joined(outputs) == text
        return
    found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert joined(outputs) == text[: ends[0] - len(found)]
    assert outputs[-1].stop_reason == found


@pytest.mark.parametrize("pending", [("a", "b"), ("", "b"), ("a", "")])
def test_what_a_slow_reader_missed_comes_as_one_output(pending: tuple[str, str]) -> None:
    first = TextOutput(pending[0], [1], num_cached_tokens=4)
    first.extend(TextOutput(pending[1], [2], finish_reason=FinishReason.LENGTH))
    assert (first.text, first.token_ids, first.finish_reason) == ("".join(pending), [1, 2], FinishReason.LENGTH)
    assert first.num_cached_tokens == 4
