"""Whether one method beats another: paired bootstrap over the items that both answered, at equal depth.

A method that ran another mean depth than the one asked for (FiRST) is met at the depth that it ran: each of our items counts
with its value interpolated between the two measured depths around it, which is what drawing one of the two for every input,
in that proportion, would score on average.

A claim that A beats B carries an interval, and the number of comparisons made (Holm's correction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from buddy.reporting import measures
from buddy.reporting.grid import Cell, Grid, Row
from buddy.reporting.labels import buddy_label, series_labels
from buddy.reporting.measured import Accuracy
from buddy.reporting.measures import Measure
from buddy.reporting.study import Series, Study
from buddy.resampling import RESAMPLES, estimate

LEVEL = 0.05
BETTER, WORSE, UNCLEAR = "higher", "lower", "no difference shown"


@dataclass(frozen=True)
class Difference:
    """A difference of two averages over tasks or data sets, of accuracies in percentage points.

    Attributes:
        value: ours minus theirs; None where they cannot be compared, and ``note`` says why.
        low, high: its 95 % interval.
        p: two-sided, by the share of resamples on the other side of 0.
        items: number of items behind it.
        note: why there is none.
        depth: mean number of executed blocks at which they were compared, where that is not the one asked for.
    """

    value: float | None = None
    low: float = 0.0
    high: float = 0.0
    p: float = 1.0
    items: int = 0
    note: str = ""
    depth: float | None = None


def difference(
    study: Study, backbone: str, one: Series, other: Series, removed: int, resamples: int = RESAMPLES
) -> Difference:
    """``one`` minus ``other`` at a depth, by a bootstrap over the items of each task.

    Both answered the same items, so the differences item by item are resampled. With several seeds an item counts with
    its mean over them.
    """
    ours, theirs = (items_of(study, backbone, series, removed) for series in (one, other))
    return compared(study, ours, theirs, resamples)


def compared(
    study: Study, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], resamples: int = RESAMPLES
) -> Difference:
    """``ours`` minus ``theirs``, items by task."""
    absent = [task for task in study.tasks if task not in ours or task not in theirs]
    if len(absent) == len(study.tasks):
        return Difference(note="not measured item by item")
    if absent:
        return Difference(note=f"no items of {', '.join(absent)}")
    if any(len(ours[task]) != len(theirs[task]) for task in study.tasks):
        return Difference(note="not the same items")
    return paired([ours[task] - theirs[task] for task in study.tasks], resamples)


def items_of(study: Study, backbone: str, series: Series, removed: int) -> dict[str, np.ndarray]:
    """By task the share of seeds that got each item right; tasks that any seed lacks are left out."""
    seeds: dict[str, list[np.ndarray]] = {}
    for record in study.of(Accuracy, backbone, series.path, removed):
        for task, score in record.scores.items() if record.seed in series.seeds else ():
            if score.items is not None:
                seeds.setdefault(task, []).append(np.frombuffer(score.items.encode(), np.uint8) - ord("0"))
    whole = {task: found for task, found in seeds.items() if len(found) == len(series.seeds)}
    return {task: np.mean(found, axis=0) for task, found in whole.items() if len({len(one) for one in found}) == 1}


def paired(groups: Sequence[np.ndarray], resamples: int = RESAMPLES, unit: float = 100) -> Difference:
    """The mean over tasks, or data sets, of mean differences, with interval and p.

    Args:
        groups: per task the difference at each item, (n,).
        resamples: of the items of every task.
        unit: how many of the difference's units are one of the items': 100 turns shares into percentage points.
    """
    found = estimate(groups, resamples)
    return Difference(unit * found.value, unit * found.low, unit * found.high, found.p, found.items)


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm, 1979): the chance of any false claim among them stays below the level."""
    adjusted = [1.0] * len(p)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """BUDDY's main recipe against another method, or its other recipe, at a depth."""

    backbone: str
    removed: int
    one: Series
    other: Series
    label: str
    found: Difference


def comparisons(study: Study) -> list[Comparison]:
    """BUDDY's main recipe against its other one and every other pruning method at every depth, with LoRA and without it
    apart."""
    main = study.config.study.main.recipe
    made = []
    for backbone in study.config.study.backbones:
        pruning = [one for one in study.compared(backbone) if one.depths != (0,)]
        labels = series_labels(pruning)
        ours = {one.lora: one for one in pruning if one.recipe == main}
        for removed in study.removed(backbone):
            for other in pruning:
                if other.recipe == main or other.lora not in ours or removed not in other.depths:
                    continue
                one = ours[other.lora]
                found = _at_depth(study, backbone, one, other, removed)
                made.append(Comparison(backbone, removed, one, other, labels[other.path], found))
    return made


def _at_depth(study: Study, backbone: str, one: Series, other: Series, removed: int) -> Difference:
    """The difference at the depth asked for, or where the other one ran another, at that; none where we have not measured
    around it."""
    ours, theirs = (measures.accuracy(study, backbone, series, removed)["average"] for series in (one, other))
    if not ours.off_depth and not theirs.off_depth:
        return difference(study, backbone, one, other, removed)
    ran = theirs.executed_mean if theirs.off_depth else ours.executed_mean
    there = None if ours.off_depth or ran is None else _interpolated(study, backbone, one, ran)
    if there is None or ran is None:
        return Difference(note=f"ran {ran or 0:.1f} of {study.blocks(backbone) - removed} blocks")
    return replace(compared(study, there, items_of(study, backbone, other, removed)), depth=ran)


def _interpolated(study: Study, backbone: str, series: Series, executed: float) -> dict[str, np.ndarray] | None:
    """A method's items by task at a mean depth between two at which it was measured; None outside of all such."""
    blocks = study.blocks(backbone)
    measured = {blocks - removed: items_of(study, backbone, series, removed) for removed in series.depths}
    known = [depth for depth, items in measured.items() if items]
    below = max((depth for depth in known if depth <= executed), default=None)
    above = min((depth for depth in known if depth >= executed), default=None)
    if below is None or above is None:
        return None
    share = (executed - below) / (above - below) if above > below else 0.0
    few, many = measured[below], measured[above]
    both = [task for task in few if task in many and len(few[task]) == len(many[task])]
    return {task: (1 - share) * few[task] + share * many[task] for task in both}


def significance(study: Study) -> Grid:
    """The table: BUDDY's main recipe minus each other method at each depth, with 95 % interval, p, and p corrected for all
    comparisons."""
    made = comparisons(study)
    ours = buddy_label(study.config.study.main.recipe)
    tested = [one for one in made if one.found.value is not None]
    corrected = dict(zip(map(id, tested), holm([one.found.p for one in tested]), strict=True))
    rows: list[Row] = []
    tidy: list[dict[str, Any]] = []
    for place, one in enumerate(made):
        p = corrected.get(id(one))
        starts = place == 0 or (made[place - 1].backbone, made[place - 1].removed) != (one.backbone, one.removed)
        rows.append(Row((one.backbone, str(one.removed), one.label), _cells(one, p), starts_group=starts))
        tidy.append(_record(study, one, p, len(tested)))
    return Grid(
        name="significance",
        caption=f"Average accuracy of {ours} minus that of each method at equal depth.",
        label_headers=("Backbone", "Removed", f"{ours} against"),
        headers=("Difference", "Low", "High", "p", "Holm's p", f"{ours} is"),
        rows=rows,
        tidy=tidy,
        notes=[
            f"Percentage points, averaged over {len(study.tasks)} tasks; 95 % intervals by a paired bootstrap over the "
            f"items that both answered ({RESAMPLES} resamples). They do not hold what another training would change.",
            *_met(made),
            f"{len(tested)} comparisons were made: Holm's p corrects for all of them, and the verdict needs it below "
            f"{LEVEL}.",
        ],
    )


def _met(made: Sequence[Comparison]) -> list[str]:
    """A note on methods that were met at another depth than the one asked for."""
    if all(one.found.depth is None for one in made):
        return []
    return [
        "A method that ran another mean depth than the one asked for is compared at the depth that it ran, item by item "
        "between the two measured depths around it."
    ]


def verdict(found: Difference, corrected: float | None) -> str:
    """What may be said of a difference, given its p value corrected for the number of comparisons."""
    if found.value is None or corrected is None:
        return found.note
    if corrected >= LEVEL or found.low <= 0 <= found.high:
        return UNCLEAR
    return BETTER if found.value > 0 else WORSE


def _cells(one: Comparison, corrected: float | None) -> list[Cell | None]:
    found = one.found
    said = Cell({}, Measure(note=""), text=verdict(found, corrected))
    if found.value is None:
        return [None] * 5 + [said]
    numbers = [(found.value, 2), (found.low, 2), (found.high, 2), (found.p, 4), (corrected, 4)]
    return [*(Cell({}, Measure(value=value, note=""), decimals=digits) for value, digits in numbers), said]


def _record(study: Study, one: Comparison, corrected: float | None, tested: int) -> dict[str, Any]:
    found = one.found
    known = found.value is not None
    return {
        **{"table": "significance", "study": study.name, "backbone": one.backbone, "removed": one.removed},
        **{"method": one.one.method, "recipe": one.one.recipe, "against": one.other.method},
        **{"against_recipe": one.other.recipe, "criterion": one.other.variant.get("criterion")},
        **{"lora": one.other.lora, "unit": "percentage points", "value": found.value},
        **{"low": found.low if known else None, "high": found.high if known else None, "p": found.p if known else None},
        **{
            "executed_mean": found.depth,
            "holm_p": corrected,
            "comparisons": tested,
            "n": found.items,
            "verdict": verdict(found, corrected),
        },
    }
