"""The methods that a study compares: what each is called, what its runs are, and what chooses its blocks.

What is the same for all methods of a kind is asked of the kind; nothing else in the project names a single one, but for
BUDDY itself, PuDDing and FiRST in the code that trains them. A static peer is an entry here and the file that ranks its
blocks; another package brings its own (`buddy.extensions`).
"""

from __future__ import annotations

from buddy.extensions import Kind, Method, table

__all__ = ["METHODS", "Kind", "Method", "kind", "of_kind"]

_OWN = (
    Method("dense", "Dense", "whole", 1, ("#222222", "D", (3.6, 1.6)), trained=False),
    Method("dense_lora", "Dense (LoRA)", "whole", 2, ("#8C510A", "d", (3.6, 1.4, 1, 1.4))),
    Method("buddy", "BUDDY", "routed", 99, ("#0072B2", "o", ())),
    Method(
        *("shortgpt", "ShortGPT", "static", 11, ("#009E73", "s", (5, 1.5, 1, 1.5))),
        criteria=("block_influence",),
        ranking="buddy.baselines.shortgpt:CRITERIA",
    ),
    Method(
        *("shortened_llama", "Shortened LLaMA", "static", 10, ("#E69F00", "X", (4, 1.5))),
        criteria=("ppl", "taylor", "ppl_unprotected"),
        ranking="buddy.baselines.shortened_llama:CRITERIA",
    ),
    Method(
        *("sleb", "SLEB", "static", 12, ("#CC79A7", "^", (2, 1.2))),
        criteria=("ppl",),
        ranking="buddy.baselines.sleb:CRITERIA",
    ),
    Method("pudding", "PuDDing", "dynamic", 20, ("#882255", "v", (6, 1.5, 1, 1.5, 1, 1.5))),
    Method("first", "FiRST", "dynamic", 21, ("#56B4E9", "P", (1, 1.2))),
)

METHODS: dict[str, Method] = table("buddy.methods", _OWN)
"""Every method by name, in the order in which their runs are made."""


def of_kind(*kinds: Kind) -> tuple[str, ...]:
    """Names of the methods of these kinds."""
    return tuple(name for name, method in METHODS.items() if method.kind in kinds)


def kind(name: str) -> Kind | None:
    """The kind of a method; None of one that is not in the table, as records of a policy of one's own have."""
    return METHODS[name].kind if name in METHODS else None
