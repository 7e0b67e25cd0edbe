"""A whole tiny study on this machine: from nothing to tables and figures, then again, then with knobs turned."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import command_line
import pytest
import wandb_files
import yaml
from checkout import clone, planned, snakemake

from buddy.pages.page import Page
from buddy.reporting.study import load
from buddy.study.records import Record, find
from buddy.tasks import headline
from buddy.tracking.identity import study_id

pytestmark = pytest.mark.timeout(1800)  # the study takes minutes on two free cores, and more on busy ones

TINY = ("--configfile", "tests/tiny.yaml")
MAIN = "backbone~tiny/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/recipe~tuned/seed~0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout in which the tiny study has run to its end, with W&B offline."""
    folder = clone(tmp_path_factory.mktemp("clone"))
    (folder / "plan.json").write_text(json.dumps(planned(folder, *TINY)))
    result = snakemake(folder, "--cores", "2", *TINY, WANDB_MODE="offline")
    logs = "".join(path.read_text()[-1500:] for path in (folder / "results/tiny/logs").rglob("*.log"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:] + logs
    return folder


def buddy(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "buddy", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_tables_and_figures_are_there(finished):
    study = finished / "results/tiny"
    for table in ("table1", "table2", "table4", "table5", "table8", "table9", "table12", "table14", "likelihood"):
        for kind in ("csv", "md", "tex"):
            assert (study / "tables" / f"{table}.{kind}").stat().st_size > 100
    shown = (1, 2, 4, 5, 7, 9, 10, 12, 13)
    for figure in (
        "accuracy_vs_budget",
        "accuracy_vs_speed",
        "latency",
        "savings",
        "route_ribbon",
        "ablation",
        *(f"figure{number}" for number in shown),
    ):
        assert (study / "figures" / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert (study / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_every_measurement_left_a_record(finished):
    records = [Record.read(path) for path in find(finished / "results/tiny/records")]
    kinds = [record.kind for record in records]
    # two routed runs at two depths, one dense, and three peers at one depth
    # and one at the depths that each preset of the budget predictor chooses; dense on the task that is scored there alone
    assert kinds.count("accuracy") == 2 * 2 + 1 + 3 + 2 + 1
    assert kinds.count("generation") == 2 + 1 + 3 + 2
    assert kinds.count("trace") == 2 + 1 + 3 + 2  # and of BUDDY's on a task
    # per batch size dense, full and four executions at two depths, and for the batch of two varied routes under two bounds,
    # mixed and nested budgets; PuDDing's run beside dense
    assert kinds.count("latency") == 2 * (2 + 4 * 2) + 2 * 2 + 2 + 2 * 2
    assert kinds.count("rouge") == 2 * 2  # depths and decode modes
    # K/V policies and decode modes of every compared run at its depths; of the ablation's variant the first of them
    assert kinds.count("likelihood") == 2 * 2 * (2 + 1 + 3) + 2
    assert kinds.count("breakdown") == 2
    assert kinds.count("importance") == 1 + 1 + 2  # on the study's corpus, on another, at two context lengths
    assert kinds.count("calibration") == 2
    assert kinds.count("training") == 2 + 3 + 2  # and two presets of the budget predictor
    assert kinds.count("budget") == 2
    for record in records:
        assert record.study == "tiny"
        assert record.backbone == "tiny"
        assert record.environment["torch"]
        assert record.wall_s > 0
        if record.kind == "accuracy" and record.budget is not None:
            assert record.budget.executed == 6 - record.budget.removed
            if record.method != "first":  # FiRST has no strict budget
                assert record.metrics["executed_mean"] == record.budget.executed
            assert record.metrics["limit"] == 4
            assert record.n == 4 * len(record.metrics["tasks"])


def test_every_job_logged_one_wandb_run(finished):
    """One offline run per job, without a key."""
    folders = list((finished / "results/tiny/wandb").rglob("offline-run-*"))
    ids = {folder.name.rsplit("-", 1)[1] for folder in folders if folder.is_dir()}
    jobs = json.loads((finished / "plan.json").read_text())
    assert len(ids) == sum(jobs.values()) - jobs["all"]


def test_what_wandb_runs_say_is_of_one_type_for_each_key(finished):
    """In settings, curves and summaries of all jobs, as W&B filters and sorts by it."""
    types = {}
    for run in wandb_files.runs(finished / "results/tiny/wandb"):
        for place, content in (("config", run.config), ("summary", run.summary), *(("history", p) for p in run.points)):
            for key, value in flat(content):
                if value is not None:
                    types.setdefault((place, key), {}).setdefault(kind_of(value), set()).add(run.stage)
    assert {key: found for key, found in types.items() if len(found) > 1} == {}
    assert not [place for place, key in types if key == "average"]


def test_the_pages_evaluations_have_likelihoods_and_paths_of_the_same_run(finished):
    """The conditions, grouping and columns of its ablations, held against the runs that the jobs have logged: every row has
    the cells of its records."""
    wr, expr = (pytest.importorskip(f"wandb_workspaces.{name}") for name in ("reports.v2", "expr"))
    study = load(finished / "results/tiny")
    shared = {"study": "tiny", "study_id": study_id(study.folder)}
    grids = [block for block in Page(wr, study, "nobody", "buddy", shared).blocks() if isinstance(block, wr.PanelGrid)]
    logged, compared = wandb_files.runs(study.folder / "wandb"), 0
    for (runset,) in [grid.runsets for grid in grids if any(one.groupby for one in grid.runsets)]:
        assert runset.groupby == ["config.run"]
        grouped = {}
        for run in logged:
            told = expr.string_to_filterexpr_list(runset.filters)
            found = [(item.op, item.value, run.config.get(item.key.name)) for item in told]
            if all(own == value if op == "=" else own in value for op, value, own in found):
                grouped.setdefault(run.config["run"], []).append(run)
        for path, runs in grouped.items():
            for removed in study.removed("tiny"):
                accuracy = Record.read(study.folder / f"records/accuracy/{path}/removed~{removed}.json").metrics[
                    "tasks"
                ]
                scored = study.folder / f"records/likelihood/{path}/kv~zero/decode~recompute/removed~{removed}.json"
                text = Record.read(scored).metrics
                cells = {
                    "average": 100 * sum(one[headline(task, one)] for task, one in accuracy.items()) / len(accuracy),
                    **{name: text["average"][name]["mean"] for name in ("nll", "kl")},
                    "distinct_paths": text["distinct_paths"],
                }
                for name, value in cells.items():
                    metric = f"{name}_removed_{removed}"
                    assert f"summary:{metric}" in runset.visible_columns
                    assert [run.summary[metric] for run in runs if metric in run.summary] == [pytest.approx(value)]
                    compared += 1
    assert compared


def flat(content, above=""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def kind_of(value):
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def test_what_jobs_read_somebody_has_made(finished):
    """Every artifact that a W&B run used is one that another run of the study has logged."""
    told = [json.loads(file.read_text()) for file in (finished / "results/tiny/wandb").glob("*.json")]
    made = {name for job in told for name in job.get("makes", [])}
    assert made
    assert {name for job in told for name in job.get("reads", [])} <= made


def test_a_second_run_finds_nothing_to_do(finished):
    start = time.monotonic()
    result = snakemake(finished, "--cores", "2", *TINY)
    assert "Nothing to be done" in result.stdout + result.stderr
    assert time.monotonic() - start < 15


SHOWN = ("table", "figure", "all")
MEASURED = ("evaluate", "solve", "trace", "score", *SHOWN)
PREDICTED = ("budget_eval", "evaluate_auto", "solve_auto")
OF_BUDDY = ("train", "predictor", *PREDICTED, "rouge", "latency", "breakdown", *MEASURED)
KNOBS = [
    ({"latency": {"prompts": 3}}, {"latency", "table", "figure", "all"}),
    ({"peers": {"length": 40}}, {"calibrate", "adapt", *MEASURED}),
    ({"pudding": {"epochs": 3}}, {"adapt", "latency", *MEASURED}),
    ({"first": {"epochs": 2}}, {"gates", "adapt", *MEASURED}),
    ({"first": {"threshold": 0.5}}, {"adapt", *MEASURED}),
    ({"trace": {"prompts": 2}}, {"trace", *SHOWN}),
    ({"trace": {"tasks": ["piqa", "arc_easy"]}}, {"trace", "figure", "all"}),
    ({"orders": {"samples": 3}}, {"corpus_orders", "length_orders", "figure", "all"}),
    ({"summaries": {"new_tokens": 2}}, {"rouge", "figure", "all"}),
    ({"likelihood": {"items": 3}}, {"score", "table", "all"}),
    ({"generation": {"limit": 1}}, {"solve", "solve_auto", *SHOWN}),
    ({"predictor": {"limit": 2}}, {"budget_eval", "figure", "all"}),
    ({"breakdown": {"steps": 3}}, {"breakdown", "table", "all"}),
    ({"evaluation": {"limit": 5}}, {"evaluate", "evaluate_auto", "evaluate_whole", *SHOWN}),
    ({"training": {"learning_rate": 0.01}}, {"adapt", *OF_BUDDY}),
    ({"router": {"rounds": 2}}, set(OF_BUDDY)),
    ({"training": {"router_learning_rate": 0.01}}, set()),  # read by the paper's recipe alone
    ({"data": {"new_tokens": 5}}, {"answers", "gates", "adapt", *OF_BUDDY}),
    ({"importance": {"length": 40}}, {"importance", "corpus_orders", *OF_BUDDY}),
    ({"tracking": {"project": "other"}}, set()),
]


@pytest.fixture(scope="module")
def turned(finished):
    """What Snakemake plans for each knob, asked side by side: planning takes one core."""

    def plan(number):
        (finished / f"knob{number}.yaml").write_text(yaml.safe_dump(KNOBS[number][0]))
        return planned(finished, *TINY, f"knob{number}.yaml")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(plan, range(len(KNOBS))))


@pytest.mark.parametrize("number", range(len(KNOBS)), ids=[str(knob)[:40] for knob, _ in KNOBS])
def test_one_knob_reruns_what_depends_on_it(turned, number):
    (knob, expected), jobs = KNOBS[number], turned[number]
    assert set(jobs) == expected
    if "latency" in knob:
        assert (jobs["table"], jobs["figure"]) == (2, 3)  # tables 4 and 14 and what they show, not the accuracy ones


def test_adding_an_ablation_value_adds_its_runs_only(finished):
    overlay = yaml.safe_load((finished / "tests/tiny.yaml").read_text())
    overlay["study"]["ablations"][0]["feature"].append("key+value")
    (finished / "knob.yaml").write_text(yaml.safe_dump(overlay))
    jobs = planned(finished, "--configfile", "knob.yaml")
    # besides its own, the tables of likelihoods and of what training costs, and the picture of the ablation
    assert jobs == {"train": 1, "evaluate": 1, "score": 1, "table": 3, "figure": 1, "all": 1}


def test_a_person_can_generate_with_the_trained_run(finished):
    run = f"results/tiny/runs/{MAIN}"
    listed = buddy(finished, "runs", "--json")
    assert run in [entry["path"] for entry in json.loads(listed.stdout)]
    result = buddy(finished, "generate", "--run", run, "--budget", "0.67", "--max-new-tokens", "5", "hello")
    assert result.returncode == 0, result.stderr
    assert "tokens/s; 4 of 6 blocks in every step" in result.stdout
    newest = buddy(finished, "generate", "--budget", "0.67", "--max-new-tokens", "5", "--json", "hello")
    said = json.loads(newest.stdout)
    assert said["run"] in [entry["path"] for entry in json.loads(listed.stdout)]
    assert said["executed"] == [4] * 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--run", f"results/tiny/runs/{MAIN}", "--budget", "1.5", "hi"], "--budget: 1.5 is not between 0 and 1"),
        (["generate", "--run", f"results/tiny/runs/{MAIN}", "--budget", "0.1", "hi"], "nearest legal budgets are 0.3333"),
        (["generate", "--run", "results/nowhere", "--budget", "0.5", "hi"], "not a run"),
        (["evaluate", "--run", f"results/tiny/runs/{MAIN}", "--data", "results/tiny/data", "--removed", "9", "--out", "x"], "of 6 blocks"),
        (["evaluate", "--run", f"results/tiny/runs/{MAIN}", "--data", "results/tiny/data", "--tasks", "piqua", "--out", "x"], "did you mean piqa"),
        (["train", "--backbone", "results/tiny/backbones/tiny", "--data", "results/tiny/data/piqa", "--most-removed", "2", "--out", "x"], "no prompts"),
        (["train", "--backbone", "nowhere", "--data", "results/tiny/data/alpaca", "--most-removed", "2", "--out", "x"], "not a backbone"),
        (["train", "--backbone", "results/tiny/backbones/tiny", "--data", "results/tiny/data/alpaca", "--most-removed", "5", "--out", "x"], "not between 1 and 4"),
        (["importance", "--backbone", "results/tiny/backbones/tiny", "--corpus", "nowhere.txt", "--indicator", "taylor", "--out", "x"], "neither a data set folder"),
        (["latency", "--run", f"results/tiny/runs/{MAIN}", "--data", "results/tiny/data/alpaca", "--removed", "two", "--out", "x"], "--removed: 'two'"),
        (["train", "--epochs", "-1", "--backbone", "b", "--data", "d", "--most-removed", "2", "--out", "x"], "--epochs"),
        (["nonsense"], "No such command"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value[:20],
)  # fmt: skip
def test_a_users_mistake_is_one_line(finished, arguments, words, monkeypatch):
    monkeypatch.chdir(finished)
    assert words in command_line.buddy(*arguments).mistake
    assert not (finished / "x").exists()


def test_tables_are_rebuilt_from_records_alone(finished, tmp_path):
    """Runs, backbones, data and old tables deleted: the same table comes back, and no job but `table` is planned."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    table = copy / "results/tiny/tables/table4.csv"
    before = table.read_text()
    for folder in ("runs", "backbones", "data", "tables", "figures", "logs", "wandb", "benchmarks"):
        shutil.rmtree(copy / "results/tiny" / folder)
    (copy / "results/tiny/study.json").unlink()
    assert set(planned(copy, "table4", *TINY)) <= {"table", "table4"}
    result = snakemake(copy, "table4", "--cores", "1", *TINY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert table.read_text() == before
