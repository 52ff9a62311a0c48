"""Structured output: which tokens may come next where a request's output must conform to a grammar.

llguidance does the parsing. It compiles lazily, so that no schema or pattern that a client sends can hold the engine
up for long, and it refuses what it can't honour (docs/decisions.md has the figures).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from pagedserve_engine.errors import InvalidParameterError, StepFailedError
from pagedserve_engine.request import GrammarSpec

if TYPE_CHECKING:
    # At run time it is read with the first grammar: most engines never see one.
    import llguidance

MAX_SOURCE_BYTES = 256 << 10
"""Largest schema or pattern; at this size the slowest that we found compiles in a few seconds."""

MAX_CACHED_GRAMMARS = 128

_JSON_DEFAULTS: Any = {"whitespace_pattern": r"\n?[ \t]{0,40}"}
"""One line break and its indentation: with any white space allowed, a model may write nothing else for ever."""

_Bitmask = npt.NDArray[np.int32]


class GrammarMatcher:
    """Follows one output token by token; belongs to one sequence."""

    def __init__(self, parser: llguidance.LLMatcher, eos_mask: _Bitmask) -> None:
        self._parser = parser
        self._eos_mask = eos_mask

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and only the end of the output may follow."""
        return self._parser.is_stopped() and not self._parser.is_error()

    def fill(self, bitmask_row: _Bitmask) -> None:
        """Write the tokens that may come next into ``bitmask_row``, int32 [ceil(vocab / 32)], the lowest bit first.

        Raises StepFailedError where the parser ran out of its limits.
        """
        assert bitmask_row.flags.c_contiguous
        assert bitmask_row.shape == self._eos_mask.shape
        if self.finished:
            bitmask_row[:] = self._eos_mask
            return
        self._parser.unsafe_compute_mask_ptr(bitmask_row.ctypes.data, bitmask_row.nbytes)
        self._check()

    def advance(self, token_id: int) -> None:
        """Take ``token_id`` as the next token. Raises StepFailedError where the grammar doesn't allow it."""
        if self.finished:
            # An end that the scheduler ignores (min_tokens, ignore_eos) may come more than once.
            if not (int(self._eos_mask[token_id >> 5]) >> (token_id & 31)) & 1:
                raise StepFailedError(f"the output went on with token {token_id} after its grammar was complete")
            return
        if not self._parser.consume_token(token_id):
            self._check()
            raise StepFailedError(f"the grammar does not allow token {token_id} here")

    def _check(self) -> None:
        if self._parser.is_error():
            reason = _one_line(self._parser.get_error())
            raise StepFailedError(f"the output can't follow its grammar any further: {reason}")


class CompiledGrammar:
    """A grammar ready for use by any number of sequences and threads."""

    def __init__(self, parser: llguidance.LLMatcher, eos_mask: _Bitmask) -> None:
        self._parser = parser
        self._eos_mask = eos_mask
        self._lock = threading.Lock()

    def matcher(self) -> GrammarMatcher:
        """A matcher at the start of the output."""
        with self._lock:
            return GrammarMatcher(self._parser.deep_copy(), self._eos_mask)


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the last ``max_cached`` of them; safe to share between threads.

    ``vocab_size`` is the logits' and may exceed the tokenizer's. The first use takes a second to read the vocabulary.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        max_cached: int = MAX_CACHED_GRAMMARS,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._max_cached = max_cached
        self._lock = threading.Lock()
        self._cache: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._eos_mask = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        for token_id in self._eos_token_ids:
            self._eos_mask.view(np.uint32)[token_id >> 5] |= np.uint32(1 << (token_id & 31))

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """The grammar of ``spec``, from the cache where it is known.

        Raises InvalidParameterError, which names the client's field, where it is malformed, too large or not supported.
        """
        with self._lock:
            known = self._cache.get(spec)
            if known is not None:
                self._cache.move_to_end(spec)
                return known
        # Outside the lock: one slow grammar holds nobody else up. Compiling twice does no harm.
        compiled = self._compile(spec, spec.param)
        with self._lock:
            self._cache[spec] = compiled
            while len(self._cache) > self._max_cached:
                self._cache.popitem(last=False)
        return compiled

    def _compile(self, spec: GrammarSpec, param: str) -> CompiledGrammar:
        if len(spec.source.encode()) > MAX_SOURCE_BYTES:
            raise InvalidParameterError(
                f"the grammar of {param} is larger than {MAX_SOURCE_BYTES} bytes: send a smaller one", param=param
            )
        import llguidance

        vocabulary = self._read_vocabulary(param)
        try:
            grammar = _grammar_text(spec, param)
        except ValueError as error:
            reason = _one_line(str(error))
            raise InvalidParameterError(f"{param} holds no valid grammar: {reason}", param=param) from error
        limits = llguidance.LLParserLimits(verbose_errors=False)
        parser = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if parser.is_error():
            reason = _one_line(parser.get_error())
            raise InvalidParameterError(f"{param} holds a grammar that can't be used: {reason}", param=param)
        return CompiledGrammar(parser, self._eos_mask)

    def _read_vocabulary(self, param: str) -> llguidance.LLTokenizer:
        from llguidance import hf

        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = hf.from_tokenizer(
                        self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                    )
                except ValueError as error:
                    raise InvalidParameterError(
                        f"leave out {param}: this model's tokenizer has no structured output ({error})", param=param
                    ) from error
            return self._vocabulary


def _grammar_text(spec: GrammarSpec, param: str) -> str:
    import llguidance

    match spec.kind:
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON_DEFAULTS)
        case "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(spec.source, defaults=_JSON_DEFAULTS)
        case "regex":
            # As in JSON schemas, \d and \w are ASCII: nobody who writes \d{4} wants Devanagari digits.
            pattern = llguidance.regex_to_lark(spec.source, use_ascii="dw")
            return llguidance.LLMatcher.grammar_from_lark(f"start: /{pattern}/")
    raise InvalidParameterError(f"{param} asks for {spec.kind!r}: use json_object, json_schema or regex", param=param)


def _one_line(text: str) -> str:
    """The library's reason, which may span lines, on one; the rest of a long one is left out."""
    return " ".join(text.split())[:300]
