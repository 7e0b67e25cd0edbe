"""Random weights of a named architecture: timing and tests need its shapes, not its knowledge."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.backbones import architectures, linked, weights
from buddy.errors import UserError, unknown
from buddy.settings import RandomSource

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def from_random(source: RandomSource, into: Path, dtype: str, blocks: int | None) -> None:
    """Write a model of a named architecture with random weights, and a tokenizer.

    Args:
        source: architecture, seed, number of blocks, folder of a tokenizer (one token per byte by default).
        into: empty folder to fill.
        dtype: of the weights, "float32" or "bfloat16".
        blocks: expected number of blocks.

    Raises:
        UserError: the architecture is unknown, or the tokenizer cannot be read or has too many tokens.
    """
    from transformers import AutoConfig, GenerationConfig

    known = architectures.ARCHITECTURES
    if source.random not in known:
        raise unknown("--random", source.random, known)
    values = {**known[source.random]}
    if source.layers is not None:
        values["num_hidden_layers"] = source.layers
    architectures.check(values, f"--random {source.random}", blocks)
    tokenizer = byte_tokenizer()
    if source.tokenizer is not None:
        tokenizer = linked.tokenizer(source.tokenizer, f"--tokenizer {source.tokenizer}")
    tokenizer.model_max_length = values["max_position_embeddings"]
    if len(tokenizer) > values.setdefault("vocab_size", len(tokenizer)):
        raise UserError(
            f"--tokenizer {source.tokenizer}: has {len(tokenizer)} tokens, {source.random} only {values['vocab_size']}"
        )
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(**values, **special, tie_word_embeddings=False, dtype=dtype)
    tensors = _tensors(config, source.seed, dtype)
    config.save_pretrained(into)
    tokenizer.save_pretrained(into)
    GenerationConfig(**special).save_pretrained(into)
    weights.write(into, tensors)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of one token per byte and three special ones, with a chat template: 259 tokens, built here."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _tensors(config: Any, seed: int, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter, made one at a time: memory for one tensor, not for the model.

    Each tensor has a seed of its own, from its name: a model with fewer blocks starts with the same ones.
    """
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {name: value.shape for name, value in model.state_dict().items()}

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, shape in tqdm(shapes.items(), desc="weights", unit="tensor", leave=False, disable=len(shapes) < 100):
            yield name, _value(name, shape, config.num_hidden_layers, seed).to(getattr(torch, dtype))

    return values()


def _value(name: str, shape: tuple[int, ...], blocks: int, seed: int) -> Tensor:
    """One parameter, float32, scaled so that activations and logits keep a size of about one at any width.

    Hugging Face's default of 0.02 gives near-uniform logits at a width of 64, which would hide mistakes.
    """
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        scale = 0.1
    elif name.endswith("embed_tokens.weight"):
        scale = 1.0
    else:
        scale = 1 / math.sqrt(shape[-1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # what enters the residual stream, L times twice
            scale /= math.sqrt(2 * blocks)
    return torch.empty(shape).normal_(0.0, scale, generator=generator)
