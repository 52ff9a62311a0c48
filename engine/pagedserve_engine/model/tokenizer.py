"""Text to token ids and back, chat templates included.

Everything here may be called from several threads at once: encoding and decoding go to the Rust backend, whose settings
are fixed once at load.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import ConfigError, InvalidParameterError, ModelLoadError, NoChatTemplateError
from pagedserve_engine.model.chat import TemplateTraits, prepare_messages
from pagedserve_engine.model.detokenizer import Detokenizer, Vocabulary
from pagedserve_engine.model.spec import token_ids

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_OWN_KEYWORDS = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) - {
    "documents",
    "kwargs",
}
"""What transformers takes for itself; everything else reaches the template."""


class Tokenizer:
    """A model's tokenizer; made by ``load``."""

    def __init__(self, fast: PreTrainedTokenizerFast, *, eos_token_ids: Sequence[int] = ()) -> None:
        self.transformers_tokenizer = fast
        """For libraries that build on transformers' own object; treat it as read-only."""
        self.eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, *token_ids(fast.eos_token_id))))
        """Tokens that end an output: the model's own, then the tokenizer's."""
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocabulary = Vocabulary(self._backend)
        self._traits = TemplateTraits(_template_source(fast.chat_template))

    @classmethod
    def load(cls, folder: Path, config: EngineConfig, *, model_eos: Sequence[int] = ()) -> Self | None:
        """The tokenizer in ``folder``, None where there is none; CHAT_TEMPLATE replaces its template.

        Raises ModelLoadError where it can't be read, ConfigError for the template's file.
        """
        if not any((folder / name).is_file() for name in _FILES):
            return None
        try:
            fast: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=config.trust_remote_code
            )
        except Exception as error:  # the libraries below raise every kind, plain Exception included
            raise ModelLoadError(f"{folder}: the tokenizer can't be read: {error}", param="model") from error
        if not getattr(fast, "is_fast", False):
            raise ModelLoadError(f"{folder}: a tokenizer.json is needed; this tokenizer has none", param="model")
        if config.chat_template is not None:
            fast.chat_template = _read_template(config.chat_template)
        return cls(fast, eos_token_ids=model_eos)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a spelling; the model's logits may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.transformers_tokenizer.chat_template)

    @property
    def supports_tools(self) -> bool:
        """Whether the chat template looks at tools."""
        return self._traits.supports_tools

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with what the model expects around a text unless told otherwise."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``, spaces as they are."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """Text of one output, token by token, as a continuation of ``prompt_ids``."""
        return self._vocabulary.detokenizer(skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for: part of a character, maybe; nothing for an unknown id."""
        return self._vocabulary.piece(token_id)[0]

    def token_text(self, token_id: int) -> str:
        """The token as text; bytes that are no whole character show as replacement characters."""
        return self.token_bytes(token_id).decode(errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; the template writes all special tokens itself, so none are added.

        Raises NoChatTemplateError, or InvalidParameterError for what the template refuses.
        """
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text that the model sees; errors as ``apply_chat_template``."""
        if not self.transformers_tokenizer.chat_template:
            raise NoChatTemplateError(
                "this model has no chat template: use /v1/completions, or start the server with CHAT_TEMPLATE set to a "
                "Jinja file",
                param="messages",
            )
        clash = sorted(_OWN_KEYWORDS.intersection(template_kwargs or ()))
        if clash:
            message = f"chat_template_kwargs can't set {clash[0]}: leave it out"
            raise InvalidParameterError(message, param="chat_template_kwargs")
        prepared = prepare_messages(messages, self._traits)
        template: Any = self.transformers_tokenizer
        try:
            text = template.apply_chat_template(
                prepared,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_kwargs or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            message = f"the chat template refuses these messages: {error}"
            raise InvalidParameterError(message, param="messages") from error
        assert isinstance(text, str)
        return text


def _template_source(template: str | Mapping[str, str] | None) -> str:
    """All of a model's templates as one text, to look for what they know."""
    if isinstance(template, Mapping):
        return "\n".join(template.values())
    return template or ""


def _read_template(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"CHAT_TEMPLATE is {str(path)!r}, which can't be read: {error}", param="chat_template"
        ) from error
