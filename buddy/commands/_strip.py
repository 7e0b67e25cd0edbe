"""The routes of one generation, for people: a line per block, a column per token; and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

UNICODE, ASCII = ("█", "·"), ("#", ".")
"""Marks of a block that ran and of one that was skipped, and those for terminals that have only ASCII."""

DIFFERS = "*"
_HIGHLIGHT = "\033[33m{}\033[0m"


def facts(routes: Tensor) -> dict[str, Any]:
    """What ran, as plain values.

    Args:
        routes: boolean (steps, L), the prompt's first; step i made token i + 1 of the text.

    Returns:
        ``blocks``; ``routes``, the executed blocks of each step, counted from 1; ``executed``, how many they are;
        ``distinct_paths``; ``differ``, the blocks that ran in some steps and not in others.
    """
    paths = [[block + 1 for block in route.nonzero().flatten().tolist()] for route in routes]
    return {
        "blocks": routes.shape[1],
        "routes": paths,
        "executed": [len(path) for path in paths],
        "distinct_paths": len(set(map(tuple, paths))),
        "differ": [block + 1 for block in _differing(routes)],
    }


def draw(routes: Tensor, width: int = 80, marks: tuple[str, str] = UNICODE, colour: bool = False) -> str:
    """What ran, as text: a line per block, first the prompt's route, then a column for each further token.

    Neighbouring blocks that do the same from the first step to the last share a line. Blocks that differ between steps
    are marked. Tokens that do not fit beside each other follow below, with the prompt's route again.

    Args:
        routes: as for `facts`.
        width: characters in a line.
        marks: of a block that ran, and of one that was skipped.
        colour: highlight, by terminal colours, where a step differs from the prompt.
    """
    rows = list(_rows(routes))
    margin = max([len("block"), *(len(label) for label, _ in rows)])
    room = max(1, width - margin - len("  P  "))
    steps = len(routes)
    lines = []
    for start in range(1, max(steps, 2), room):
        stop = min(start + room, steps)
        lines += [f"{'block':>{margin}}  P{_tokens(start, stop)}"]
        for label, block in rows:
            column = routes[:, block].tolist()
            shown = "".join(_cell(ran, column[0], marks, colour) for ran in column[start:stop])
            lines.append(f"{label:>{margin}}  {_cell(column[0], column[0], marks, colour)}  {shown}".rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def marks_in(encoding: str | None) -> tuple[str, str]:
    """The marks that a terminal or a file of this encoding can show; None is any text."""
    try:
        "".join(UNICODE).encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return ASCII
    return UNICODE


def legend(marks: tuple[str, str] = UNICODE) -> str:
    """What the marks of `draw` say."""
    return f"{marks[0]} ran, {marks[1]} skipped; P: the prompt, which gives token 1; {DIFFERS} differs between steps"


def _tokens(start: int, stop: int) -> str:
    """Which tokens stand below; token i + 1 is made by step i."""
    if stop <= start:
        return ""
    return f"  token {start + 1}" if stop - start == 1 else f"  tokens {start + 1} to {stop}"


def _cell(ran: bool, before: bool, marks: tuple[str, str], colour: bool) -> str:
    mark = marks[0] if ran else marks[1]
    return _HIGHLIGHT.format(mark) if colour and ran != before else mark


def _differing(routes: Tensor) -> list[int]:
    return (routes.any(0) & ~routes.all(0)).nonzero().flatten().tolist()


def _rows(routes: Tensor) -> Iterator[tuple[str, int]]:
    """Label and first block, from 0, of every line."""
    differing = set(_differing(routes))
    alike = {
        block: f"own {block}" if block in differing else bool(routes[0, block]) for block in range(routes.shape[1])
    }
    for _, group in groupby(alike, key=alike.__getitem__):
        blocks = list(group)
        first, last = blocks[0] + 1, blocks[-1] + 1
        name = str(first) if first == last else f"{first}-{last}"
        yield f"{name} {DIFFERS if blocks[0] in differing else ' '}", blocks[0]
