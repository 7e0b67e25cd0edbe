"""Names for what a routed pass spends its time on. They cost nothing unless a profiler has asked for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

PREFIX = "buddy."
DECISION, GATHER, CACHE = "decision", "gather_scatter", "cache"
"""Reading the source block and choosing routes; moving rows in and out of sub-batches; writing keys and values."""

PREDICTOR = "predictor"
"""Choosing the budget, where that is left to a predictor: a part of the decision, and of the prefill alone."""

_off: AbstractContextManager[Any] = nullcontext()
_on = False


def mark(name: str) -> AbstractContextManager[Any]:
    """A context whose time is booked under ``name``; nothing at all outside `marking`."""
    if not _on:
        return _off
    from torch.profiler import record_function

    return record_function(PREFIX + name)


@contextmanager
def marking() -> Iterator[None]:
    """Within the context, the parts of a pass carry their names as profiler ranges."""
    global _on
    _on = True
    try:
        yield
    finally:
        _on = False
