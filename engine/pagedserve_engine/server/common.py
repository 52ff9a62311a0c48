"""What the bodies of completions and chat completions have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.request import GrammarSpec, SamplingParams
from pagedserve_engine.server.prompts import check_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What completions and chat completions share."""

    model: str | None
    params: SamplingParams
    n: int
    best_of: int
    """Sequences generated for each prompt, at least n."""
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    salt: bytes
    stream: bool
    include_usage: bool
    return_token_ids: bool


def read_sampling(
    values: dict[str, Any],
    vocab_size: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: GrammarSpec | None,
) -> SamplingParams:
    """The sampling parameters of a checked body; the arguments are what the two kinds of body name differently.

    Raises InvalidParameterError.
    """
    min_tokens, top_p = values["min_tokens"], values["top_p"]
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidParameterError(
            f"min_tokens is {min_tokens}: give at most the tokens to generate, {max_tokens}", param="min_tokens"
        )
    stop_token_ids = values["stop_token_ids"] or []
    check_vocabulary(stop_token_ids, vocab_size, "stop_token_ids")
    bias = values["logit_bias"] or {}
    if bias and max(bias) >= vocab_size:
        raise InvalidParameterError(
            f"logit_bias has token id {max(bias)}: the model has the token ids 0 to {vocab_size - 1}",
            param="logit_bias",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=values["temperature"],
        # No probability at all leaves the likeliest token, as top_k 1 does.
        top_p=top_p or 1.0,
        top_k=max(0, values["top_k"]) if top_p else 1,
        min_p=values["min_p"],
        repetition_penalty=values["repetition_penalty"],
        frequency_penalty=values["frequency_penalty"],
        presence_penalty=values["presence_penalty"],
        logit_bias=bias,
        seed=None if values["seed"] is None else values["seed"] % 2**64,
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=values["ignore_eos"],
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def read_generation(values: dict[str, Any], params: SamplingParams, *, best_of: int) -> Generation:
    """What a checked body says beside its sampling parameters. Raises InvalidParameterError."""
    if values["stream"] and values["prompt_logprobs"] is not None:
        raise InvalidParameterError("prompt_logprobs can't be streamed: set stream to false", param="prompt_logprobs")
    if values["stream_options"] is not None and not values["stream"]:
        raise InvalidParameterError("stream_options needs stream: set stream to true", param="stream_options")
    stop = values["stop"] or ()
    return Generation(
        model=values["model"],
        params=params,
        n=values["n"],
        best_of=best_of,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        include_stop=values["include_stop_str_in_output"],
        skip_special_tokens=values["skip_special_tokens"],
        salt=(values["cache_salt"] or "").encode(),
        stream=values["stream"],
        include_usage=bool(values["stream_options"] and values["stream_options"]["include_usage"]),
        return_token_ids=values["return_token_ids"],
    )
