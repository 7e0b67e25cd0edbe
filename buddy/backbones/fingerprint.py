"""Which backbone it is, told from its folder in milliseconds: what a run was trained on, it is loaded with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from buddy.backbones import linked, weights

CHUNKS, CHUNK_BYTES = 8, 256
"""What is read of a tensor: so many pieces, evenly spread."""

SHAPING = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters")
"""What of a configuration the weights do not show and the result depends on."""


def of_backbone(folder: str | Path) -> str:
    """A digest of a backbone's weights and of how they are used, sixteen hexadecimal digits.

    It covers every tensor's name, dtype and shape and some pieces of its content, and stays the same when the folder is
    moved, copied, linked or cut into other shards. To hash every byte would read a model of 7 billion parameters, 14 GB,
    once more before each job; training, merging or quantising moves nearly every number, so pieces tell models apart.
    What they do not tell is a damaged byte: `backbone.json` has the SHA-256 of each file for that.

    Raises:
        UserError: it is no backbone, or a file is damaged.
    """
    folder = Path(folder)
    linked.check(folder, str(folder))
    config = weights.configuration(folder, str(folder))
    used = {name: getattr(config, name, None) for name in SHAPING}
    digest = hashlib.sha256(json.dumps(used, sort_keys=True, default=str).encode())
    pieces: dict[str, bytes] = {}
    for path in weights.files(folder, str(folder)):
        pieces.update(_pieces(path))
    if config.tie_word_embeddings:  # some write the shared tensor twice
        pieces.pop("lm_head.weight", None)
    for name in sorted(pieces):
        digest.update(pieces[name])
    return digest.hexdigest()[:16]


def _pieces(path: Path) -> dict[str, bytes]:
    """Per tensor what is told of it."""
    content, start = weights.header(path), weights.data_start(path)
    found = {}
    with path.open("rb") as stream:
        for name, tensor in content.items():
            found[name] = f"{name} {tensor['dtype']} {tensor['shape']}".encode() + _sample(stream, start, tensor)
    return found


def _sample(stream: Any, start: int, tensor: dict[str, Any]) -> bytes:
    first, end = tensor["data_offsets"]
    size = end - first
    if size <= CHUNKS * CHUNK_BYTES:
        stream.seek(start + first)
        return stream.read(size)
    read = b""
    for chunk in range(CHUNKS):
        stream.seek(start + first + chunk * (size - CHUNK_BYTES) // (CHUNKS - 1))
        read += stream.read(CHUNK_BYTES)
    return read
