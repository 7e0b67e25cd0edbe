"""The backbone's own formulas in fewer kernels, lent to its modules while a step is captured.

In a decode step of one token most kernels of a block are not its matrix products: Hugging Face's norm takes eight and
its rotary embedding ten, each of which costs a microsecond or two however little it does. Here they are one and four.
They round less often, so in half precision results differ in the last bit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from buddy.routing.types import Decoder


def norm(module: Any, hidden: Tensor) -> Tensor:
    """Root mean square norm of any shape (..., H), with the module's weight and epsilon."""
    return nn.functional.rms_norm(hidden, (hidden.shape[-1],), module.weight, module.variance_epsilon)


def rotate(
    queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, *_: Any, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary embedding.

    Args:
        queries, keys: (B, heads, S, head size) and (B, KV heads, S, head size).
        cos, sin: (B, S, head size).
        unsqueeze_dim: where these lack the dimension of the heads.

    Returns:
        Both, turned.
    """
    both = torch.cat((queries, keys), dim=1)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = both.shape[-1] // 2
    turned = both * cos
    turned[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(both[..., :half], sin[..., half:])
    return turned[:, : queries.shape[1]], turned[:, queries.shape[1] :]


_lending = threading.RLock()


@contextmanager
def lean(decoder: Decoder) -> Iterator[None]:
    """Within the context, the decoder's norms and rotary embedding take few kernels, in this thread alone."""
    home: Any = sys.modules[type(decoder.layers[0].self_attn).__module__]
    with _lending:  # what one thread lends, another must not take for the usual
        norms = [module for module in decoder.modules() if _is_norm(module)]
        usual = home.apply_rotary_pos_emb
        for module in norms:
            module.forward = _here(partial(norm, module), module.forward)
        home.apply_rotary_pos_emb = _here(rotate, usual)
        try:
            yield
        finally:
            home.apply_rotary_pos_emb = usual
            for module in norms:
                del module.forward


def _here(own: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    """What the calling thread gets, and what all others get."""
    owner = threading.get_ident()
    return lambda *args, **kwargs: (own if threading.get_ident() == owner else others)(*args, **kwargs)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is Hugging Face's RMS norm, with nothing of its own in the way."""
    named = type(module).__name__.endswith("RMSNorm")
    return named and hasattr(module, "variance_epsilon") and "forward" not in vars(module)
