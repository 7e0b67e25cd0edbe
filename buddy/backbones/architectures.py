"""The architectures that buddy routes, and the named ones it can fill with random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from buddy.errors import UserError, choices, short
from buddy.settings import MODEL_TYPES, MOST_BLOCKS

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # As published in the config.json of Llama-3.1-8B, Llama-2-7b, LLaMA-13b and Qwen2.5-7B.
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama1-13b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
    },
    # For tests: seconds on one core. Their vocabulary is that of the tokenizer they are given.
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-qwen2": {"model_type": "qwen2", "use_sliding_window": False, **_TINY},
    "tiny-qwen3": {"model_type": "qwen3", "use_sliding_window": False, **_TINY},
}


def check(config: Mapping[str, Any], origin: str, blocks: int | None = None) -> None:
    """Refuse a model that buddy cannot route.

    Args:
        config: the content of its config.json.
        origin: where it came from, for the message.
        blocks: number of blocks that the study expects; None takes what there is.

    Raises:
        UserError: code of its own, another model type, sliding-window attention in use, or another number of blocks.
    """
    if config.get("auto_map"):
        raise UserError(f"{origin}: config.json names code of its own (auto_map), which buddy never runs")
    for key in ("attn_implementation", "_attn_implementation"):
        if re.search("[/:@]", str(config.get(key) or "")):
            raise UserError(
                f"{origin}: config.json: {key}: {config[key]!r} is a kernel to fetch, which buddy never runs"
            )
    kind, found = config.get("model_type"), config.get("num_hidden_layers")
    if kind not in MODEL_TYPES:
        raise UserError(f"{origin}: model type {kind!r} is not supported; supported are {choices(MODEL_TYPES)}")
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= MOST_BLOCKS:
        raise UserError(
            f"{origin}: config.json: num_hidden_layers: {short(found)} is not a whole number from 1 to {MOST_BLOCKS}"
        )
    # Qwen configs name a window even where it is off, and apply it only from block `max_window_layers` on.
    window = "sliding_attention" in (config.get("layer_types") or []) or (
        config.get("use_sliding_window") and config.get("max_window_layers", 28) < int(found or 0)
    )
    if window:
        raise UserError(
            f"{origin}: sliding-window attention is in use, which buddy does not route; use a model without"
        )
    if blocks is not None and found != blocks:
        raise UserError(f"{origin}: blocks: {blocks} expected, but the model has {found}")
