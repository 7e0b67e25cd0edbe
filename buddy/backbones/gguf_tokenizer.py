"""The tokenizer inside a GGUF file, rebuilt from its own tables.

transformers can read it too, but how well depends on its version: 5.17 gives SmolLM2 the wrong end-of-text token, none
for padding, and a decoder that drops leading spaces. The tables leave no room for that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.errors import UserError, choices

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_CONTROL = 3
"""GGUF's type of a token that is a mark, not text."""

PRE_TOKENIZERS = ("default", "gpt-2", "smollm")
"""How text is cut before merges, by the name that GGUF has for it."""


def read(path: Path, origin: str) -> PreTrainedTokenizerBase:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Args:
        path: the GGUF file.
        origin: where it came from, for the message.

    Raises:
        UserError: the file's tokenizer is of another kind.
    """
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields

    def value(key: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return default if field is None else field.contents()

    model, pre = value("ggml.model"), value("ggml.pre", "default")
    if model != "gpt2" or pre not in PRE_TOKENIZERS or value("ggml.add_bos_token", False):
        raise UserError(
            f"{origin}: tokenizer {model!r} ({pre}) is not supported in GGUF files; supported is 'gpt2' "
            f"({choices(PRE_TOKENIZERS)}) without a leading token; take the model from the Hub instead"
        )
    tokens, types, merges = value("ggml.tokens"), value("ggml.token_type", []), value("ggml.merges", [])
    ids = {kind: value(f"ggml.{kind}_token_id") for kind in ("bos", "eos", "unknown", "padding")}
    special = {name: None if ids[kind] is None else tokens[ids[kind]] for name, kind in _SPECIAL.items()}
    special["pad_token"] = special["pad_token"] or special["eos_token"]
    marks = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    # A single merge is read as one string, not as a list of one.
    tokenizer = _bpe(tokens, [merges] if isinstance(merges, str) else merges, marks, pre)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=value("chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )


def _bpe(tokens: list[str], merges: list[str], marks: list[str], pre: str) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    # SmolLM cuts numbers into digits; after that, both cut as GPT-2 does.
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer
