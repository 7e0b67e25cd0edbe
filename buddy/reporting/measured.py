"""What records say, typed: a dataclass per kind of record that tables and figures show, and what its figures can be.

A record edited by hand, or made wrongly, is left out and not drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from buddy.errors import UserError
from buddy.study.config import UNSAID
from buddy.study.records import Budget, Record, find
from buddy.tasks import headline

log = logging.getLogger(__name__)

AUTO = "auto"
"""Execution of a profiled pass whose depths the budget predictor chose."""
ITEMS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        value: in the unit of the record: accuracies, ROUGE and agreement are fractions.
        stderr: its standard error, where the record has one.
        low, high: 10th and 90th percentile of timed passes and traced prompts, the 95 % interval of ROUGE and likelihoods.
        values: the single passes, prompts or items, where the record has them.
        n: number of items, passes or prompts.
    """

    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()
    n: int = 0


class Limits(NamedTuple):
    """Smallest and largest value that something can have."""

    low: float = -math.inf
    high: float = math.inf

    def check(self, name: str, *values: float | None) -> None:
        """Refuse a value that nothing measured can have given.

        Raises:
            UserError: one is not finite, or out of range.
        """
        for value in values:
            if value is not None and not (math.isfinite(value) and self.low <= value <= self.high):
                raise UserError(f"{name}: {value:g} is not {self}")

    def __str__(self) -> str:
        if math.isinf(self.high):
            return "a number" if math.isinf(self.low) else f"a number from {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


ANY = Limits()
FRACTION = Limits(0.0, 1.0)
NOT_NEGATIVE = Limits(0.0)
PERCENT = Limits(0.0, 100.0 + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a record of any kind says.

    Attributes:
        file, kind: where it was read, and what was measured.
        series: the run without its backbone, its seed and (of a peer) its depth, as in its path.
        backbone, method, variant, seed: which cell of the study; BUDDY's variant has every axis.
        executed, removed: numbers of blocks; None where no depth applies, or a budget predictor set it.
        device, dtype, commit, wall_s, gpu_s: how it was measured.
        n: number of items, samples or repeats.
    """

    file: str
    kind: str
    series: str
    backbone: str
    method: str
    variant: Mapping[str, Any]
    seed: int
    executed: int | None
    removed: int | None
    device: str | None
    dtype: str | None
    commit: str
    wall_s: float
    gpu_s: float
    n: int

    @classmethod
    def of(cls, record: Record, file: str, levels: Mapping[str, str], series: str) -> Self:
        """A record's content; ``levels`` are the ``axis~value`` of its path.

        Raises:
            UserError: a figure is not finite or out of range, a standard error is negative, a count is none, or a score is
                not that of its items.
            KeyError, TypeError, ValueError, AttributeError, ArithmeticError: it lacks what its kind has.
        """
        budget = record.budget
        head = {
            **{name: getattr(record, name) for name in ("kind", "backbone", "method", "seed", "commit")},
            **{name: getattr(record, name) for name in ("wall_s", "gpu_s", "n")},
            "variant": {**UNSAID, **record.variant} if record.method == "buddy" else record.variant,
            **{name: record.environment.get(name) for name in ("device", "dtype")},
            "executed": budget.executed if budget else None,
            "removed": budget.removed if budget else None,
        }
        return cls(**{**head, **cls._fields(record, levels)}, file=file, series=series)

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        """The fields that its kind has beside those of every kind."""
        for name, value in record.metrics.items():
            if isinstance(value, int | float):
                ANY.check(name, value)
        return {}


@dataclass(frozen=True, kw_only=True)
class Score(Figure):
    """One task's headline accuracy (`buddy.tasks`), or its share of exact matches.

    Attributes:
        items: one digit per item, 1 where it was right; None where the record has none.
        executed_mean: number of blocks that really ran.
    """

    items: str | None
    executed_mean: float | None


@dataclass(frozen=True, kw_only=True)
class Accuracy(Measured):
    """Scores by task; with a ``preset`` there is no budget: the budget predictor set it for each input."""

    preset: str | None
    limit: int | None
    scores: Mapping[str, Score]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        metrics, preset = record.metrics, record.variant.get("preset")
        if preset is None:
            _budget(record)
        scores = {task: _score(task, found, metrics) for task, found in metrics["tasks"].items()}
        return {"preset": preset, "limit": metrics.get("limit"), "scores": scores}


def _score(task: str, found: Mapping[str, Any], metrics: Mapping[str, Any]) -> Score:
    metric = headline(task, found)
    value, n, items = float(found[metric]), int(found["n"]), (found.get("items") or {}).get(metric)
    stderr = _error(metric, found.get(f"{metric}_stderr"))
    FRACTION.check(metric, value)
    _count(metric, n)
    _check_items(metric, items, n, value)
    executed = found.get("executed_mean", metrics.get("executed_mean"))
    return Score(value=value, stderr=stderr, n=n, items=items, executed_mean=executed)


def _check_items(metric: str, items: str | None, n: int, value: float) -> None:
    """Refuse items that are not those of a score; a record may have none."""
    if items:
        if set(items) - {"0", "1"} or len(items) != n:
            raise UserError(f"{metric}: its items are not {n} digits 0 or 1")
        if abs(items.count("1") / len(items) - value) > ITEMS_TOLERANCE:
            raise UserError(f"{metric}: {value:g}, but {items.count('1')} of its {len(items)} items are right")


@dataclass(frozen=True, kw_only=True)
class Generation(Measured):
    """Shares of exact matches by task and filter (the way an answer is found in the text), and which items were right; with
    a ``preset`` there is no budget: the budget predictor set it for each input."""

    preset: str | None
    limit: int | None
    few_shot: int | None
    new_tokens: int
    executed_mean: float | None
    answers: Mapping[tuple[str, str], Score]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        metrics, preset = record.metrics, record.variant.get("preset")
        if preset is None:
            _budget(record)
        answers = {}
        for task, scores in metrics["tasks"].items():
            errors = scores.get("exact_match_stderr") or {}
            _count("exact_match", int(scores["n"]))
            for name, value in scores["exact_match"].items():
                FRACTION.check("exact_match", float(value))
                error = _error("exact_match", errors.get(name))
                items = (scores.get("items") or {}).get(name)
                _check_items("exact_match", items, int(scores["n"]), float(value))
                answers[task, name] = Score(
                    value=float(value),
                    stderr=error,
                    n=int(scores["n"]),
                    items=items,
                    executed_mean=metrics.get("executed_mean"),
                )
        told = {"preset": preset} | {
            name: metrics.get(name) for name in ("limit", "few_shot", "new_tokens", "executed_mean")
        }
        return {**told, "answers": answers}


class Example(NamedTuple):
    """One generation: its prompt, the text of each new token, and the route (L,) of the pass that gave it."""

    prompt: str
    tokens: tuple[str, ...]
    routes: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Trace(Measured):
    """What sums up the paths of all prompts; ``block_frequency`` is the share of passes in which each block ran;
    ``example`` is the first prompt's generation, None in records that were written without one."""

    dataset: str
    executed_mean: float
    prompts: int
    new_tokens: int
    figures: Mapping[str, Figure]
    block_frequency: tuple[float, ...]
    example: Example | None

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        _budget(record)
        metrics = record.metrics
        found = {name: float(metrics[name]) for name in _TRACED if metrics.get(name) is not None}
        figures = {name: Figure(value, n=record.n) for name, value in found.items()}
        paths = "distinct_paths_per_generation"
        figures[paths] = _spread(paths, metrics[paths], record.n, of="mean")
        for name, value in found.items():
            NOT_NEGATIVE.check(name, value)
        frequency = tuple(map(float, metrics["block_frequency"]))
        FRACTION.check("block_frequency", sum(frequency) / len(frequency))
        return {
            **{name: int(metrics[name]) for name in ("prompts", "new_tokens")},
            **{"dataset": metrics["dataset"], "executed_mean": float(metrics["executed_mean"])},
            **{"figures": figures, "block_frequency": frequency},
            "example": _example(metrics.get("example"), len(frequency)),
        }


def _example(told: Mapping[str, Any] | None, blocks: int) -> Example | None:
    if told is None:
        return None
    routes = tuple(tuple(digit == "1" for digit in route) for route in told["routes"])
    if len(routes) != len(told["tokens"]) or {len(route) for route in routes} != {blocks}:
        raise ValueError(f"example: not a route of {blocks} blocks for each of its tokens")
    return Example(str(told["prompt"]), tuple(map(str, told["tokens"])), routes)


_TRACED = (
    *("executed_mean", "executed_min", "executed_max", "largest_deviation"),
    *("distinct_paths_over_prompts", "changed_steps_mean"),
)


@dataclass(frozen=True, kw_only=True)
class Latency(Measured):
    """Rates, and ratios, bandwidth, memory and capture figures where there are some, by metric.

    Of a batch of mixed budgets ``removed`` is the mean and ``removed_per_sequence`` says each one's; ``slack`` is the bound on
    what a step of a batch called, where one was asked for.
    """

    dataset: str
    engine: str
    execution: str
    batch_size: int
    prompts: int
    new_tokens: int
    slack: int | None
    removed_per_sequence: tuple[int, ...] | None
    executed_mean: float | None
    figures: Mapping[str, Figure]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        _budget(record)
        metrics = record.metrics
        _count("prefill_tok_s", passes := int(metrics["repeats"]))
        figures = {name: _spread(name, metrics[name], passes) for name in _RATES}
        figures |= {name: _spread(name, metrics[name], passes) for name in _RATIOS if metrics.get(name) is not None}
        numbers = {name: metrics[name] for name in _NUMBERS if metrics.get(name) is not None}
        numbers |= {f"capture_{name}": value for name, value in (metrics.get("capture") or {}).items()}
        for name, value in numbers.items():
            NOT_NEGATIVE.check(name, float(value))
            figures[name] = Figure(float(value), n=passes)
        return {
            **{name: metrics[name] for name in ("dataset", "engine", "execution")},
            **{name: int(metrics[name]) for name in ("batch_size", "prompts", "new_tokens")},
            **{name: metrics.get(name) for name in ("slack", "executed_mean")},
            "removed_per_sequence": tuple(metrics.get("removed_per_sequence") or ()) or None,
            "figures": figures,
        }


_RATES = ("prefill_tok_s", "decode_tok_s")
_RATIOS = (
    *(f"{phase}_{of}" for of in ("speedup", "of_sliced", "of_ideal") for phase in ("prefill", "decode")),
    *("decode_of_called", "total_of_ideal"),
)
_NUMBERS = ("called_mean", "paths_mean", "decode_gb_s", "copy_gb_s", "peak_memory_mb")

Parts = Mapping[tuple[str, str, str], Figure]
"""Figures by phase, component and unit (``ms`` or ``percent``), the total among the components, with the profiler and
without."""


@dataclass(frozen=True, kw_only=True)
class Breakdown(Measured):
    """What passes spend, and by length of context what routing a step costs; ``auto`` is where the budget predictor chose
    the depths, ``auto_executed`` on average."""

    batch_size: int
    tokens: int
    steps: int
    parts: Parts
    auto: Parts
    auto_executed: float
    contexts: Mapping[int, Mapping[str, Figure]]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        _budget(record)
        metrics, predicted = record.metrics, record.metrics.get("auto") or {"executed_mean": 0, "phases": {}}
        return {
            **{name: int(metrics[name]) for name in ("batch_size", "tokens", "steps")},
            "parts": _parts(metrics["phases"], record.n),
            "auto": _parts(predicted["phases"], record.n),
            "auto_executed": float(predicted["executed_mean"]),
            "contexts": {
                int(at["context"]): {name: _spread(name, at[name], record.n) for name in ("routing_ms", "reread_ms")}
                for at in metrics["contexts"]
            },
        }


def _parts(phases: Mapping[str, Any], n: int) -> Parts:
    found = {}
    for phase, spent in phases.items():
        totals = {"total": {"ms": spent["total_ms"]}, "unprofiled": {"ms": spent["unprofiled_ms"]}}
        for component, figures in (spent["components"] | totals).items():
            for unit, value in figures.items():
                (PERCENT if unit == "percent" else NOT_NEGATIVE).check(unit, float(value))
                found[phase, component, unit] = Figure(float(value), n=n)
    return found


@dataclass(frozen=True, kw_only=True)
class Importance(Measured):
    """The importance of each block in each window, (N, L); ``corpus`` and ``length`` are those that its path names: None is
    the study's own."""

    indicator: str
    corpus: str | None
    length: int | None
    windows: tuple[tuple[float, ...], ...]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        windows = tuple(tuple(map(float, window)) for window in record.metrics["per_sample"])
        if not windows or len({len(window) for window in windows}) != 1:
            raise ValueError("per_sample is not (windows, blocks)")
        length = int(levels["length"]) if "length" in levels else None
        at = {"indicator": record.metrics["indicator"], "corpus": levels.get("corpus"), "length": length}
        return {**at, "windows": windows, "n": len(windows)}


@dataclass(frozen=True, kw_only=True)
class Rouge(Measured):
    """ROUGE by measure (``rouge1``, ``rougeL``), with its interval."""

    dataset: str | None
    decode: str | None
    figures: Mapping[str, Figure]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        _budget(record)
        at = {name: record.metrics.get(name, levels.get(name)) for name in ("dataset", "decode")}
        figures = {name: _interval(name, record.metrics[name], FRACTION, n=record.n) for name in ("rouge1", "rougeL")}
        return {**at, "figures": figures}


@dataclass(frozen=True)
class Texts:
    """Likelihoods of one data set: which items they are, how many tokens, and a figure per measure with its values item by
    item."""

    rows: str
    sha256: str
    tokens: int
    figures: Mapping[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Likelihood(Measured):
    """Likelihoods by data set, and how many distinct paths there were over all tokens."""

    kv: str
    decode: str
    executed_mean: float
    max_length: int
    paths: float
    datasets: Mapping[str, Texts]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        _budget(record)
        metrics = record.metrics
        return {
            **{name: metrics[name] for name in ("kv", "decode")},
            "executed_mean": float(metrics["executed_mean"]),
            "max_length": int(metrics["max_length"]),
            "paths": float(metrics["distinct_paths"]),
            "datasets": {name: _texts(name, scored) for name, scored in metrics["datasets"].items()},
        }


LIKELIHOODS = ("nll", "kl", "agreement")


def _texts(name: str, scored: Mapping[str, Any]) -> Texts:
    n = int(scored["n"])
    figures = {}
    for measure in LIKELIHOODS:
        values = tuple(map(float, scored[measure]["values"]))
        if len(values) != n:
            raise ValueError(f"{name}: {len(values)} values of {measure} for {n} items")
        figures[measure] = _interval(measure, scored[measure], ANY, values, n)
    return Texts(scored["rows"], scored["sha256"], sum(scored["tokens"]), figures)


Points = Sequence[Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Predicted(Measured):
    """What a budget predictor is worth on a data set (`buddy.evaluation`): depths it may choose and how often it did, at its
    ``price``; points of constant depths, their lower hull, the oracle and the predictor; and its gain. ``loss`` is what they
    are of: ``ce``, or ``kl`` of a predictor that has its own."""

    preset: str | None
    loss: str
    dataset: str | None
    blocks: int
    choices: Sequence[int]
    histogram: Sequence[int]
    price: float | None
    constants: Points
    hull: Points
    oracle: Points
    predictor: Points
    gain: Mapping[str, float]

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        absent = [name for name in _PREDICTED if name not in record.metrics]
        if absent:
            raise ValueError(f"no {', '.join(absent)}")
        at = {name: record.metrics.get(name, levels.get(name)) for name in ("preset", "dataset")}
        at["loss"] = record.metrics.get("loss", "ce")
        return {**super()._fields(record, levels), **at, **{name: record.metrics[name] for name in _PREDICTED}}


_PREDICTED = ("blocks", "choices", "histogram", "price", "constants", "hull", "predictor", "oracle", "gain")


class Probes(NamedTuple):
    """Distinct paths that a router ends on, over how many probe prompts, with how many blocks removed."""

    paths: float
    prompts: int
    removed: int


Curve = Mapping[str, tuple[tuple[float, float], ...]]
"""Every logged figure as its (step, value) pairs."""


@dataclass(frozen=True, kw_only=True)
class Training(Measured):
    """A training: of a run, with the probes of its router; with a ``preset`` of its budget predictor, with its curve and the
    entropy of the policy that picks every depth equally often. ``shared_s`` are seconds of a training that serves the runs of
    all depths (FiRST's gates), and are not among its own."""

    shared_s: float
    preset: str | None
    probes: Probes | None
    curve: Curve
    entropy_uniform: float

    @classmethod
    def _fields(cls, record: Record, levels: Mapping[str, str]) -> dict[str, Any]:
        metrics = record.metrics
        preset, probed = metrics.get("preset"), metrics.get("probes")
        probes = (
            Probes(float(probed["last"]["paths"]), int(probed["prompts"]), int(probed["removed"])) if probed else None
        )
        uniform = 0.0 if preset is None else float(metrics["entropy_uniform"])
        curve = {} if preset is None else _curve(metrics["curve"])
        shared = metrics.get("gates", {})
        spent = float(shared.get("gpu_s", 0) or shared.get("wall_s", 0))
        told = {"shared_s": spent, "preset": preset, "probes": probes, "curve": curve, "entropy_uniform": uniform}
        return {**super()._fields(record, levels), **told}


def _curve(points: Sequence[Mapping[str, Any]]) -> Curve:
    found: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, value in point.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((float(point["step"]), float(value)))
    return {name: tuple(pairs) for name, pairs in found.items()}


def _budget(record: Record) -> Budget:
    if record.budget is None:
        raise ValueError("no budget")
    return record.budget


def _count(name: str, n: int) -> None:
    if n < 1:
        raise UserError(f"{name}: of {n} items")


def _error(name: str, value: Any) -> float | None:
    """A standard error, or None for what the harness writes where it has none (null, "N/A")."""
    if not isinstance(value, int | float):
        return None
    if not 0 <= value < math.inf:
        raise UserError(f"{name}: its standard error {value:g} is not {NOT_NEGATIVE}")
    return float(value)


def _spread(name: str, measured: Mapping[str, Any], n: int, of: str = "median") -> Figure:
    """Median, or what ``of`` names, 10th and 90th percentile, and the single passes."""
    value, low, high = (float(measured[which]) for which in (of, "p10", "p90"))
    NOT_NEGATIVE.check(name, value)
    return Figure(value, None, low, high, tuple(map(float, measured["values"])), n)


def _interval(
    name: str, found: Mapping[str, Any], limits: Limits, values: tuple[float, ...] = (), n: int = 0
) -> Figure:
    """A mean with its interval."""
    limits.check(name, float(found["mean"]))
    return Figure(float(found["mean"]), None, float(found["low"]), float(found["high"]), values, n)


KINDS: dict[str, type[Measured]] = {
    "accuracy": Accuracy,
    "generation": Generation,
    "trace": Trace,
    "latency": Latency,
    "breakdown": Breakdown,
    "importance": Importance,
    "rouge": Rouge,
    "likelihood": Likelihood,
    "budget": Predicted,
    "training": Training,
}
"""What records of each kind say; of another kind nothing is shown."""


def load(folder: str | Path) -> tuple[list[Measured], dict[str, str]]:
    """Read every record in a folder.

    A record that is damaged, incomplete, impossible, or of an older or newer form is named in a warning and left out: one
    such file never stops the others.

    Args:
        folder: the folder of records, as `buddy.study.layout.records_folder` finds it.

    Returns:
        The records in the order of their paths; and what was left out: the reason by the file's path below the folder.
    """
    found: list[Measured] = []
    skipped: dict[str, str] = {}
    for path in find(folder):
        try:
            found.append(_read(path, Path(folder)))
            continue
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            # The file is JSON with a record's keys, but its metrics are not those of its kind.
            reason = f"not a complete record ({type(error).__name__}: {error})"
        log.warning("skipped %s: %s", path, reason)
        skipped[path.relative_to(folder).as_posix()] = reason
    return found, skipped


def of_run(folder: str | Path, path: str | None, digests: Mapping[str, str]) -> list[Measured]:
    """What was measured of one run.

    Args:
        folder: a folder of records, read to its bottom.
        path: of the run, where the folder is its study's: what lies there is of it.
        digests: of the run: elsewhere what has the same ones is of it. A run without any is known by its path alone.

    Returns:
        Records of the kinds that are shown, in the order of their paths; those that cannot be used are named in a warning.
    """
    within = [Path(folder) / kind / path for kind in KINDS] if path else []
    files = [
        file for place in within for file in [*find(place), place.with_name(f"{place.name}.json")] if file.is_file()
    ]
    found = []
    for file in files or (find(folder) if digests and path is None else []):
        try:
            record = Record.read(file)
            if path is not None or record.digests == digests:
                found.append(_typed(record, file, Path(folder)))
        except UserError as error:
            log.warning("skipped %s", error)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            log.warning("skipped %s: not a complete record (%s: %s)", file, type(error).__name__, error)
    return found


def _read(path: Path, folder: Path) -> Measured:
    return _typed(Record.read(path), path, folder)


def _typed(record: Record, path: Path, folder: Path) -> Measured:
    place = path.relative_to(folder)
    levels = dict(part.split("~", 1) for part in place.with_suffix("").parts if "~" in part)
    series = series_of(place.parent.as_posix()) or f"method~{record.method}"
    return KINDS.get(record.kind, Measured).of(record, str(path), levels, series)


def series_of(run_path: str) -> str:
    """A run's path (`buddy.study.config.Run.path`) without its backbone, seed and depth: equal for runs to be averaged, and
    for a peer's runs at its depths."""
    return "/".join(part for part in run_path.split("/") if "~" in part and part.split("~")[0] not in _NOT_SERIES)


_NOT_SERIES = (
    *("backbone", "seed", "dataset", "batch", "engine", "execution", "slack", "removed"),
    *("indicator", "corpus", "length", "kv", "decode", "preset"),
)
