"""Likelihoods: every method at every depth; against the best static one; and BUDDY's variants.

Differences of a hundredth of a nat show with a few hundred items, where accuracy needs tens of thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buddy.methods import kind
from buddy.reporting.grid import Cell, Grid, Row, ran, rank_columns, rank_note
from buddy.reporting.labels import (
    DATASETS,
    coordinates,
    either,
    one_path,
    provenance,
    series_labels,
    trained_by,
    variant_labels,
)
from buddy.reporting.measured import LIKELIHOODS, Likelihood, Texts
from buddy.reporting.measures import DEPTH_TOLERANCE, Measure
from buddy.reporting.significance import LEVEL, Difference, holm, paired, verdict
from buddy.reporting.study import Series, Study
from buddy.resampling import INTERVAL_RESAMPLES, RESAMPLES, Estimate, estimate
from buddy.study.settings import Table

HEADERS = {"nll": "NLL", "kl": "KL", "agreement": "Agreement"}
DIGITS = {"nll": 3, "kl": 3, "agreement": 1}
MODES = {"recompute": "a route for each token, as decoding chooses it", "reuse": "the prompt's route kept"}


Array = NDArray[np.float64]

MEASURES = LIKELIHOODS
UNITS = {"nll": "nats per token", "kl": "nats per token", "agreement": "%"}
SCALES = {"nll": 1.0, "kl": 1.0, "agreement": 100.0}
"""How many of a measure's unit in tables are 1 in the records."""
AVERAGE = "average"
"""Stands for all data sets, each counting alike."""


class Mode(NamedTuple):
    """How responses were routed: K/V of skipped blocks, and ``recompute`` or ``reuse``."""

    kv: str
    decode: str


def main_mode(study: Study) -> Mode:
    """The mode that tables show: the first of each in the study."""
    settings = study.config.likelihood
    return Mode(settings.kv[0], settings.decode[0])


@dataclass(frozen=True)
class Scored:
    """What was measured of a series at a depth in a mode.

    Attributes:
        values: by measure and data set, the value of each item, (n,), the mean over seeds.
        texts: by data set, what the first seed's record says: which rows, how many tokens.
        max_length: tokens that an item may have.
        means: by measure the average over the data sets, seed by seed, in the unit of `UNITS`.
        paths: distinct paths over all tokens, seed by seed.
        executed: mean number of blocks that ran.
        off_depth: whether that misses the depth asked for, with any seed.
    """

    values: Mapping[str, Mapping[str, Array]]
    texts: Mapping[str, Texts]
    max_length: int
    means: Mapping[str, Sequence[float]]
    paths: Sequence[int]
    executed: float
    off_depth: bool

    @property
    def seeds(self) -> int:
        """Number of seeds behind it."""
        return len(self.paths)

    def estimate(self, measure: str, dataset: str = AVERAGE) -> Estimate:
        """A measure's mean with its interval, in the unit of `UNITS`; of a data set, or the average of all."""
        groups = self.values[measure]
        scale = SCALES[measure]
        return estimate(
            [scale * values for name, values in groups.items() if dataset in (AVERAGE, name)], INTERVAL_RESAMPLES
        )


def scored(study: Study, backbone: str, series: Series, removed: int, mode: Mode) -> Scored | None:
    """What the records have of it; None where no seed has all data sets of the study. Seeds on other items than the first
    one's are left out."""
    names: list[str] = [*study.config.likelihood.datasets]
    records = [one for one in study.of(Likelihood, backbone, series.path, removed) if (one.kv, one.decode) == mode]
    by_seed = {one.seed: one for one in records if {*names} <= one.datasets.keys()}
    seeds = [by_seed[seed] for seed in series.seeds if seed in by_seed]
    if not seeds:
        return None
    first = seeds[0]
    seeds = [one for one in seeds if all(one.datasets[name].sha256 == first.datasets[name].sha256 for name in names)]
    items = {
        measure: {name: np.array([one.datasets[name].figures[measure].values for one in seeds]) for name in names}
        for measure in MEASURES
    }  # (seeds, n) each
    asked = study.blocks(backbone) - removed
    return Scored(
        values={measure: {name: each.mean(0) for name, each in found.items()} for measure, found in items.items()},
        texts={name: first.datasets[name] for name in names},
        max_length=first.max_length,
        means={
            measure: [
                SCALES[measure] * float(mean) for mean in np.mean([each.mean(1) for each in found.values()], axis=0)
            ]
            for measure, found in items.items()
        },
        paths=[int(one.paths) for one in seeds],
        executed=float(np.mean([one.executed_mean for one in seeds])),
        off_depth=any(abs(one.executed_mean - asked) > DEPTH_TOLERANCE for one in seeds),
    )


def difference(one: Scored | None, other: Scored | None, measure: str, dataset: str = AVERAGE) -> Difference:
    """``one`` minus ``other`` on the same items, by a paired bootstrap over the items of each data set.

    Args:
        one, other: of the same backbone and depth; None was not measured.
        measure: one of `MEASURES`; the difference is in the unit of `UNITS`.
        dataset: a data set, or the average of all.
    """
    if one is None or other is None:
        return Difference(note="not measured")
    off = [found for found in (one, other) if found.off_depth]
    if off:
        return Difference(note=f"ran {off[0].executed:.1f} blocks")
    if any(found.sha256 != other.texts[name].sha256 for name, found in one.texts.items()):
        return Difference(note="not the same items")
    groups = [
        values - other.values[measure][name]
        for name, values in one.values[measure].items()
        if dataset in (AVERAGE, name)
    ]
    tested = measure == "nll" and dataset == AVERAGE
    return paired(groups, RESAMPLES if tested else INTERVAL_RESAMPLES, SCALES[measure])


@dataclass(frozen=True)
class Pair:
    """Two that are compared at a depth: what the row is called, what it is compared with, and both measurements."""

    backbone: str
    removed: int
    series: Series
    label: str
    against: str
    mode: Mode
    one: Scored | None
    other: Scored | None


def likelihood(study: Study, name: str, table: Table) -> Grid:
    """Rows: dense, then at each depth every method; columns: NLL and KL per token, agreement, distinct paths. Below: every
    method minus the best static one, and BUDDY's variants minus its main one."""
    backbones = [table.backbone] if table.backbone else study.config.scored_backbones()
    grid = _methods(study, name, backbones)
    against_static = _differences(
        study, f"{name}_differences", _against_static(study, backbones), "Each method minus the best static one"
    )
    variants = _differences(
        study, f"{name}_variants", _variants(study, backbones), "BUDDY's variants minus its main one"
    )
    parts = [part for part in (against_static, variants) if part.rows]
    grid.tidy = [*(grid.tidy or []), *(row for part in parts for row in part.tidy or [])]
    last = grid
    for part in parts:
        last.below = last = part
    return grid


# ---- every method ----------------------------------------------------------------------------------------------------


def _methods(study: Study, name: str, backbones: Sequence[str]) -> Grid:
    mode = main_mode(study)
    rows: list[Row] = []
    tidy: list[dict[str, Any]] = []
    shown: list[Series] = []
    measured: list[Scored] = []
    for backbone in backbones:
        compared = study.compared(backbone)
        label = series_labels(compared)
        shown += compared
        for removed in [0, *study.removed(backbone)]:
            at_depth = [one for one in compared if removed in one.depths]
            found = [scored(study, backbone, one, removed, mode) for one in at_depth]
            group = [
                _row(backbone, removed, label[one.path], one, what, len(backbones) > 1)
                for one, what in zip(at_depth, found, strict=True)
            ]
            if removed:
                rank_columns(group, at_depth, lowest=[measure != "agreement" for measure in MEASURES])
            for row in group[:1]:
                row.starts_group = True
            rows += group
            measured += [one for one in found if one is not None]
            for one, what in zip(at_depth, found, strict=True):
                tidy += _records(coordinates(study, name, backbone, one, removed), mode, what)
    return Grid(
        name=name,
        caption="Likelihood of held-out text with blocks removed, and how near the models stay to the whole one.",
        label_headers=("Backbone", "Removed", "Method")[0 if len(backbones) > 1 else 1 :],
        headers=(*HEADERS.values(), "Paths"),
        rows=rows,
        error_note="± half of the 95 % interval, by a bootstrap over the items of each data set.",
        latex_errors=frozenset({0}),
        tidy=tidy,
        notes=[
            _items(measured),
            "NLL: minus the log-probability of the text's tokens. KL: divergence from the next-token distributions of the "
            "backbone at full depth without LoRA; agreement: percent of the tokens at which both would choose the same one. "
            "NLL and KL in nats, means over tokens, then items, then data sets. Paths: distinct routes over all tokens.",
            f"Responses were scored with {MODES[mode.decode]}, K/V of skipped blocks: {mode.kv}.",
            *rank_note(rows, shown),
            *trained_by(study, shown),
            *(note for backbone in backbones for note in one_path(study, backbone, study.compared(backbone))),
            *provenance(study, "likelihood", *backbones),
        ],
    )


def _row(backbone: str, removed: int, label: str, series: Series, found: Scored | None, several: bool) -> Row:
    """One method at one depth."""
    measures = [_measure(found, measure, len(series.seeds)) for measure in MEASURES]
    cells: list[Cell | None] = [
        Cell({}, one, decimals=DIGITS[name]) for name, one in zip(MEASURES, measures, strict=True)
    ]
    paths = Measure() if found is None else Measure(value=float(np.mean(found.paths)), note="")
    cells.append(Cell({}, paths, decimals=0))
    labels = (str(removed), label + ran(measures if found is not None else []))
    return Row((backbone, *labels) if several else labels, cells)


def _measure(found: Scored | None, measure: str, seeds: int) -> Measure:
    """A measure with half of its interval as its error."""
    if found is None:
        return Measure()
    average = found.estimate(measure)
    return Measure(
        value=average.value,
        stderr=(average.high - average.low) / 2,
        n=average.items,
        seeds=found.seeds,
        executed_mean=found.executed,
        off_depth=found.off_depth,
        samples=tuple(SCALES[measure] * each for each in found.values[measure].values()),
        note="" if found.seeds >= seeds else f"{found.seeds} of {seeds} seeds",
    )


def _items(measured: Sequence[Scored]) -> str:
    """Which items were scored, and how many."""
    if not measured:
        return "Nothing was scored yet."
    sets: dict[str, set[tuple[str, int, int]]] = {}
    for found in measured:
        for name, texts in found.texts.items():
            sets.setdefault(name, set()).add((texts.rows, len(found.values["nll"][name]), texts.tokens))
    told = "; ".join(
        f"{DATASETS.get(name, name)}: {' or '.join(_counted(*one) for one in sorted(found))}"
        for name, found in sets.items()
    )
    longest = either(found.max_length for found in measured)
    return f"Items of up to {longest} tokens, prompt included. {told}."


def _counted(rows: str, items: int, tokens: int) -> str:
    return f"{items} of the {rows} ({tokens} tokens scored)"


def _records(at: Mapping[str, Any], mode: Mode, found: Scored | None) -> list[dict[str, Any]]:
    """Rows of the CSV: each measure of each data set and of all, and the paths."""
    at = {**at, **mode._asdict()}
    if found is None:
        return [{**at, "dataset": AVERAGE, "metric": measure, "note": "not measured"} for measure in MEASURES]
    told = {"seeds": found.seeds, "executed_mean": found.executed}
    rows: list[dict[str, Any]] = []
    for measure in MEASURES:
        for dataset in (AVERAGE, *found.values[measure]):
            one = found.estimate(measure, dataset)
            which = (
                {} if dataset == AVERAGE else {"rows": found.texts[dataset].rows, "tokens": found.texts[dataset].tokens}
            )
            where = {**at, "dataset": dataset, "metric": measure, "unit": UNITS[measure], **which}
            rows.append({**where, "value": one.value, "low": one.low, "high": one.high, "n": one.items, **told})
            if dataset == AVERAGE and found.seeds > 1:
                rows[-1]["seed_sd"] = float(np.std(found.means[measure], ddof=1))
    paths = float(np.mean(found.paths))
    return [*rows, {**at, "dataset": AVERAGE, "metric": "distinct_paths", "unit": "paths", "value": paths, **told}]


# ---- comparisons -----------------------------------------------------------------------------------------------------


def _against_static(study: Study, backbones: Iterable[str]) -> list[Pair]:
    """Every pruning method at every depth against the static one of the lowest NLL there, with and without LoRA apart."""
    mode, pairs = main_mode(study), []
    for backbone in backbones:
        pruning = [one for one in study.compared(backbone) if one.depths != (0,)]
        label = series_labels(pruning)
        for removed in study.removed(backbone):
            found = {one.path: scored(study, backbone, one, removed, mode) for one in pruning if removed in one.depths}
            for lora in ("trained", "none"):
                group = [one for one in pruning if one.lora == lora and one.path in found]
                best = _best_static(group, found)
                if best is not None:
                    pairs += [
                        Pair(
                            backbone,
                            removed,
                            one,
                            label[one.path],
                            label[best.path],
                            mode,
                            found[one.path],
                            found[best.path],
                        )
                        for one in group
                        if one is not best
                    ]
    return pairs


def _best_static(group: Iterable[Series], found: Mapping[str, Scored | None]) -> Series | None:
    """The static method of the lowest average NLL; None where none was measured."""
    nll: dict[str, float] = {}
    static = [one for one in group if kind(one.method) == "static"]
    for one in static:
        what = found[one.path]
        if what is not None:
            nll[one.path] = what.estimate("nll").value
    return min((one for one in static if one.path in nll), key=lambda one: nll[one.path], default=None)


def _variants(study: Study, backbones: Iterable[str]) -> list[Pair]:
    """BUDDY's main run in its other modes, and the variants of ablations, against the main run as the tables show it.

    A variant by another recipe of the router stands against that recipe's run, and only that one against the main run.
    """
    if "buddy" not in study.config.study.methods:
        return []
    mode, settings, pairs = main_mode(study), study.config.likelihood, []
    every = [Mode(kv, decode) for kv in settings.kv for decode in settings.decode]
    for backbone in backbones:
        main = study.main(backbone)
        variants = _ablated(study, backbone, main)
        bases = {recipe: study.main(backbone, recipe) for recipe in study.config.study.compared_recipes()}
        label = variant_labels(list({one.path: one for one in (*bases.values(), *variants)}.values()))
        told = [(main, f"K/V {own.kv}, {own.decode}", own, main) for own in every if own != mode]
        for one in variants:
            base = next((base for recipe, base in bases.items() if recipe == one.recipe), main)
            told.append((one, label[one.path], mode, main if one.path == base.path else base))
        for removed in study.removed(backbone):
            for series, text, own, base in told:
                found = [scored(study, backbone, *what) for what in ((series, removed, own), (base, removed, mode))]
                pairs.append(Pair(backbone, removed, series, text, label[base.path], own, *found))
    return pairs


def _ablated(study: Study, backbone: str, main: Series) -> list[Series]:
    """The variants of all ablations on a backbone, each once, without the main one."""
    names = [one.name for one in study.config.study.ablations if one.backbone == backbone]
    found = {one.path: one for name in names for one in study.ablation_rows(name) if one.path != main.path}
    return list(found.values())


def _differences(study: Study, name: str, pairs: Sequence[Pair], what: str) -> Grid:
    """A table of differences on the same items; p values are those of the NLL."""
    found = [{measure: difference(one.one, one.other, measure) for measure in MEASURES} for one in pairs]
    tested = [place for place, one in enumerate(found) if one["nll"].value is not None]
    corrected = dict(zip(tested, holm([found[place]["nll"].p for place in tested]), strict=True))
    rows: list[Row] = []
    tidy: list[dict[str, Any]] = []
    several = len({one.backbone for one in pairs}) > 1
    for place, (pair, differences) in enumerate(zip(pairs, found, strict=True)):
        before = pairs[place - 1] if place else None
        starts = before is None or (before.backbone, before.removed) != (pair.backbone, pair.removed)
        labels = (str(pair.removed), pair.label, pair.against)
        cells = _cells(differences, corrected.get(place))
        rows.append(Row((pair.backbone, *labels) if several else labels, cells, starts_group=starts))
        tidy += _difference_records(study, name, pair, differences, corrected.get(place), len(tested))
    return Grid(
        name=name,
        caption=f"{what} at equal depth, on the same items.",
        label_headers=("Backbone", "Removed", "Method", "Minus")[0 if several else 1 :],
        headers=("NLL", "Low", "High", "Holm's p", "KL", "Agreement", "NLL is"),
        rows=rows,
        tidy=tidy,
        notes=[
            "NLL and KL in nats per token, agreement in percentage points; 95 % intervals by a paired bootstrap over the "
            f"items of each data set ({RESAMPLES} resamples of the NLL). They do not hold what another training would "
            "change, nor that the best static method was chosen on these items. The CSV has the intervals of all measures, "
            "and of each data set.",
            f"{len(tested)} comparisons were made: Holm's p corrects for all of them, and the verdict needs it below {LEVEL}.",
        ],
    )


def _cells(differences: Mapping[str, Difference], corrected: float | None) -> list[Cell | None]:
    nll = differences["nll"]
    said = Cell({}, Measure(note=""), text=verdict(nll, corrected))
    if nll.value is None:
        return [None] * 6 + [said]
    numbers = [(nll.value, 4), (nll.low, 4), (nll.high, 4), (corrected, 4)]
    numbers += [(differences["kl"].value, 4), (differences["agreement"].value, 2)]
    return [*(Cell({}, Measure(value=value, note=""), decimals=digits) for value, digits in numbers), said]


def _difference_records(
    study: Study, name: str, pair: Pair, differences: Mapping[str, Difference], corrected: float | None, tested: int
) -> list[dict[str, Any]]:
    """Rows of the CSV: the difference of each measure, of each data set and of all."""
    at = {**coordinates(study, name, pair.backbone, pair.series, pair.removed), **pair.mode._asdict()}
    at |= {"label": pair.label, "against": pair.against}
    rows = []
    for measure in MEASURES:
        average = differences[measure]
        sets = [] if average.value is None or pair.one is None else [*pair.one.values[measure]]
        for dataset in (AVERAGE, *sets):
            found = average if dataset == AVERAGE else difference(pair.one, pair.other, measure, dataset)
            known = found.value is not None
            unit = "percentage points" if measure == "agreement" else UNITS[measure]
            rows.append({**at, "dataset": dataset, "metric": measure, "unit": unit, "value": found.value})
            rows[-1] |= {name: getattr(found, name) if known else None for name in ("low", "high", "p")}
            rows[-1] |= {"n": found.items, "note": found.note}
            if measure == "nll" and dataset == AVERAGE:
                rows[-1] |= {"holm_p": corrected, "comparisons": tested, "verdict": verdict(found, corrected)}
    return rows
