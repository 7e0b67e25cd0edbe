"""Whatever is loaded is looked at once, where it is loaded: is it all there, of the right shape, and finite?

A model with a missing or broken tensor computes on without a word, and its scores look like those of a bad method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from buddy.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = Sequence[int]


def check_complete(found: Mapping[str, Shape], expected: Mapping[str, Shape], origin: str) -> None:
    """Compare the tensors that a file holds with those that a model has.

    Args:
        found, expected: shapes by name; a module's extra state, which is text, has whatever length it has.
        origin: the file or folder, for the message.

    Raises:
        UserError: one is missing, one too many, or of another shape; names the first and counts the others.
    """
    missing = [f"no {name}" for name in expected if name not in found]
    foreign = [f"{name}, which the model has not" for name in found if name not in expected]
    wrong = [
        f"{name} of shape {tuple(found[name])} where the model has {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape) and not name.endswith("_extra_state")
    ]
    if problems := missing + wrong + foreign:
        more = f" (and {len(problems) - 1} more such)" if len(problems) > 1 else ""
        raise UserError(f"{origin}: {problems[0]}{more}: it does not fit the model; nothing was loaded")


def check_finite(tensors: Iterable[tuple[str, Tensor]], origin: str) -> None:
    """Refuse NaN and infinities.

    Smallest and largest value say it all (NaN goes through both), need no memory and are quick in every dtype; a GPU is
    asked once for the answer of all tensors.

    Args:
        tensors: names and values; those of whole numbers are passed over.
        origin: the file or folder, for the message.

    Raises:
        UserError: names the first tensor that holds one.
    """
    import torch

    floats = [(name, value) for name, value in tensors if value.is_floating_point() and value.numel()]
    if not floats:
        return
    ends = [
        torch.stack(torch.aminmax(value.detach())).isfinite().all().to("cpu", non_blocking=True) for _, value in floats
    ]
    if floats[0][1].is_cuda:
        torch.cuda.synchronize()
    for (name, _), finite in zip(floats, ends, strict=True):
        if not finite:
            raise UserError(f"{origin}: {name} holds NaN or infinity; nothing that it computes would mean anything")


def fill(module: nn.Module, path: Path) -> None:
    """Load a module's whole state from a safetensors file.

    Args:
        module: filled in place.
        path: a file that holds the module's state dict and nothing else.

    Raises:
        UserError: the file is missing or damaged, does not fit, or holds NaN or infinity.
    """
    state = read(path)
    check_finite(state.items(), str(path))
    own = {name: value.shape for name, value in module.state_dict().items()}
    check_complete({name: value.shape for name, value in state.items()}, own, str(path))
    module.load_state_dict(state)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: no such file: what should be loaded is not complete")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
