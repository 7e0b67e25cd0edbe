"""Nests of dataclasses, mappings and sequences with tensors in them: what a policy keeps of its sequences."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor


def leaves(state: Any) -> list[Any]:
    """Everything in a nest of dataclasses, mappings and sequences that is none of these, in order."""
    if dataclasses.is_dataclass(state):
        return [leaf for part in dataclasses.fields(state) for leaf in leaves(getattr(state, part.name))]
    if isinstance(state, dict):
        return [leaf for part in state.values() for leaf in leaves(part)]
    if isinstance(state, list | tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [state]


def cloned(state: Any) -> Any:
    """The same nest with tensors of its own."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if dataclasses.is_dataclass(state):
        twin = copy.copy(state)
        for part in dataclasses.fields(state):
            object.__setattr__(twin, part.name, cloned(getattr(state, part.name)))
        return twin
    if isinstance(state, dict):
        return {name: cloned(part) for name, part in state.items()}
    return type(state)(cloned(part) for part in state) if isinstance(state, list | tuple) else state


def copied(fresh: Any, static: Any) -> bool:
    """Copy the tensors of one state into those of another; False, and nothing done, if they are not of one make.

    What is no tensor is built into graphs, and so must be equal.
    """
    pairs = list(zip(leaves(fresh), leaves(static), strict=False))
    if len(leaves(fresh)) != len(leaves(static)) or not all(_alike(*pair) for pair in pairs):
        return False
    for new, old in pairs:
        if isinstance(new, Tensor):
            old.copy_(new)
    return True


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return type(one) is type(other) and bool(one == other)
