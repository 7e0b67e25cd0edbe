"""Linear layers in 8 bits: weights and, token by token, what goes into them (torchao, which PyTorch points to).

Depth and precision save in different ways, so a routed model must work on top of a quantised backbone: its blocks are
ordinary modules, and the router reads keys and values, which stay floats.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from buddy.errors import UserError


def int8(backbone: nn.Module) -> nn.Module:
    """Quantise all linear layers in place, the head included: int8 weights per row, activations per token as they come.

    Args:
        backbone: causal language model in evaluation mode; a head that shares its weights with the embedding gets its own.

    Returns:
        The same.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise UserError("int8: torchao is not installed (pip install torchao)") from None
    with torch.no_grad():
        quantize_(backbone, Int8DynamicActivationInt8WeightConfig())
    return backbone


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is kept in: itself, or the parts of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from stored(getattr(tensor, name))
