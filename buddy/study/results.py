"""What each table and figure of a study shows: the jobs behind it, and what of the study's settings enters it.

A study that names records which were measured elsewhere (``study.records``) plans no jobs: its tables and figures show what
is there of the same records.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from buddy.methods import METHODS
from buddy.study import planned_figures
from buddy.study.config import Run
from buddy.study.jobs import Job, Jobs, Work, closure, corpora, stage
from buddy.study.records import find
from buddy.study.settings import Table


@stage("{table}", "tables/{place}.csv", command="report", minutes=15)
def table(job: Job, table: str) -> Work:
    """A table, from records alone."""
    return Work({"records": of_table(job.jobs, job.study.measured_tables()[table])}, {})


@stage("{figure}", "figures/{place}.png", command="report", minutes=15)
def figure(job: Job, figure: str) -> Work:
    """A figure, from records alone."""
    return Work({"records": of_figure(job.jobs, figure)}, {})


def of_study(jobs: Jobs) -> list[Job]:
    """Every job of a study, stage by stage: its tables and figures, the scores of all its runs, and all that these need."""
    study = jobs.study
    tables = [jobs("table", table=name) for name in study.measured_tables()]
    if study.study.records is not None:
        return tables
    figures = [jobs("figure", figure=name) for name in planned_figures.planned(study)]
    return closure([*tables, *figures, *_of_runs(jobs, "evaluate", study.runs())])


# ---- the jobs behind them --------------------------------------------------------------------------------------------


def of_table(jobs: Jobs, table: Table) -> list[Job]:
    """The jobs whose records a table shows, and the trainings that say whether its routers take more than one path."""
    shown = _measured(jobs, table)
    routers = [run for run in shown_runs(jobs, table) if run.method == "buddy"]
    return list(dict.fromkeys([*shown, *map(jobs.model, routers)])) if shown else []


def _measured(jobs: Jobs, table: Table) -> list[Job]:
    runs = shown_runs(jobs, table)
    if table.kind == "training_cost":
        return [*_trainings(jobs), *jobs.predictors("predictor")]
    if table.kind in ("latency", "peer_latency"):
        return _of_runs(jobs, "latency", runs, jobs.study.latency.datasets)
    if table.kind == "properties":
        return _of_runs(jobs, "trace", runs, jobs.study.trace.datasets)
    stages = {"generation": "solve", "likelihood": "score", "breakdown": "breakdown"}
    return _of_runs(jobs, stages.get(table.kind, "evaluate"), runs)


def shown_runs(jobs: Jobs, table: Table) -> list[Run]:
    """The runs that a table shows; of what training costs, all are records of trainings already."""
    study = jobs.study
    if table.kind == "training_cost":
        return []
    if table.kind == "ablation":
        return study.ablation_runs(study.ablation(str(table.ablation)))
    if table.kind == "generation":
        return [run for backbone in study.answering_backbones() for run in study.answering_runs(backbone)]
    if table.kind == "likelihood":
        return study.scored_runs()
    backbone = str(table.backbone)
    if table.kind in ("latency", "breakdown"):
        return [study.main_run(backbone)]
    of_one = {"peer_latency": study.timed_runs, "properties": study.answering_runs}
    return of_one.get(table.kind, study.compared_runs)(backbone)


def of_figure(jobs: Jobs, name: str) -> list[Job]:
    """The jobs whose records a figure shows."""
    study = jobs.study
    if name in ("latency", "savings"):
        timed = [study.main_run(backbone) for backbone in study.timed_backbones()]
        return _of_runs(jobs, "latency", timed, study.latency.datasets)
    if name == "accuracy_vs_speed":
        timed = [run for backbone in study.timed_backbones() for run in study.timed_runs(backbone)]
        compared = [run for backbone in study.timed_backbones() for run in study.compared_runs(backbone)]
        return [*_of_runs(jobs, "evaluate", compared), *_of_runs(jobs, "latency", timed, study.latency.datasets)]
    if name in planned_figures.ORDERS:
        return list(dict.fromkeys(_order(jobs, file) for file in planned_figures.orders(study, name)))
    if name in ("figure4", "route_ribbon") or name in planned_figures.HEAT_MAPS:
        tasks = study.trace.tasks if name != "figure4" else []
        return _of_runs(jobs, "trace", study.traced_runs(), [*study.trace.datasets, *tasks])
    if name == "figure5":
        return [jobs("rouge", routed=run.path, dataset="samsum") for run in study.summarising_runs()]
    if name == "figure12":
        return jobs.predictors("predictor")
    if name == "figure13":
        return [*jobs.predictors("budget_eval"), *_predicted(jobs)]
    if name == "ablation":
        return _of_runs(jobs, "evaluate", [run for one in study.study.ablations for run in study.ablation_runs(one)])
    return _of_runs(jobs, "evaluate", [run for one in study.study.backbones for run in study.compared_runs(one)])


def _of_runs(jobs: Jobs, kind: str, runs: Iterable[Run], datasets: Sequence[str] | None = None) -> list[Job]:
    """A stage's jobs of these runs, one for each data set where they are given."""
    each: Sequence[dict[str, str]] = [{}] if datasets is None else [{"dataset": name} for name in datasets]
    return list(dict.fromkeys(jobs(kind, run=run.path, **one) for run in runs for one in each))


def _trainings(jobs: Jobs) -> list[Job]:
    runs = [run for run in jobs.study.runs() if METHODS[run.method].trained]
    return [jobs.model(run) for run in sorted(runs, key=lambda run: run.method != "buddy")]


def _predicted(jobs: Jobs) -> list[Job]:
    """Scores and answers at the depths that the study's budget predictors choose, and those of the whole models beside
    them."""
    study = jobs.study
    compared = [run for name in study.predicting_backbones() for run in study.compared_runs(name)]
    whole = [run for run in compared if METHODS[run.method].kind == "whole"]
    found = []
    if study.predictor.tasks:
        found += jobs.predictors("evaluate_auto")
    if set(study.predictor.tasks) & set(study.evaluation.tasks):
        found += _of_runs(jobs, "evaluate", whole)
    if study.predicted_only():
        found += _of_runs(jobs, "evaluate_whole", whole)
    if study.predictor.problems:
        first = [run for run in whole if run.seed == study.study.seeds[0]]
        found += [*jobs.predictors("solve_auto"), *_of_runs(jobs, "solve", first)]
    return found


def _order(jobs: Jobs, file: str) -> Job:
    """The job that makes a record of importance, given below the records of that kind."""
    levels = dict(level.split("~") for level in file.removesuffix(".json").split("/"))
    if levels.pop("length", None):
        return jobs("length_orders", **levels)
    return jobs("corpus_orders" if "corpus" in levels else "importance", **levels)


# ---- their records ---------------------------------------------------------------------------------------------------


def records(jobs: Jobs, shown: Iterable[Job], folder: str | Path) -> list[str]:
    """The records that jobs make: as the rules promise them, or, of records that the study names, those that are there.

    Args:
        jobs: the study's.
        shown: the jobs.
        folder: the folder of records.
    """
    outputs = [output for job in shown for output in job.outputs if output.startswith("records/")]
    paths = [f"{folder}/{output.removeprefix('records/')}" for output in dict.fromkeys(outputs)]
    return paths if jobs.study.study.records is None else [str(file) for path in paths for file in _there(path)]


def _there(path: str) -> list[Path]:
    return [Path(path)] if path.endswith(".json") and Path(path).is_file() else find(path)


def table_records(jobs: Jobs, name: str, folder: str | Path) -> list[str]:
    """The records that a table shows; of records given, none where nothing of what it is about is there."""
    about = jobs.study.measured_tables()[name]
    return records(jobs, of_table(jobs, about), folder) if records(jobs, _measured(jobs, about), folder) else []


def dense_records(jobs: Jobs, folder: str | Path) -> list[str]:
    """The scores of the study's untrained runs, the backbones as they are."""
    return records(
        jobs, _of_runs(jobs, "evaluate", (run for run in jobs.study.runs() if not METHODS[run.method].trained)), folder
    )


def figure_records(jobs: Jobs, name: str, folder: str | Path) -> list[str]:
    """The records that a figure shows; where the study plans none, those of the kind that were measured all the same. Of
    records given, none where one of two kinds that it needs is absent."""
    shown = of_figure(jobs, name)
    if name == "accuracy_vs_speed" and jobs.study.study.records is not None:
        kinds = [[job for job in shown if (job.stage == "latency") is timed] for timed in (True, False)]
        return records(jobs, shown, folder) if all(records(jobs, kind, folder) for kind in kinds) else []
    kind = {"figure5": "rouge", **dict.fromkeys(planned_figures.ORDERS, "importance")}.get(name)
    if kind and not shown:
        return [str(file) for file in find(f"{folder}/{kind}")]
    return records(jobs, shown, folder)


# ---- settings that enter them ----------------------------------------------------------------------------------------


def table_settings(jobs: Jobs, name: str, folder: str | Path) -> dict[str, Any]:
    """What the study says of a table: its entry, and the budgets and records behind its rows and columns."""
    about = jobs.study.measured_tables()[name]
    return {
        "table": about.model_dump(),
        "removed": [jobs.study.removed(backbone) for backbone in _backbones(jobs, about)],
        "records": table_records(jobs, name, folder),
        "measurements": _measurements(jobs, about.kind),
    }


def figure_settings(jobs: Jobs, name: str) -> dict[str, Any]:
    """What the study says of a figure: the budgets on its axes, and which records it draws."""
    study = jobs.study
    removed = {backbone: study.removed(backbone) for backbone in study.study.backbones}
    return {"removed": removed, "measurements": _measurements(jobs, name)}


def _backbones(jobs: Jobs, table: Table) -> list[str]:
    """The backbones that a table is about."""
    study = jobs.study
    several = {"generation": study.answering_backbones, "likelihood": study.scored_backbones}
    if table.kind in several:
        return several[table.kind]()
    if table.ablation:
        return [study.ablation(table.ablation).backbone]
    return [table.backbone] if table.backbone else study.study.backbones


def _measurements(jobs: Jobs, kind: str) -> Any:
    """The settings that say which records of a kind enter, and how they are shown."""
    study = jobs.study
    return {
        **dict.fromkeys(("latency", "savings", "peer_latency"), study.latency.model_dump(exclude={"backbones"})),
        "accuracy_vs_speed": [study.evaluation.tasks, study.latency.model_dump(exclude={"backbones"})],
        "breakdown": study.breakdown.model_dump(exclude={"backbones"}),
        "generation": study.generation.model_dump(),
        "likelihood": [study.likelihood.model_dump(), study.study.model_dump(include={"main", "recipes", "ablations"})],
        **dict.fromkeys(("properties", "figure4"), study.trace.model_dump(exclude={"backbones", "tasks"})),
        **dict.fromkeys(("route_ribbon", *planned_figures.HEAT_MAPS), study.trace.model_dump(exclude={"backbones"})),
        "figure5": study.summaries.model_dump(exclude={"backbones"}),
        "figure12": study.predictor.presets,
        "figure13": study.predictor.model_dump(include={"presets", "datasets", "tasks", "problems"}),
        **{key: [study.importance.corpus, *corpora(study)] for key in planned_figures.ORDERS},
    }.get(kind, study.evaluation.tasks)


# ---- their place in the report ---------------------------------------------------------------------------------------

SECTIONS = {
    "1 Properties of the method": ["properties", "route_ribbon", "figure4", "figure5", *planned_figures.HEAT_MAPS],
    "2 Accuracy and likelihood against budget": [
        *("accuracy", "generation", "accuracy_vs_budget", "accuracy_vs_speed", "likelihood"),
    ],
    "3 Speed": ["latency", "savings", "peer_latency", "breakdown"],
    "4 Ablations": ["ablation", "figure1", "figure2", "figure7", "figure8"],
    "5 Budget predictor": ["figure12", "figure13"],
    "6 Cost of training": ["training_cost"],
}
"""What tables and figures are about, the parts of the report in the order of the paper."""
SECTION_OF = {kind: section for section, kinds in SECTIONS.items() for kind in kinds}


def first_picture(folder: str | Path) -> str:
    """The figure that a reader should see first, as a data URI for reStructuredText, in indented lines short enough for
    docutils; "" where none of them is drawn.

    Args:
        folder: of the study.
    """
    for name in planned_figures.FIRST:
        file = Path(folder) / "figures" / f"{name}.png"
        if file.is_file():
            lines = base64.encodebytes(file.read_bytes()).decode().splitlines()
            return "\n   ".join(["data:image/png;base64,", *lines])
    return ""


def table_labels(jobs: Jobs, name: str) -> dict[str, str]:
    """A table's parameters, as columns of the report's list."""
    about = jobs.study.measured_tables()[name]
    backbones = _backbones(jobs, about)
    return {
        "result": name.replace("table", "Table ").capitalize(),
        "shows": about.ablation or about.kind.replace("_", " "),
        "backbone": ", ".join(backbones),
        "removed blocks": _depths(jobs, backbones),
    }


def figure_labels(jobs: Jobs, name: str) -> dict[str, str]:
    """A figure's parameters, as columns of the report's list."""
    number = name.removeprefix("figure")
    backbones = jobs.study.study.backbones
    return {
        "result": f"Figure {number}" if number.isdigit() else "Figure",
        "shows": SECTION_OF[name][2:].lower() if number.isdigit() else number.replace("_", " "),
        "backbone": ", ".join(backbones),
        "removed blocks": _depths(jobs, backbones),
    }


def _depths(jobs: Jobs, backbones: Iterable[str]) -> str:
    """Removed blocks of each backbone: `8, 16 of 32`."""
    study = jobs.study
    return "; ".join(f"{', '.join(map(str, study.removed(one)))} of {study.backbones[one].blocks}" for one in backbones)
