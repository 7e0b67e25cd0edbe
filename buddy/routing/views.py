"""A second view of a module: the same parameters, submodules and hooks, but some attributes of its own.

A routed pass needs a block to behave a little differently from the backbone's own: to attend to a sub-batch, or to be
checkpointed by the engine and not by itself. Changing the module for the time of a pass would change it for every thread
that uses the backbone meanwhile, and for the recomputation of a checkpointed pass, which comes later.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn


def twin(module: Any, **attributes: Any) -> Any:
    """A module that computes with the very tensors of another.

    Args:
        module: stays as it is; its parameters, buffers, submodules and hooks are shared, those added later too.
        attributes: what is different; a module replaces the submodule of that name.
    """
    other = object.__new__(type(module))
    own = {name: _rebound(value, module, other) for name, value in vars(module).items()}
    own["_compiled_call_impl"] = None  # `module.compile()` leaves a call of the original
    modules = {name: value for name, value in attributes.items() if isinstance(value, nn.Module)}
    if modules:
        own["_modules"] = {**own["_modules"], **modules}
    other.__dict__.update(own)
    other.__dict__.update({name: value for name, value in attributes.items() if name not in modules})
    return other


def _rebound(value: Any, module: Any, other: Any) -> Any:
    """What is bound to the module itself, such as a forward that accelerate has wrapped, bound to its twin."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, other)
    if isinstance(value, partial) and value.args and value.args[0] is module:
        return partial(value.func, other, *value.args[1:], **value.keywords)
    return value
