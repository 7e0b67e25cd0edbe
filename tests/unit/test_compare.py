"""The study beside the paper, and BUDDY against its peers: intervals and verdicts are recomputed here."""

from __future__ import annotations

import csv
import math
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records_factory import ENVIRONMENT, EVERY_METHOD, Maker, cell, cells, demo, methods, paper, scores, uniform

from buddy.commands.report import report
from buddy.reporting import compare, render, significance, study, tables, write
from buddy.reporting.measures import Measure
from buddy.tasks import PAPERS


def digits(share: float, items: int, seed: int) -> str:
    """Items, right with that probability."""
    draw = random.Random(seed)
    return "".join("1" if draw.random() < share else "0" for _ in range(items))


def answered(maker: Maker, run: Any, removed: int, texts: dict[str, str], **more: Any) -> None:
    """Write an accuracy record of these items."""
    tasks = {}
    for task, text in texts.items():
        tasks[task] = scores(text.count("1") / len(text), len(text)) | {"items": {"acc": text}}
    maker.accuracy(run, removed, tasks, **more)


# Paired bootstrap


def test_interval_is_that_of_resampled_items() -> None:
    rng = np.random.default_rng(3)
    tasks = [rng.choice([-1, 0, 1], n, p=[0.1, 0.7, 0.2]).astype(float) for n in (80, 150)]
    found = significance.paired(tasks)
    resampled = [
        100 * np.mean([rng.choice(task, len(task)).mean() for task in tasks]) for _ in range(4000)
    ]  # item by item, as the bootstrap is defined
    assert found.value == pytest.approx(100 * np.mean([task.mean() for task in tasks]))
    assert (found.low, found.high) == pytest.approx(np.percentile(resampled, (2.5, 97.5)), abs=0.5)
    below = np.mean(np.array(resampled) <= 0)
    assert found.p == pytest.approx(2 * below, abs=0.01)
    assert found.items == 230


def test_p_without_any_difference_is_one_and_never_zero() -> None:
    assert significance.paired([np.zeros(50)]).p == 1.0
    sure = significance.paired([np.ones(50)])
    assert sure.p == pytest.approx(2 / (significance.RESAMPLES + 1))
    assert (sure.low, sure.high) == (100.0, 100.0)


def test_p_is_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(5)
    p = [significance.paired([rng.choice([-1.0, 0.0, 1.0], 300, p=[0.1, 0.8, 0.1])], 2000).p for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1
    assert 0.4 <= np.mean(np.array(p) < 0.5) <= 0.6


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.2 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.2.
    assert significance.holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


# BUDDY against its peers


@pytest.fixture
def raced(tmp_path: Path) -> Maker:
    """Every method, some measured: SLEB clearly worse, ShortGPT alike, PuDDing with other items, FiRST at other depth."""
    content = methods()
    content["study"]["methods"] = ["dense", "buddy", "shortgpt", "sleb", "pudding", "first"]
    maker = Maker(tmp_path, content)
    buddy = maker.main_run("smollm2-135m")
    texts = {task: digits(0.6, 200, place) for place, task in enumerate(PAPERS)}
    answered(maker, buddy, 4, texts)
    flipped = {task: text[:20].translate({48: 49, 49: 48}) + text[20:] for task, text in texts.items()}
    answered(maker, maker.peer("shortgpt", 4), 4, flipped)
    worse = {task: "0" * 100 + text[100:] for task, text in texts.items()}
    answered(maker, maker.peer("sleb", 4), 4, worse)
    answered(maker, maker.peer("pudding", 4), 4, {task: text[:-1] for task, text in texts.items()})
    answered(maker, maker.peer("first", 4), 4, worse, executed=24.0)
    return maker


def test_verdicts_need_the_corrected_p(raced: Maker) -> None:
    write.comparison(study.load(raced.folder))
    path = raced.folder / "tables/significance.csv"
    rows = {row["against"]: row for row in cells(path, removed=4)}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "shortgpt": "no difference shown",
        "sleb": "higher",
        "pudding": "not the same items",
        "first": "ran 24.0 of 26 blocks",
    }
    assert {row["comparisons"] for row in rows.values()} == {"2"}
    texts = [digits(0.6, 200, place) for place in range(8)]
    lost = np.mean([text[:100].count("1") / 200 for text in texts])
    assert float(rows["sleb"]["value"]) == pytest.approx(100 * lost, abs=1e-5)
    assert float(rows["sleb"]["low"]) < 100 * lost < float(rows["sleb"]["high"])
    assert float(rows["sleb"]["holm_p"]) == pytest.approx(2 * float(rows["sleb"]["p"]), abs=1e-6)
    assert {row["verdict"] for row in cells(path, removed=8)} == {"not measured item by item"}
    text = (raced.folder / "tables/significance.md").read_text()
    assert "2 comparisons were made" in text
    assert "| SLEB |" in text


def test_a_method_of_another_depth_is_met_there(raced: Maker) -> None:
    """FiRST ran 24 of the 26 blocks asked for: halfway between BUDDY's 26 and 22."""
    texts = {task: digits(0.6, 200, place) for place, task in enumerate(PAPERS)}
    deep = {task: text[:150] + "0" * 50 for task, text in texts.items()}
    answered(raced, raced.main_run("smollm2-135m"), 8, deep)
    write.comparison(study.load(raced.folder))
    path = raced.folder / "tables/significance.csv"
    (row,) = cells(path, removed=4, against="first")
    theirs = {task: "0" * 100 + text[100:] for task, text in texts.items()}

    def share(found: dict[str, str]) -> float:
        return float(np.mean([text.count("1") / 200 for text in found.values()]))

    expected = (share(texts) + share(deep)) / 2 - share(theirs)
    assert float(row["value"]) == pytest.approx(100 * expected, abs=1e-5)
    assert float(row["executed_mean"]) == 24
    gaps = [
        [(int(a) + int(b)) / 2 - int(c) for a, b, c in zip(texts[task], deep[task], theirs[task], strict=True)]
        for task in PAPERS
    ]
    rng = np.random.default_rng(2)
    means = [100 * np.mean([rng.choice(gap, 200).mean() for gap in gaps]) for _ in range(2000)]
    assert (float(row["low"]), float(row["high"])) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.3)
    assert "at the depth that it ran" in (raced.folder / "tables/significance.md").read_text()
    answered(raced, raced.peer("first", 4), 4, theirs, executed=28.0)  # above all that BUDDY was measured at
    write.comparison(study.load(raced.folder))
    (row,) = cells(path, removed=4, against="first")
    assert row["verdict"] == "ran 28.0 of 26 blocks"


def test_an_items_mean_over_seeds_is_compared(tmp_path: Path) -> None:
    content = methods()
    content["study"] |= {"seeds": [0, 1], "methods": ["buddy", "sleb"]}
    maker = Maker(tmp_path, content)
    backbone = maker.config.study.backbones[0]
    texts: dict[tuple[str, int], str] = {}
    for run in maker.config.runs():
        if 4 in maker.config.depths(run):
            texts[run.method, run.seed] = digits(0.5 + 0.1 * run.seed, 60, len(texts))
            answered(maker, run, 4, dict.fromkeys(PAPERS, texts[run.method, run.seed]))
    (made,) = [one for one in significance.comparisons(study.load(maker.folder)) if one.removed == 4]
    share = {key: text.count("1") / 60 for key, text in texts.items()}
    expected = (share["buddy", 0] + share["buddy", 1] - share["sleb", 0] - share["sleb", 1]) / 2
    assert made.found.value == pytest.approx(100 * expected)
    assert made.backbone == backbone


# Noise in ablations


def test_ablation_marks_what_is_inside_the_noise(tmp_path: Path) -> None:
    content = demo()
    content["study"]["ablations"][0]["prior"] = ["none", "cosine", "taylor"]
    maker = Maker(tmp_path, content)
    runs = {run.variant["prior"]: run for run in maker.config.ablation_runs(maker.config.ablation("prior"))}
    best = {task: digits(0.7, 300, place) for place, task in enumerate(PAPERS)}
    answered(maker, runs["taylor"], 4, best)
    answered(maker, runs["none"], 4, {task: text[:-4] + "0000" for task, text in best.items()})
    swapped = {task: ("0" if text[0] == "1" else "1") * 2 + text[2:] for task, text in best.items()}
    answered(maker, runs["cosine"], 4, swapped)
    opened = study.load(maker.folder)
    built = tables.build(opened, "table6")
    shown = {row.labels[0]: row.cells[0] for row in built.rows}
    marked = {prior for prior, one in shown.items() if one is not None and one.near}
    first = max(shown, key=lambda prior: shown[prior].measure.value)
    assert first in marked
    assert not any(one.rank for one in shown.values())
    for prior in set(shown) - {first}:
        # The same bootstrap, item by item.
        texts = {"taylor": best, "none": {t: x[:-4] + "0000" for t, x in best.items()}, "cosine": swapped}
        gaps = [
            np.array([int(a) - int(b) for a, b in zip(texts[first][t], texts[prior][t], strict=True)]) for t in PAPERS
        ]
        rng = np.random.default_rng(9)
        means = [np.mean([rng.choice(gap, len(gap)).mean() for gap in gaps]) for _ in range(1500)]
        low, high = np.percentile(means, (2.5, 97.5))
        assert (prior in marked) == (low <= 0 <= high), prior
    assert marked == {"taylor", "cosine"}
    assert f"{render.NEAR_SIGN} among the best: inside the noise" in render.to_markdown(built)
    assert r"$\approx$" in render.to_latex(built)
    notes = {row["prior"]: row["note"] for row in built.records() if row["removed"] == 4}
    assert notes["none"] == ""
    assert all("inside the noise" in notes[prior] for prior in marked)


def test_without_items_the_errors_decide(tmp_path: Path) -> None:
    """Of an average of eight tasks with an error of 2 each: 0.71, and 1.96 of the difference."""
    maker = Maker(tmp_path, demo())
    for place, run in enumerate(maker.config.ablation_runs(maker.config.ablation("prior"))):
        maker.accuracy(run, 4, uniform(0.5 + 0.019 * place))
        maker.accuracy(run, 8, uniform(0.5 + 0.020 * place))
    built = tables.build(study.load(maker.folder), "table6")
    assert [[one.near for one in row.cells if one is not None][:2] for row in built.rows] == [[True, False]] * 2
    assert built.rows[1].cells[1].rank == 1


# Beside the paper


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    maker = Maker(tmp_path_factory.mktemp("papers"), paper(methods=EVERY_METHOD))
    maker.everything(items=100)
    maker.trainings()
    maker.rouge(maker.main_run("llama2-7b"), 12, "recompute", [0.18, 0.17, 0.19], [0.1, 0.09, 0.11])
    write.comparison(study.load(maker.folder))
    for name in ("table2", "table9"):
        write.table(study.load(maker.folder), name)
    return maker


def test_every_overlapping_cell_is_compared(papers: Maker) -> None:
    path = papers.folder / "tables/compare.csv"
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    # By hand: accuracy 9 figures a row: Tables 2, 3, 10 have 1 + 4 x 6 rows, Table 11 has no FiRST: 1 + 4 x 5.
    counts = {name: sum(row["table"] == name for row in rows) for name in {row["table"] for row in rows}}
    assert counts == {
        **{"table2": 225, "table3": 225, "table10": 225, "table11": 189},
        **{"table5": 12, "table6": 16, "table7": 24, "table13": 16},
        # Tokens/s and speed-ups of two phases on two data sets: dense and BUDDY; in Table 14 also PuDDing and FiRST.
        **{"table4": 5 * 8, "table14": 13 * 8, "table8": 4 * 3 * 2},
        **{"table9": 4 * 2, "table12": 2 * 13, "figure4": 4, "figure5": 2},
    }


def test_verdict_is_what_the_interval_says(papers: Maker) -> None:
    path = papers.folder / "tables/compare.csv"
    told = set()
    for row in cells(path, table="table2"):
        value, error = float(row["value"]), float(row["stderr"])
        low, high, theirs = value - 1.96 * error, value + 1.96 * error, float(row["published"])
        assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high), abs=1e-4)
        expected = "higher" if low > theirs else "lower" if high < theirs else "no difference shown"
        assert row["verdict"] == expected
        told.add(expected)
    assert told == {"higher", "lower", "no difference shown"}
    own = cell(papers.folder / "tables/table2.csv", removed=8, method="buddy", task="boolq")
    ours = cell(path, table="table2", removed=8, method="buddy", task="boolq")
    assert (ours["value"], ours["published"], ours["difference"]) == (own["value"], "75.26", own["difference"])


def test_figures_are_compared_by_their_own_intervals(papers: Maker) -> None:
    path = papers.folder / "tables/compare.csv"
    one = cell(path, table="figure5", metric="rouge1")
    assert (one["published"], one["verdict"]) == ("0.18", "no difference shown")
    longest = cell(path, table="figure5", metric="rougeL")
    assert (longest["published"], longest["verdict"]) == ("0.133", "lower")
    assert {row["published"] for row in cells(path, table="figure4")} == {"1.0", "4.47", "5.22", "2.93"}


def test_times_of_other_hardware_have_no_verdict(papers: Maker) -> None:
    path = papers.folder / "tables/compare.csv"
    for table in ("table4", "table8", "table9", "table14"):
        assert {row["verdict"] for row in cells(path, table=table)} == {"other hardware"}


def test_times_of_the_same_gpu_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "device", "NVIDIA A100-SXM4-80GB")
    maker = Maker(tmp_path, paper())
    race = ("alpaca", 1, "eager")
    maker.latency(maker.main_run("llama2-7b"), race, "dense", 0, [3000.0, 3001.0, 3002.0], [10.0, 10.1, 10.2])
    write.comparison(study.load(maker.folder))
    path = maker.folder / "tables/compare.csv"
    assert cell(path, metric="prefill_tok_s")["verdict"] == "higher"  # the paper's 1753.16
    assert cell(path, metric="decode_tok_s")["verdict"] == "lower"  # 39.48
    assert cell(path, metric="decode_speedup")["verdict"] == "no interval"  # 1 by definition


@pytest.mark.parametrize(
    ("more", "verdict"), [({"limit": 60}, "first 60 items only"), ({"executed": 27.0}, "ran 27.0 blocks")]
)
def test_cells_that_stand_for_something_else_have_no_verdict(tmp_path: Path, more: dict, verdict: str) -> None:
    maker = Maker(tmp_path, paper())
    maker.accuracy(maker.main_run("llama3-8b"), 4, uniform(0.5), **more)
    assert {one.verdict for one in compare.overlaps(study.load(maker.folder))} == {verdict}


def test_seeds_widen_the_interval() -> None:
    alone = compare.interval(Measure(value=50.0, stderr=1.0, seeds=1, note=""))
    seeds = compare.interval(Measure(value=50.0, stderr=1.0, seed_sd=2.0, seeds=4, note=""))
    assert alone == pytest.approx((50 - 1.96, 50 + 1.96))
    assert seeds == pytest.approx((50 - 1.96 * math.sqrt(2), 50 + 1.96 * math.sqrt(2)))
    assert compare.interval(Measure(value=50.0, note="")) is None


def test_a_study_that_shares_nothing_with_the_paper_says_so(tmp_path: Path) -> None:
    maker = Maker(tmp_path, demo())
    maker.everything()
    report("demo", results=tmp_path, compare=True)
    assert "Nothing that the paper reports" in (maker.folder / "tables/compare.md").read_text()
    assert (maker.folder / "tables/compare.csv").read_text().strip()
    assert sorted(path.stem for path in (maker.folder / "tables").glob("*.csv")) == ["compare", "significance"]


# Which backbone the paper means


@pytest.mark.parametrize("better", ["llama3-8b", "llama3.0-8b"])
def test_the_dense_row_that_fits_the_papers_better_is_named(tmp_path: Path, better: str) -> None:
    content = paper()
    two = {"source": {"hub": "meta-llama/Meta-Llama-3-8B"}, "blocks": 32, "removed": [4, 8, 12, 16]}
    content["backbones"] = {**content["backbones"], "llama3.0-8b": two}
    content["study"]["backbones"] = [*content["study"]["backbones"], "llama3.0-8b"]
    maker = Maker(tmp_path, content)
    # The row of Table 2, as the paper prints it.
    columns = ("openbookqa", "piqa", "boolq", "siqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande")
    row = dict(zip(columns, (44.80, 80.85, 80.98, 46.98, 79.17, 80.09, 53.24, 73.40), strict=True))
    dense = {run.backbone: run for run in maker.config.runs() if run.method == "dense"}
    for name, gap in (("llama3-8b", 0.2), ("llama3.0-8b", 5.0)):
        gap = gap if better == "llama3-8b" else 5.2 - gap
        maker.accuracy(dense[name], 0, {task: scores((value - gap) / 100, 10_000, task) for task, value in row.items()})
        if name == "llama3-8b":
            assert compare.fits(study.load(maker.folder)) == []  # there is nothing to choose from
    (note,) = compare.fits(study.load(maker.folder))
    other = ({*("llama3-8b", "llama3.0-8b")} - {better}).pop()
    # 10,000 items have a standard error near half a point: 0.2 is within all intervals, 5 within none.
    assert f"{better} 0.20 points (8 of 8); {other} 5.00 points (0 of 8). {better} fits better." in note
    write.comparison(study.load(maker.folder))
    assert note.replace("|", "\\|") in (maker.folder / "tables/compare.md").read_text()


def test_rows_of_the_first_items_alone_choose_no_backbone(tmp_path: Path) -> None:
    content = paper()
    content["backbones"] = {**content["backbones"], "other": content["backbones"]["llama3-8b"]}
    content["study"]["backbones"] = [*content["study"]["backbones"], "other"]
    maker = Maker(tmp_path, content)
    for run in maker.config.runs():
        if run.method == "dense":
            maker.accuracy(run, 0, uniform(0.5), limit=60)
    assert compare.fits(study.load(maker.folder)) == []


# Cost of training


def test_hours_of_training(tmp_path: Path) -> None:
    content = paper(seeds=2, methods=EVERY_METHOD)
    maker = Maker(tmp_path, content)
    buddy = [run for run in maker.config.runs() if run.backbone == "llama3-8b" and run.method == "buddy"]
    maker.training(buddy[0], wall_s=8 * 3600.0, gpu_s=7 * 3600.0)
    maker.training(buddy[1], wall_s=9 * 3600.0)
    maker.training(buddy[0], wall_s=1800.0, preset="paper", curve=[], entropy_uniform=3.4)
    peers = [run for run in maker.config.runs() if run.backbone == "llama3-8b" and run.method == "sleb"]
    for place, run in enumerate(peers):
        maker.training(run, wall_s=3600.0 * (place + 1))
    for run in (run for run in maker.config.runs() if run.backbone == "llama3-8b" and run.method == "first"):
        maker.training(run, wall_s=3600.0, gates={"wall_s": 7200.0, "gpu_s": 1800.0 * (1 + run.seed)})
    write.table(study.load(maker.folder), "table9")
    path = maker.folder / "tables/table9.csv"

    def shown(method: str, metric: str) -> dict[str, str]:
        return cell(path, backbone="llama3-8b", method=method, metric=metric)

    assert float(shown("buddy", "run")["value"]) == 8.0  # seven hours of a GPU, nine of wall-clock
    assert (shown("buddy", "run")["published"], shown("buddy", "predictor_paper")["published"]) == ("8.26", "0.82")
    assert float(shown("buddy", "predictor_paper")["value"]) == 0.5
    assert shown("buddy", "predictor_paper")["note"] == "1 of 2 runs"
    assert shown("buddy", "predictor_tuned")["note"] == "not measured"
    # Four depths of two seeds: 1 + 2 + ... + 8 hours, per seed.
    assert (float(shown("sleb", "runs")["value"]), float(shown("sleb", "all")["value"])) == (4.0, 18.0)
    assert float(shown("sleb", "run")["value"]) == 4.5
    assert shown("pudding", "all")["value"] == ""
    # An hour at each depth, and gates of half an hour by one seed, an hour by the other, once for the four.
    assert float(shown("first", "run")["value"]) == pytest.approx(1.75)
    assert float(shown("first", "all")["value"]) == pytest.approx(4.75)
    assert "Dense |" not in (maker.folder / "tables/table9.md").read_text()


# All of it


def test_a_paper_size_study_is_rebuilt_in_thirty_seconds_without_torch(tmp_path: Path) -> None:
    maker = Maker(tmp_path, paper(seeds=3, methods=EVERY_METHOD))
    count = maker.everything(items=1000) + maker.trainings()
    assert count >= 900
    code = (
        "import sys, pathlib; from buddy.commands.report import report; "
        f"report('paper', results=pathlib.Path({str(tmp_path)!r}), all_=True); assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (maker.folder / "tables").glob("*.csv")} == {
        *(f"table{number}" for number in range(1, 15)),
        *("compare", "significance"),
    }
    # Seconds of one core: those on the clock depend on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    assert ENVIRONMENT["device"] in (maker.folder / "tables/table2.md").read_text()
