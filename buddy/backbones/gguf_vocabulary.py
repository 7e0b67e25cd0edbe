"""A tokenizer as the tables of a GGUF file, from which llama.cpp cuts text into the same tokens.

Two kinds are known: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM), and SentencePiece's BPE with bytes to fall back on
(Llama 1 and 2). GGUF names how text is cut before merges instead of saying it, so a tokenizer that cuts in a way that has
no name there is refused; a wrong name would give other tokens and no error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from buddy.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's types of tokens."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    ("digits", "gpt-2"): "smollm",
    ("gpt-2",): "gpt-2",
    (f"{_LETTERS}{{1,3}}{_REST}", "bytes"): "llama-bpe",
    (f"{_LETTERS}{_REST}", "bytes"): "qwen2",
}
"""How text is cut before merges, step by step, and GGUF's name for that."""
_WHOLE_WORDS = {"llama-bpe"}
"""The names under which a word that is a token as a whole is not merged from its parts."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: GGUF's name of how text is cut before merges.
        tokens: V texts, and ``types``: V of GGUF's types.
        merges: pairs, the first goes first; of "gpt2".
        scores: V numbers, the higher goes first; of "llama".
        special: ids by GGUF's names for them (bos, eos, unknown, padding).
        bos, eos: whether a text begins or ends with that token.
        space: whether a text that begins with a word is given a space before it; of "llama".
        chat_template: Jinja; "" without.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    bos: bool
    eos: bool
    space: bool
    chat_template: str


def of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The tables of a tokenizer.

    Args:
        tokenizer: one of the tokenizers library.
        size: V, the rows of the model's embedding; rows without a token are named so.

    Raises:
        UserError: it is of another kind, or the model lacks some of its tokens.
    """
    if not tokenizer.is_fast:
        raise _refused("is not one of the tokenizers library")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(f"is {model['type']}, not BPE")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if not merges:
        raise _refused("has no merges, without which llama.cpp loads none")
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(content, pieces, size)
    bos, eos = _ends(tokenizer)
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{kind}_token_id") for kind, name in kinds.items()}
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre(content),
        tokens=tokens,
        types=types,
        merges=[] if pieces else merges,
        scores=_scores(merges, tokens) if pieces else [],
        special={name: token for name, token in ids.items() if token is not None},
        bos=bos,
        eos=eos,
        space=pieces and _space(content),
        chat_template=_template(tokenizer),
    )


def _refused(reason: str) -> UserError:
    return UserError(f"--gguf: the tokenizer {reason}; the Hugging Face folder can be exported without --gguf")


def _tokens(content: dict[str, Any], pieces: bool, size: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    model = content["model"]
    tokens = [f"[PAD{row}]" for row in range(size)]
    types = [UNUSED] * size
    added = {token["id"]: token for token in content["added_tokens"]}
    highest = max([*model["vocab"].values(), *added])
    if highest >= size:
        raise _refused(f"has a token {highest}, the model an embedding of {size}")
    for text, row in model["vocab"].items():
        tokens[row] = text
        types[row] = NORMAL
        if pieces and len(text) == 6 and text.startswith("<0x"):
            types[row] = BYTE
    for row, token in added.items():
        tokens[row] = token["content"]
        types[row] = CONTROL if token["special"] else USER_DEFINED
        if pieces and token["content"] == model.get("unk_token"):
            types[row] = UNKNOWN
    return tokens, types


def _scores(merges: Sequence[str], tokens: Sequence[str]) -> list[float]:
    """What SentencePiece goes by: of two tokens that could be merged the one with the higher score. Theirs is the order of
    merges, so the first merge that makes a token gives its score."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), rank)
    return [-float(first.get(token, 0)) for token in tokens]


def _pre(content: dict[str, Any]) -> str:
    """GGUF's name for how a byte-level tokenizer cuts text before merges."""
    normal = content.get("normalizer")
    if normal and normal != {"type": "NFC"}:  # llama.cpp has none; published Qwen files go without theirs
        raise _refused(f"changes text before it is cut ({normal['type']}), which llama.cpp does not")
    cut = content.get("pre_tokenizer") or {}
    steps = tuple(_step(step) for step in cut.get("pretokenizers", [cut]))
    name = CUTS.get(steps)
    if name is None or bool(content["model"].get("ignore_merges")) != (name in _WHOLE_WORDS):
        raise _refused(f"cuts text in a way that GGUF has no name for here ({', '.join(map(str, steps))})")
    return name


def _step(step: dict[str, Any]) -> str:
    kind = step.get("type")
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt-2" if step["use_regex"] else "bytes"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether texts begin with the token that begins them, and end with the one that ends them."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for bos in (False, True):
        for eos in (False, True):
            if whole == [*[tokenizer.bos_token_id] * bos, *bare, *[tokenizer.eos_token_id] * eos]:
                return bos, eos
    raise _refused("puts more around a text than tokens that begin and end it")


def _space(content: dict[str, Any]) -> bool:
    """Whether SentencePiece puts a space before a text."""
    normal = content.get("normalizer") or {}
    steps = normal.get("normalizers", [normal])
    cut = content.get("pre_tokenizer") or {}
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    return cut.get("type") == "Metaspace" and cut["prepend_scheme"] != "never"


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    found = tokenizer.chat_template
    return found.get("default", "") if isinstance(found, dict) else found or ""
