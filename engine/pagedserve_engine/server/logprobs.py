"""Log probabilities in OpenAI's two shapes and vLLM's one for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pagedserve_engine.request import TokenLogprob

if TYPE_CHECKING:
    from pagedserve_engine.model.tokenizer import Tokenizer

LOWEST = -9999.0
"""JSON has no infinity; OpenAI writes this for what is impossible."""


class LogprobRenderer:
    """Renders with at most ``top`` alternatives at each position."""

    def __init__(self, tokenizer: Tokenizer | None, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top

    def completion(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None], offset: int
    ) -> dict[str, Any]:
        """Lists by position; ``offset`` is the first token's in the whole text (characters)."""
        names = [self.text(token) for token in token_ids]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += 0 if name.startswith("bytes:") else len(name)
        return {
            "tokens": names,
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._alternatives(entry) for entry in entries],
            "text_offset": offsets,
        }

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """One object for each token."""
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in entry.top[: self._top]],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def prompt(self, entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """By token id, as vLLM renders prompts; the first position has none."""
        return [None if entry is None else self._ranked(entry) for entry in entries]

    def text(self, token: int) -> str:
        """A token's text; tokens that are no characters of their own as OpenAI spells bytes."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        text = self._tokenizer.token_text(token)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token))

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        chosen = [(entry.token_id, entry.logprob)]
        return {self.text(token): _finite(logprob) for token, logprob in [*entry.top[: self._top], *chosen]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self._tokenizer.token_bytes(token)) if self._tokenizer else None
        return {"token": self.text(token), "logprob": _finite(logprob), "bytes": spelled}

    def _ranked(self, entry: TokenLogprob) -> dict[str, dict[str, Any]]:
        ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[: self._top], 1)]
        return {
            str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.text(token)}
            for token, logprob, rank in [*ranked, (entry.token_id, entry.logprob, entry.rank)]
        }


def _finite(logprob: float) -> float:
    # A NaN compares false with everything, hence the order.
    return logprob if logprob >= LOWEST else LOWEST
