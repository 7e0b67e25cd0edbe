"""How the static peers choose the blocks they remove: a file per method, each from its own paper's definition.

What is chosen is a removal order for `buddy.policies.static.StaticPolicy`. Which function finds it, for a method and a
criterion, stands in `buddy.methods`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from buddy.baselines.removal import Peer, Removal
from buddy.errors import UserError, unknown
from buddy.extensions import named
from buddy.methods import METHODS, of_kind
from buddy.routing.types import CausalLM


def peer(method: str, criterion: str | None = None) -> tuple[str, Peer]:
    """A method's criterion, by default its first: name and definition.

    Raises:
        UserError: an unknown method, or a criterion that it has not.
    """
    if method not in of_kind("static"):
        raise unknown("--method", method, of_kind("static"))
    criteria = METHODS[method].criteria
    criterion = criterion or criteria[0]
    if criterion not in criteria:
        raise unknown(f"--criterion (of {method})", criterion, criteria)
    definitions: dict[str, Peer] = named(METHODS[method].ranking)
    return criterion, definitions[criterion]


def removable(definition: Peer, blocks: int, removed: int, protect: Sequence[int] | None = None) -> list[int]:
    """The blocks that a method may remove, ascending.

    Args:
        definition: method and criterion.
        blocks: number of blocks L of the backbone.
        removed: how many are to be removed.
        protect: blocks never removed, from 0, negative ones from the end; what the method's authors keep by default.

    Raises:
        UserError: a block that the backbone has not, or more to remove than may be.
    """
    protect = definition.protected if protect is None else protect
    wrong = [index for index in protect if not -blocks <= index < blocks]
    if wrong:
        raise UserError(
            f"--protect: {wrong[0]} is not a block from 0 to {blocks - 1} (or -{blocks} to -1, from the end)"
        )
    protected = sorted({index % blocks for index in protect})
    candidates = [block for block in range(blocks) if block not in protected]
    most = min(len(candidates), blocks - 1)
    if not 1 <= removed <= most:
        why = f"protected: {','.join(map(str, protected))}" if protected else "one has to stay"
        raise UserError(f"--removed: {removed} of {blocks} blocks asked for, 1 to {most} can be removed ({why})")
    return candidates


def calibrate(
    backbone: CausalLM,
    ids: Tensor,
    method: str,
    removed: int,
    *,
    criterion: str | None = None,
    protect: Sequence[int] | None = None,
    batch_size: int = 1,
) -> Removal:
    """The blocks that a static method removes from a backbone, in order.

    Args:
        backbone: causal language model.
        ids: (N, S) calibration windows.
        method: a static one of `buddy.methods`.
        removed: how many blocks to remove.
        criterion: one of the method's; its first by default.
        protect: blocks never removed, from 0, negative ones from the end; what its authors keep by default.
        batch_size: windows per pass.

    Raises:
        UserError: an unknown method or criterion, or blocks that are not there or may not be removed.
    """
    _, definition = peer(method, criterion)
    candidates = removable(definition, len(backbone.get_decoder().layers), removed, protect)
    return definition.find(backbone, ids.to(backbone.device), removed, candidates, batch_size)
