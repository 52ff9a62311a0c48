"""What a model says, by transformers alone: the text, scores and tokens that a server of it must answer with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from models import load_reference, reference_generate, reference_logits

Row = npt.NDArray[np.float64]


class Oracle:
    """A model in float32 and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.model = load_reference(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def chat_ids(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation that waits for its answer."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of an output."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def greedy(self, prompt_ids: Sequence[int], n: int, *, ignore_eos: bool = False) -> list[int]:
        """At most ``n`` greedy tokens."""
        return reference_generate(self.model, prompt_ids, n, ignore_eos=ignore_eos)

    def greedy_with(self, prompt_ids: Sequence[int], n: int, adjust: Callable[[Row, Sequence[int]], Row]) -> list[int]:
        """``n`` tokens, each the likeliest after ``adjust(scores, output so far)``."""
        output: list[int] = []
        for _ in range(n):
            scores = reference_logits(self.model, [*prompt_ids, *output])[-1].double().numpy()
            output.append(int(adjust(scores, output).argmax()))
        return output

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary] log probabilities of what follows each token."""
        return reference_logits(self.model, ids).log_softmax(-1)
