"""A training that has diverged is stopped before its next update, with what it has kept until then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from torch import Tensor

from buddy.errors import UserError


class Diverged(UserError):
    """A loss or a gradient that is no number: another learning rate is needed, and the same training would end there again."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"training: diverged at step {step} ({what}); lower the learning rate; checkpoints are kept")


def check_loss(loss: Tensor, step: int) -> None:
    """Raise `Diverged` if the loss of an update is not finite; asks the device once.

    Args:
        loss: any shape.
        step: number of the update, from 1.
    """
    if not bool(torch.isfinite(loss).all()):
        raise Diverged(step, f"the loss is {loss.detach().float().mean().item()}")


def watch(optimizer: torch.optim.Optimizer, step: Callable[[], int] | None = None) -> None:
    """Let every update of this optimizer raise `Diverged`, and change nothing, if a gradient is not finite.

    Args:
        optimizer: asked before each of its steps, at the price of one read from the device.
        step: the number of the update that is due, from 1; None counts them from here.
    """
    due = step or partial(next, count(1))

    def look(made: torch.optim.Optimizer, *_: object) -> None:
        number = due()
        gradients = [p.grad for group in made.param_groups for p in group["params"] if p.grad is not None]
        sizes = [size.float() for size in torch._foreach_norm(gradients)] if gradients else []
        if sizes and not bool(torch.isfinite(torch.stack(sizes)).all()):
            raise Diverged(number, "a gradient is not finite")

    optimizer.register_step_pre_hook(look)
