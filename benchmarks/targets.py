"""The engine's targets for routes that differ, against what was measured: a line each, and whether it was met.

    python benchmarks/targets.py RECORDS

RECORDS is a folder of latency records (`buddy latency --out`), or of several. Needs no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from buddy.study.records import Record, find

Metrics = dict[str, Any]


class Target(NamedTuple):
    """What must be reached.

    Attributes:
        text: what it is about.
        chooses: whether a record's metrics are.
        metric: the ratio that counts.
        least: what its median must reach.
    """

    text: str
    chooses: Callable[[Metrics], bool]
    metric: str
    least: float


def _varied(slack: int | None, sizes: tuple[int, ...]) -> Callable[[Metrics], bool]:
    def chooses(metrics: Metrics) -> bool:
        known = (metrics["execution"], metrics.get("slack")) == ("varied", slack)
        return known and metrics["batch_size"] in sizes

    return chooses


TARGETS = (
    Target("varied routes, batch 1, decode of sliced", _varied(None, (1,)), "decode_of_sliced", 0.97),
    Target("varied routes, batch 1, prefill of sliced", _varied(None, (1,)), "prefill_of_sliced", 0.97),
    Target(
        "varied routes, one set for all, batch 8 and 16, decode of sliced",
        _varied(0, (8, 16)),
        "decode_of_sliced",
        0.95,
    ),
    Target(
        "varied routes, independent, batch 8 and 16, decode of called", _varied(None, (8, 16)), "decode_of_called", 0.9
    ),
    Target(
        "nested budgets, decode of the deepest sequence's sliced model",
        lambda metrics: metrics["execution"] == "nested",
        "decode_of_called",
        0.95,
    ),
)


def lines(records: list[Record]) -> Iterator[tuple[str, bool | None]]:
    """Each target's line, and whether it was met; None where nothing was measured."""
    for target in TARGETS:
        found = [
            record
            for record in records
            if target.chooses(record.metrics) and record.metrics.get(target.metric) is not None
        ]
        if not found:
            yield f"{'not measured':>14}  at least {target.least:.2f}  {target.text}", None
        for record in sorted(
            found, key=lambda one: (one.metrics["batch_size"], one.budget.removed if one.budget else 0)
        ):
            metrics, value = record.metrics, record.metrics[target.metric]
            met = value["median"] >= target.least
            removed = metrics["removed_per_sequence"] or (record.budget.removed if record.budget else "?")
            yield (
                (
                    f"{'met' if met else 'MISSED':>6} {value['median']:>7.3f}  at least {target.least:.2f}  {target.text}: batch "
                    f"{metrics['batch_size']}, {removed} removed, {metrics['called_mean']:.1f} blocks called "
                    f"({value['p10']:.3f} to {value['p90']:.3f}, {len(value['values'])} repeats)"
                ),
                met,
            )


def main() -> None:
    """Print the lines; status 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="folders of latency records")
    paths = [path for folder in parser.parse_args().records for path in find(folder)]
    met = []
    for line, reached in lines([record for record in map(Record.read, paths) if record.kind == "latency"]):
        print(line)
        met.append(reached)
    sys.exit(1 if False in met else 0)


if __name__ == "__main__":
    main()
