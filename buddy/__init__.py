"""BUDDY: budget-driven dynamic depth routing for LLM inference (arXiv 2606.09514).

>>> import buddy
>>> model = buddy.load("results/demo/runs/...")                         # doctest: +SKIP
>>> model.generate(**inputs, budget=0.75, max_new_tokens=64)            # doctest: +SKIP
>>> model.trace.paths()                                                 # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from buddy.runs import load


def __getattr__(name: str) -> Any:
    # Loading is imported when first used: `buddy --help` and the reports need no torch.
    if name == "load":
        from buddy.runs import load

        return load
    raise AttributeError(f"module 'buddy' has no attribute {name!r}")
