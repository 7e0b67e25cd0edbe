"""From routes to an order of work: which rows pass which block, block by block or path by path.

*By block* (the paper's gather and scatter): at each block the sequences that run it are gathered into a sub-batch and
scattered back. A block's weights are read once, whatever the routes. *By path*: sequences with the same route go
through all their blocks together. Weights are read once per path, but rows are gathered once per pass, and a group of
prompts needs no more padding than its longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED_TOKENS = {"cpu": 24, "cuda": 256}
"""What one more call of a block costs whatever its input, in tokens of computation: weights are read, kernels launched.

Measured by ``benchmarks/grouping.py``; an order of magnitude is enough, since prompts have far more tokens and a
decode step far fewer.
"""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some sequences of a batch.

    Attributes:
        index: (n,) int64, increasing, on the device of the pass.
        runs: the same as half-open ranges of neighbours.
    """

    index: Tensor
    runs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Group:
    """Sequences that share a path.

    Attributes:
        rows: the sequences.
        path: the blocks after the source block that they run.
        columns: the tokens of the pass in which any of them has a real token.
    """

    rows: Rows
    path: tuple[int, ...]
    columns: slice


@dataclass(frozen=True)
class Plan:
    """How a pass is executed.

    Attributes:
        running: for each block the rows that run it; None means all.
        skipping: for each block the rows that skip it; None means none.
        groups: the same by path; None if the pass goes block by block.
    """

    running: list[Rows | None]
    skipping: list[Rows | None]
    groups: list[Group] | None = None


def plan(
    route: Sequence[Sequence[bool]],
    source: int,
    device: torch.device,
    tokens: Sequence[tuple[int, int]] | None = None,
    grouping: bool | None = None,
) -> Plan:
    """Order the work of one pass.

    Args:
        route: (B, L), on the host.
        source: number of leading blocks that have run already.
        device: of the pass.
        tokens: per sequence the half-open range of its real tokens in the pass; None where paths must not be grouped.
        grouping: take paths (True) or blocks (False); None decides by `grouping_pays`.
    """
    batch = len(route)
    if batch == 1:
        return _alone(route[0], device)
    columns = list(zip(*route, strict=True))
    sets: list[tuple[int, ...]] = [tuple(row for row in range(batch) if column[row]) for column in columns]
    complements = [tuple(row for row in range(batch) if not column[row]) for column in columns]
    members: dict[tuple[int, ...], list[int]] = {}
    for row, blocks in enumerate(route):
        members.setdefault(tuple(i for i in range(source, len(blocks)) if blocks[i]), []).append(row)
    by_path = tokens is not None and len(members) > 1
    if by_path and grouping is None:
        by_path = grouping_pays(members, tokens or (), device.type)
    elif grouping is False:
        by_path = False
    wanted = [*sets[source:], *complements[source:]]
    rows = _rows(wanted + [tuple(found) for found in members.values()] if by_path else wanted, batch, device)
    return Plan(
        running=[rows[found] if len(found) < batch else None for found in sets],
        skipping=[rows[found] if found else None for found in complements],
        groups=[Group(rows[tuple(found)], path, _columns(found, tokens or ())) for path, found in members.items()]
        if by_path
        else None,
    )


def _alone(route: Sequence[bool], device: torch.device) -> Plan:
    """The plan of a single sequence, which needs no gathering."""
    all_rows = Rows(torch.zeros(1, dtype=torch.int64, device=device), ((0, 1),))
    no_rows = Rows(all_rows.index[:0], ())
    return Plan([None if runs else no_rows for runs in route], [None if runs else all_rows for runs in route])


def grouping_pays(members: dict[tuple[int, ...], list[int]], tokens: Sequence[tuple[int, int]], device: str) -> bool:
    """Whether going path by path takes less time than block by block.

    It costs `FIXED_TOKENS` for each further call of a block, and saves the padding that a group does without.

    Args:
        members: rows of each path.
        tokens: per sequence the range of its real tokens.
        device: type of the device.
    """
    width = max(end for _, end in tokens) - min(first for first, _ in tokens)
    shared = len({block for path in members for block in path})
    calls = sum(len(path) for path in members) - shared
    saved = 0
    for path, found in members.items():
        own = _columns(found, tokens)
        saved += len(path) * len(found) * (width - (own.stop - own.start))
        # Gathering and scattering a row at a block takes about a twelfth of the time of running it there.
        saved += len(path) * len(found) * (own.stop - own.start) // 12
    return saved > calls * FIXED_TOKENS.get(device, FIXED_TOKENS["cuda"])


def _columns(found: Sequence[int], tokens: Sequence[tuple[int, int]]) -> slice:
    return slice(min(tokens[row][0] for row in found), max(tokens[row][1] for row in found))


def _rows(sets: Sequence[tuple[int, ...]], batch: int, device: torch.device) -> dict[tuple[int, ...], Rows]:
    """Each set of rows once, all their indices brought to the device in one copy."""
    distinct = [found for found in dict.fromkeys(sets) if found]
    flat = torch.tensor([row for found in distinct for row in found], dtype=torch.int64).to(device, non_blocking=True)
    parts = flat.split([len(found) for found in distinct]) if distinct else ()
    empty = Rows(flat[:0], ())
    return {(): empty, **{found: Rows(part, _runs(found)) for found, part in zip(distinct, parts, strict=True)}}


def _runs(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Increasing numbers as half-open ranges of neighbours."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return tuple(runs)
