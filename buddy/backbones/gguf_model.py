"""A model as one GGUF file, which llama.cpp loads: settings, tokenizer and weights, under its names.

The names of tensors and settings, and the 8-bit blocks, are those of the package ``gguf``. What it does not do, the script
`convert_hf_to_gguf.py` of llama.cpp does, and so is done here: rows of Llama's query and key in llama.cpp's order of rotary
pairs, and the frequencies of Llama 3.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from buddy.backbones import gguf_vocabulary
from buddy.errors import UserError, needs, unknown
from buddy.storage.files import check_writable, permitted

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

TYPES = ("f16", "q8_0")
ROPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embedding, and what of their parameters the file says."""
_USUAL = {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1}
"""What llama.cpp takes where a file says nothing."""
BLOCKS = "buddy.blocks"
"""Blocks of the backbone; every file that is written here says it, and is known by it."""


@dataclass(frozen=True)
class Facts:
    """What a file says of its model beside its shapes.

    Attributes:
        name: of the model.
        description: a sentence or two.
        license: as the Hub spells it; "" where it is not known.
        blocks: of the backbone, and ``removed``: those that were left out, from 0.
    """

    name: str
    description: str = ""
    license: str = ""
    blocks: int = 0
    removed: list[int] = field(default_factory=list)


def claim(file: str | Path) -> Path:
    """Make sure that a file may be written: absent, or one that was written here before.

    Raises:
        UserError: it is something else, which stays as it is, or cannot be written.
    """
    needs("gguf")
    path = Path(os.path.abspath(file))
    if path.suffix != ".gguf":
        raise UserError(f"--gguf {file}: name a file that ends in .gguf")
    if path.exists() and not _ours(path):
        raise UserError(f"--gguf {file}: is not a file that buddy made; nothing was touched: name a new one")
    check_writable(path.parent, f"--gguf {file}")
    return path


def _ours(path: Path) -> bool:
    from gguf import GGUFReader

    try:
        return BLOCKS in GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError):
        return False


def check(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse, before any work, a model that cannot be written.

    Args:
        config: of the model.
        tokenizer: its own.

    Raises:
        UserError: its tokenizer or its rotary embedding is of a kind that is not known here.
    """
    gguf_vocabulary.of(tokenizer, config.vocab_size)
    rope = _rope(config)
    known = ROPES.get(rope["rope_type"])
    if known is None:
        raise unknown("--gguf: the model's rope_type", rope["rope_type"], ROPES)
    for key, value in rope.items():
        if key not in (*known, "rope_type", "rope_theta") and _USUAL.get(key) != value:
            raise UserError(
                f"--gguf: the model's rope_parameters have {key}: {value}, which has no place in a GGUF file"
            )
    if config.hidden_act != "silu":
        raise UserError(f"--gguf: the model's hidden_act is {config.hidden_act!r}; llama.cpp has only 'silu' for it")


def write(model: Any, tokenizer: PreTrainedTokenizerBase, file: Path, kind: str, facts: Facts) -> None:
    """Write a model, whole or not at all.

    Args:
        model: causal language model of type llama, qwen2 or qwen3, any float dtype.
        tokenizer: its own.
        file: as `claim` found it.
        kind: "f16", or "q8_0": matrices whose rows are whole blocks of 32 in 8 bits, the others f16. Vectors are f32.
        facts: what it says of itself.

    Raises:
        UserError: as `check`; an unknown kind.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

    if kind not in TYPES:
        raise unknown("--type", kind, TYPES)
    check(model.config, tokenizer)
    kinds = {MODEL_ARCH_NAMES[arch]: arch for arch in (MODEL_ARCH.LLAMA, MODEL_ARCH.QWEN2, MODEL_ARCH.QWEN3)}
    architecture = model.config.model_type
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        writer = GGUFWriter(partial, architecture)
        _describe(writer, facts, kind)
        _settings(writer, model.config)
        _tokenizer(writer, gguf_vocabulary.of(tokenizer, model.config.vocab_size))
        _weights(writer, model, kinds[architecture], kind)
        writer.close()
        os.chmod(partial, permitted(0o666))
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _describe(writer: GGUFWriter, facts: Facts, kind: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(facts.name)
    writer.add_description(facts.description)
    writer.add_license(facts.license)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type({"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}[kind])
    writer.add_uint32(BLOCKS, facts.blocks)
    writer.add_array("buddy.removed", facts.removed)


def _settings(writer: GGUFWriter, config: Any) -> None:
    from gguf import RopeScalingType

    heads = config.num_attention_heads
    head = _head(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings", config.max_position_embeddings)
        )


def _tokenizer(writer: GGUFWriter, found: gguf_vocabulary.Vocabulary) -> None:
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.model == "gpt2":
        writer.add_token_merges(found.merges)
    else:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for name, token in found.special.items():
        adders[name](token)
    writer.add_add_bos_token(found.bos)
    writer.add_add_eos_token(found.eos)
    if found.chat_template:
        writer.add_chat_template(found.chat_template)


def _weights(writer: GGUFWriter, model: Any, architecture: Any, kind: str) -> None:
    """Headers of all tensors first, then their content one at a time: memory for one tensor, not for the model."""
    import numpy as np
    from gguf import GGMLQuantizationType, get_tensor_name_map, quant_shape_to_byte_shape, quants

    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    kinds: list[Any] = []
    for name, tensor in _tensors(model):
        shape = tuple(tensor.shape)
        if tensor.ndim == 1:
            chosen = GGMLQuantizationType.F32
        elif kind == "q8_0" and shape[-1] % 32 == 0:
            chosen = GGMLQuantizationType.Q8_0
        else:
            chosen = GGMLQuantizationType.F16
        kinds.append(chosen)
        stored = quant_shape_to_byte_shape(shape, chosen)
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise UserError(f"--gguf: tensor {name} has no name in GGUF")
        writer.add_tensor_info(renamed, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, tensor), chosen in zip(_tensors(model), kinds, strict=True):
        writer.write_tensor_data(quants.quantize(tensor.float().cpu().contiguous().numpy(), chosen))


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by its Hugging Face name, in llama.cpp's order of rows."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            tensor = _paired(tensor, heads)
        yield name, tensor
    if (factors := _rope_factors(config)) is not None:
        yield "rope_freqs.weight", factors


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a projection such that the two that a rotation turns lie side by side: llama.cpp turns rows 2i and 2i+1 of a
    Llama's head, Hugging Face rows i and i + half.

    Args:
        tensor: weight (heads * D, H) or bias (heads * D).
        heads: number of heads.
    """
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(config: Any) -> Tensor | None:
    """What Llama 3 divides its rotary frequencies by, shape (D / 2,); None for other kinds.

    Taken from transformers' own frequencies, so that there is no second formula.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = _head(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return plain / scaled


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", **config.rope_parameters}


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
