"""A tokenizer of bytes and a few longer tokens, made in a millisecond: enough for grammars."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, END_OF_TURN = 0, 1
_MERGED = ["th", "the", "tr", "tru", "true", 'Ġ"', '":', '",', '{"', '"}', "12", "Ġ1", "ab", "abc"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """End of text 0, end of turn 1, the 256 bytes, then tokens of several."""
    pieces = ["<eos>", "<turn>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *_MERGED]
    merges = [(token[:-1], token[-1]) for token in _MERGED]
    core = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<turn>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
