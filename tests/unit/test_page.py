"""The page shows what the tables show: its own filters, held against the runs, give the tables' rows, cell by cell."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import wandb
import wandb_files
import yaml
from records_factory import Maker, methods
from wandb_files import Logged
from wandb_server import ENTITY, KEY, WandbServer

from buddy.commands import evaluate, score
from buddy.commands._common import tracked
from buddy.commands._measured import Measured
from buddy.pages import report
from buddy.reporting import likelihood, measured, tables, write
from buddy.reporting.study import Study, load
from buddy.runs import RunInfo
from buddy.study.records import Budget, Record

BACKBONE = "smollm2-135m"
SWEEPS: list[dict[str, Any]] = []
"""What the server was told of sweeps."""


TEXTS = {"gsm8k": 6, "ptb": 4}
"""Text that is scored, and how many items of it."""


def content() -> dict[str, Any]:
    """A study with everything that could be averaged by mistake: two recipes, two seeds, LoRA and none, ablations."""
    study = methods()
    study["study"] |= {
        "name": "many",
        "methods": ["dense", "dense_lora", "buddy", "shortened_llama", "pudding"],
        "seeds": [0, 1],
        "lora": ["trained", "none"],
        "recipes": ["paper", "tuned"],
        "ablations": [
            {"name": "prior", "backbone": BACKBONE, "prior": ["none", "delta_ppl", "taylor"]},
            {"name": "omega", "backbone": BACKBONE, "omega": [0.0, 0.1, 0.5]},
            {"name": "grid", "backbone": BACKBONE, "feature": ["key", "value"], "source_block": [1, 2]},
        ],
        "tables": {
            "table2": {"kind": "accuracy", "backbone": BACKBONE},
            "table4": {"kind": "latency", "backbone": BACKBONE},
            "table5": {"kind": "ablation", "ablation": "prior"},
            "table6": {"kind": "ablation", "ablation": "omega"},
            "table7": {"kind": "ablation", "ablation": "grid"},
        },
    }
    study["peers"] = {"criteria": {"shortened_llama": ["ppl", "taylor"]}}
    study["latency"] |= {"methods": ["buddy", "pudding"], "datasets": ["alpaca"], "batch_sizes": [1, 4]}
    study["likelihood"] = {"datasets": [*TEXTS], "kv": ["zero", "mask"], "decode": ["recompute"]}
    study |= {name: {"backbones": []} for name in ("trace", "predictor", "generation", "breakdown")}
    return study


def score_all(maker: Maker) -> None:
    """Records of likelihoods that differ by run, depth and mode."""
    for run in maker.config.scored_runs():
        for removed in maker.config.depths(run):
            for kv in ("zero", "mask"):
                values = {
                    name: {
                        measure: [round(maker.random.uniform(0.1, 3), 4) for _ in range(items)]
                        for measure in ("nll", "kl", "agreement")
                    }
                    for name, items in TEXTS.items()
                }
                maker.likelihood(run, removed, values, kv=kv, paths=maker.random.randint(1, 40))


def log(study: Study, folder: Path) -> None:
    """Let every evaluation and scoring of the study leave its W&B run, as the commands do when they have their metrics."""
    for run in study.config.runs():
        info = RunInfo(run.method, "", {}, run.backbone, "", variant=run.variant, seed=run.seed, study=study.name)
        depths = tuple(study.config.depths(run))
        opened = Measured(folder, info, None, study.blocks(run.backbone), depths)
        out = study.folder / "records" / "accuracy" / run.path
        with tracked("evaluate", info, opened.config(study.config.evaluation), writes=[]) as tracker:
            for removed in depths:
                record = Record.read(out / f"removed~{removed}.json")
                evaluate.show(tracker, Budget.of(opened.blocks - removed, opened.blocks), record.metrics)
        out = study.folder / "records" / "likelihood" / run.path
        with tracked("score", info, opened.config(study.config.likelihood), writes=[]) as tracker:
            for removed in depths if out.is_dir() else ():
                files = [out / f"kv~{kv}/decode~recompute/removed~{removed}.json" for kv in ("zero", "mask")]
                score.show(tracker, removed, [Record.read(file).metrics for file in files])


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, list[Logged], dict[str, Any]]]:
    """A finished study, its runs as W&B has them, and the content of its page."""
    folder = tmp_path_factory.mktemp("page")
    with WandbServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_BASE_URL", server.address)
        maker = Maker(folder, content())
        maker.everything(items=16)
        score_all(maker)
        study = load(maker.folder)
        patch.setenv("WANDB_DIR", str(study.folder / "wandb"))
        log(study, folder)
        logged = wandb_files.runs(study.folder / "wandb")
        for name in tables.names(study):
            write.table(study, name)
        patch.setenv("WANDB_MODE", "online")
        patch.setenv("WANDB_API_KEY", KEY)
        server.projects.add("buddy")
        report.save(study, None, "buddy")
        report.save(study, None, "buddy")  # renewed
        (page,) = server.reports.values()
        SWEEPS.extend(server.sweeps.values())
        yield study, logged, json.loads(page["spec"])
    wandb.teardown()


@pytest.fixture
def study(setting: tuple[Study, list[Logged], dict[str, Any]]) -> Study:
    return setting[0]


@pytest.fixture
def logged(setting: tuple[Study, list[Logged], dict[str, Any]]) -> list[Logged]:
    return setting[1]


@pytest.fixture
def page(setting: tuple[Study, list[Logged], dict[str, Any]]) -> dict[str, Any]:
    return setting[2]


def sections(page: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Its panel grids, by the headings above them."""
    found: dict[str, list[dict[str, Any]]] = {}
    heading = ""
    for block in page["blocks"]:
        if block["type"] == "heading":
            heading = block["children"][0]["text"]
        if block["type"] == "panel-grid":
            found.setdefault(heading, []).append(block["metadata"])
    return found


def panels(grid: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    shown = grid["panelBankSectionConfig"]["panels"]
    return [panel["config"] for panel in shown if panel["viewType"] == kind]


def lets_through(filters: dict[str, Any], run: Logged) -> bool:
    """Whether W&B would show a run, by its format of filters."""
    assert filters["filterFormat"] == "filterV2"
    verdict = True
    for item in filters["filters"]:
        assert item.get("connector", "AND") == "AND", "these filters have no alternatives"
        assert item["key"]["section"] == "config"
        found = run.config.get(item["key"]["name"])
        given = item["value"]
        assert item["op"] in ("=", "IN")
        verdict &= found == given if item["op"] == "=" else found in given
    return verdict


def shown(runset: dict[str, Any], logged: list[Logged]) -> list[Logged]:
    assert runset["project"]["name"] == "buddy"
    return [run for run in logged if lets_through(runset["filters"], run)]


def rows(study: Study, name: str) -> list[dict[str, str]]:
    with (study.folder / "tables" / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_line_is_a_row_of_the_table(study: Study, logged: list[Logged], page: dict[str, Any]) -> None:
    (grid,) = sections(page)[BACKBONE][:1]
    table = {(row, removed): cells for row, removed, cells in labelled(study)}
    names = [runset["name"] for runset in grid["runSets"]]
    assert names == list(dict.fromkeys(name for name, _ in table))
    lines = panels(grid, "Run History Line Plot")
    assert [line["metrics"] for line in lines] == [
        ["accuracy/average"],
        *([f"accuracy/{task}"] for task in study.tasks),
    ]
    compared = 0
    for runset in grid["runSets"]:
        runs = shown(runset, logged)
        assert len({run.config["method"] for run in runs}) == 1  # the panel groups by it: a set is one line
        for line in lines:
            assert (line["xAxis"], line["groupBy"], line["groupAgg"]) == ("budget", "method.value", "mean")
            (metric,) = line["metrics"]
            points: dict[float, list[float]] = {}
            for run in runs:
                for point in run.points:
                    points.setdefault(point["budget"], []).append(point[metric])
            drawn = {round(30 * (1 - budget)): fmean(values) for budget, values in points.items()}
            wanted = {removed: cells for (name, removed), cells in table.items() if name == runset["name"]}
            assert drawn.keys() == wanted.keys()
            for removed, value in drawn.items():
                assert value == pytest.approx(wanted[removed][metric.partition("/")[2]], abs=1e-9)
                compared += 1
    assert compared == len(table) * (1 + len(study.tasks))


def labelled(study: Study) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Rows of the accuracy table as it is printed: label, depth, and the cells by task."""
    text = (study.folder / "tables" / "table2.md").read_text()
    printed = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    body = [cells for cells in printed[2:] if cells[1]]
    columns = len(study.tasks) + 1
    cells = rows(study, "table2")
    assert len(cells) == columns * len(body)
    removed = ""
    for place, line in enumerate(body):
        removed = line[0] or removed
        own = cells[columns * place : columns * (place + 1)]
        assert {cell["removed"] for cell in own} == {removed}
        yield line[1], int(removed), {cell["task"]: float(cell["value"]) for cell in own}


def test_bars_are_a_column_of_the_table(study: Study, logged: list[Logged], page: dict[str, Any]) -> None:
    (grid,) = sections(page)[BACKBONE][:1]
    table = {(name, removed): cells["average"] for name, removed, cells in labelled(study)}
    bars = panels(grid, "Bar Chart")
    assert [bar["metrics"] for bar in bars] == [[f"average_removed_{removed}"] for removed in (4, 8)]
    for removed, bar in zip((4, 8), bars, strict=True):
        (metric,) = bar["metrics"]
        assert (bar["groupBy"], bar["groupAgg"], bar["groupArea"]) == ("method.value", "mean", "stderr")
        for runset in grid["runSets"]:
            values = [run.summary[metric] for run in shown(runset, logged) if metric in run.summary]
            wanted = table.get((runset["name"], removed))
            assert (fmean(values) if values else None) == (None if wanted is None else pytest.approx(wanted, abs=1e-9))


@pytest.mark.parametrize(("name", "table"), [("prior", "table5"), ("omega", "table6"), ("grid", "table7")])
def test_an_ablation_holds_the_runs_of_its_grid(
    study: Study, logged: list[Logged], page: dict[str, Any], name: str, table: str
) -> None:
    (grid,) = sections(page)[f"Ablation: {name}"]
    (runset,) = grid["runSets"]
    runs = [run for run in shown(runset, logged) if run.config["stage"] == "evaluate"]
    wanted = study.config.ablation_runs(study.config.ablation(name))
    assert {run.config["run"] for run in runs} == {run.path for run in wanted}
    assert len(runs) == len(wanted)
    (coordinates,) = panels(grid, "Parallel Coordinates Plot")
    axes = [column["accessor"] for column in coordinates["columns"] if column["accessor"].startswith("config:")]
    scores = [column["accessor"] for column in coordinates["columns"][len(axes) :]]
    assert scores == ["summary:average_removed_4", "summary:average_removed_8"]
    varied = [accessor.removeprefix("config:").removesuffix(".value") for accessor in axes]
    assert varied == study.config.ablation(name).axes()
    drawn: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        for metric in scores:
            at = (*(str(run.config[axis]) for axis in varied), metric.rpartition("_")[2])
            drawn.setdefault(at, []).append(run.summary[metric.removeprefix("summary:")])
    cells = {(*(row[axis] for axis in varied), row["removed"]): float(row["value"]) for row in rows(study, table)}
    assert {at: pytest.approx(fmean(values), abs=1e-9) for at, values in drawn.items()} == cells


@pytest.mark.parametrize("name", ["prior", "omega", "grid"])
def test_a_row_of_the_evaluations_has_likelihood_and_paths_too(
    study: Study, logged: list[Logged], page: dict[str, Any], name: str
) -> None:
    """The page's own conditions, grouping and columns, held against what the table of likelihoods is made of."""
    (grid,) = sections(page)[f"Ablation: {name}"]
    (runset,) = grid["runSets"]
    assert runset["grouping"] == [{"section": "config", "name": "run.value"}]
    grouped: dict[str, list[Logged]] = {}
    for run in shown(runset, logged):
        grouped.setdefault(run.config["run"], []).append(run)
    rows_of = {row: [run.config["stage"] for run in runs] for row, runs in grouped.items()}
    assert set(map(tuple, map(sorted, rows_of.values()))) == {("evaluate", "score")}
    columns = [column.removeprefix("summary:") for column in runset["runFeed"]["columnOrder"] if "summary:" in column]
    compared = 0
    for series in study.ablation_rows(name):
        paths = [
            run.path
            for run in study.config.runs()
            if run.path in grouped and measured.series_of(run.path) == series.path
        ]
        assert len(paths) == 2  # seeds
        for removed in (4, 8):
            found = likelihood.scored(study, BACKBONE, series, removed, likelihood.main_mode(study))
            assert found is not None
            cells = {
                "average": averages(study, series.path, removed),
                "nll": found.estimate("nll").value,
                "kl": found.estimate("kl").value,
                "distinct_paths": fmean(found.paths),
            }
            for column, value in cells.items():
                metric = f"{column}_removed_{removed}"
                assert metric in columns
                # What W&B shows in a row of several runs is the mean of those that have it: here of one.
                values = [[run.summary[metric] for run in grouped[path] if metric in run.summary] for path in paths]
                assert [len(one) for one in values] == [1, 1]
                assert fmean(one[0] for one in values) == pytest.approx(value, abs=1e-6), (series.path, metric)
                compared += 1
    assert compared == len(study.ablation_rows(name)) * len(columns)


def averages(study: Study, series: str, removed: int) -> float:
    """The cell of an accuracy, from the records."""
    found = study.of(measured.Accuracy, BACKBONE, series, removed)
    return fmean(100 * fmean(one.scores[task].value for task in study.tasks) for one in found)


def test_the_main_run_has_the_cells_of_the_likelihood_table(
    study: Study, logged: list[Logged], page: dict[str, Any]
) -> None:
    (grid,) = sections(page)["Ablation: prior"]
    main = {study.config.main_run(BACKBONE).path.replace("seed~0", f"seed~{seed}") for seed in (0, 1)}
    runs = [
        run for run in shown(grid["runSets"][0], logged) if run.config["run"] in main and run.config["stage"] == "score"
    ]
    assert len(runs) == 2
    table = [row for row in rows(study, "likelihood") if row["dataset"] == "average" and not row["against"]]
    for row in table:
        if (row["method"], row["recipe"], row["lora"]) == ("buddy", "paper", "trained") and row["removed"] != "0":
            scale = 100 if row["metric"] == "agreement" else 1
            name = f"{row['metric']}_removed_{row['removed']}"
            assert fmean(scale * run.summary[name] for run in runs) == pytest.approx(float(row["value"]), abs=1e-5)


def test_only_headline_values_are_in_summaries(study: Study, logged: list[Logged]) -> None:
    scored = {run.path for run in study.config.scored_runs()}
    for run in logged:
        own = {name for name in run.summary if not name.startswith("_")}
        evaluated = run.config["stage"] == "evaluate"
        names = ("average",) if evaluated else ("nll", "kl", "agreement", "distinct_paths")
        there = evaluated or run.config["run"] in scored
        assert own == (
            {f"{name}_removed_{at}" for name in names for at in run.config["removed_at"]} if there else set()
        )


def test_latency_shows_the_engines_and_executions_that_were_timed(page: dict[str, Any]) -> None:
    (grid,) = sections(page)[f"Latency of {BACKBONE}, Alpaca"]
    wanted = [(method, "alpaca", "latency") for method in ("pudding", "buddy")]
    found = [{item["key"]["name"]: item["value"] for item in one["filters"]["filters"]} for one in grid["runSets"]]
    assert [(one["method"], one["dataset"], one["stage"]) for one in found] == wanted
    assert [runset["name"] for runset in grid["runSets"]] == ["PuDDing", "BUDDY"]
    metrics = [line["metrics"] for line in panels(grid, "Run History Line Plot")]
    assert [{name.rpartition("/")[0].rpartition("/")[0] for name in names} for names in metrics] == [
        *([{"b1/eager"}] * 2),
        *([{"b4/eager"}] * 2),
    ]
    assert {name.split("/")[2] for names in metrics for name in names} == {"dense", "sliced", "reuse", "recompute"}


def test_the_verdicts_stand_at_the_top(study: Study, page: dict[str, Any]) -> None:
    texts = [block.get("content", "") for block in page["blocks"] if block["type"] == "markdown-block"]
    assert texts[0].startswith("Study **many**, made 20")
    assert f"of {len({one.file for one in study.records})} records" in texts[0]
    assert "beside the paper" in texts[1]
    assert ENTITY not in texts[0]


def test_an_ablation_is_a_sweep_once(study: Study, logged: list[Logged]) -> None:
    assert len(SWEEPS) == 3  # the renewed page has those of the first
    for sweep, name in zip(SWEEPS, ("prior", "omega", "grid"), strict=True):
        told = yaml.safe_load(sweep["config"])
        ablation = study.config.ablation(name)
        for axis in ablation.axes():
            given = getattr(ablation, axis)
            assert [value for value in told["parameters"][axis]["values"] if value in given] == given
        assert told["metric"] == {"name": "average_removed_8", "goal": "maximize"}
        runs = {choice["name"] for choice in json.loads(sweep["priorRunsFilters"])["$or"]}
        wanted = {run.path for run in study.config.ablation_runs(ablation)}
        assert {run.id for run in logged if run.config["run"] in wanted and run.config["stage"] == "evaluate"} == runs


def test_runs_are_tagged_by_what_they_are(study: Study, logged: list[Logged]) -> None:
    for run in logged:
        roles = {tag for tag in run.tags if tag == "main" or tag.startswith("ablation:")}
        of = {
            f"ablation:{one.name}"
            for one in study.config.study.ablations
            if run.config["run"] in {other.path for other in study.config.ablation_runs(one)}
        }
        main = {study.config.main_run(BACKBONE).path, study.config.main_run(BACKBONE).path.replace("seed~0", "seed~1")}
        assert roles == of | ({"main"} if run.config["run"] in main else set())
    assert sum("main" in run.tags for run in logged) == 2 * 2  # seeds; evaluated and scored


def test_an_ablation_can_be_reviewed(page: dict[str, Any]) -> None:
    (grid,) = sections(page)["Ablation: grid"]
    (importance,) = panels(grid, "Parameter Importance")
    assert importance["targetKey"] == "average_removed_8"
    assert len(panels(grid, "Run Comparer")) == 1
    (coordinates,) = panels(grid, "Parallel Coordinates Plot")
    assert len(coordinates["customGradient"]) == 3
    bars = panels(grid, "Bar Chart")
    assert [(bar["groupBy"], bar["groupArea"]) for bar in bars[:2]] == [
        ("feature.value", "stderr"),
        ("source_block.value", "stderr"),
    ]
    assert [bar["metrics"] for bar in bars[2:]] == [
        [f"{name}_removed_{removed}"] for removed in (4, 8) for name in ("nll", "distinct_paths")
    ]
    (runset,) = grid["runSets"]
    assert runset["runFeed"]["columnOrder"] == [
        "config:feature.value",
        "config:source_block.value",
        *(
            f"summary:{name}_removed_{removed}"
            for name in ("average", "nll", "kl", "distinct_paths")
            for removed in (4, 8)
        ),
        "config:seed.value",
        "config:commit.value",
        "tags:__ALL__",
    ]
