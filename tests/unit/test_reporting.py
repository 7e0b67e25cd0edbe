"""Reporting: every figure in a table is checked against one computed here from the same synthetic records."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import logging
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from records_factory import EVERY_METHOD, Maker, cell, cells, demo, methods, paper, said, scores, uniform

from buddy.commands.report import report
from buddy.errors import UserError
from buddy.reporting import figures, grid, measured, published, render, study, style, tables, write
from buddy.reporting.labels import TASK_LABELS, fraction
from buddy.reporting.measures import Measure, bootstrap
from buddy.reporting.summary import summary
from buddy.tasks import PAPERS

MAIN = "method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1"


def markdown_rows(path: Path) -> list[list[str]]:
    """Cells of a Markdown table below its header."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture
def small(tmp_path: Path) -> Maker:
    return Maker(tmp_path, demo())


# Records


def test_a_score_is_read_per_task_and_is_the_normalised_one(small: Maker) -> None:
    run = small.config.runs()[1]
    tasks = uniform(0.5) | {"piqa": {"acc": 0.6, "acc_stderr": 0.03, "acc_norm": 0.7, "acc_norm_stderr": 0.04, "n": 60}}
    small.accuracy(run, 4, tasks, limit=60)
    (found,), _ = measured.load(small.records)
    assert isinstance(found, measured.Accuracy)
    assert sorted(found.scores) == sorted(PAPERS)
    piqa, boolq = found.scores["piqa"], found.scores["boolq"]
    assert (piqa.value, piqa.stderr, piqa.n, found.limit) == (0.7, 0.04, 60, 60)
    assert boolq.value == 0.5
    assert (found.series, found.removed, found.executed, found.variant["feature"]) == (MAIN, 4, 26, "value")


def test_damaged_and_newer_records_are_named_and_left_out(small: Maker, caplog: pytest.LogCaptureFixture) -> None:
    run = small.config.runs()[1]
    good = small.accuracy(run, 4, uniform(0.5))
    content = json.loads(good.read_text())
    broken = {
        "cut": good.read_text()[:100],
        "newer": json.dumps({**content, "schema": 99}),
        "kindless": json.dumps({key: value for key, value in content.items() if key != "kind"}),
        "taskless": json.dumps({**content, "metrics": {}}),
        "scoreless": json.dumps({**content, "metrics": {"tasks": {"piqa": {"n": 3}}}}),
        "list": "[]",
    }
    for name, text in broken.items():
        (good.parent / f"{name}.json").write_text(text)
    (good.parent / ".removed~4.json.tmp.json").write_text("half")
    with caplog.at_level(logging.WARNING):
        found, _ = measured.load(small.records)
    assert [one.file for one in found] == [str(good)]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(broken)
    for name in broken:
        assert sum(str(good.parent / f"{name}.json") in message for message in warned) == 1


def test_other_kinds_are_read_and_their_numbers_are_finite(small: Maker) -> None:
    run = small.config.runs()[1]
    metrics = {"steps": 40, "final_loss": 1.5, "curve": [{"step": 1, "loss": 2.0}], "done": True}
    for kind in ("training", "calibration"):
        small.record(kind, run, 0, metrics, wall_s=7.0).write(small.records / kind / f"{run.path}.json")
    found, skipped = measured.load(small.records)
    assert not skipped
    assert [(one.kind, type(one), one.wall_s) for one in found] == [
        ("calibration", measured.Measured, 7.0),
        ("training", measured.Training, 7.0),
    ]
    path = small.records / "training" / f"{run.path}.json"
    path.write_text(path.read_text().replace("1.5", "1e999"))
    found, skipped = measured.load(small.records)
    assert [one.kind for one in found] == ["calibration"]
    assert list(skipped.values()) == ["final_loss: inf is not a number"]


def test_a_study_without_records_is_empty_not_an_error(small: Maker) -> None:
    assert measured.load(small.records) == ([], {})
    opened = study.load(small.folder)
    for name in tables.names(opened):
        built = tables.build(opened, name)
        assert built.records()
        assert {found["value"] for found in built.records()} == {None}
        assert {found["note"] for found in built.records()} == {"not measured"}
        assert render.MISSING in render.to_markdown(built)
    assert "Study demo" in summary(small.folder)


# Accuracy


def test_accuracy_average_and_error_over_tasks_and_seeds(tmp_path: Path) -> None:
    content = demo()
    content["study"]["seeds"] = [0, 3]
    maker = Maker(tmp_path, content)
    right = {0: [30, 31, 32, 33, 34, 35, 36, 37], 3: [20, 28, 30, 40, 24, 50, 33, 41]}
    items = dict(zip(PAPERS, (60, 61, 62, 63, 64, 65, 66, 67), strict=True))
    for seed, counts in right.items():
        run = maker.config.buddy_run("smollm2-135m", maker.config.study.main.model_dump(), seed)
        maker.accuracy(
            run, 8, {task: scores(k / items[task], items[task], task) for task, k in zip(PAPERS, counts, strict=True)}
        )
    write.table(study.load(maker.folder), "table2")
    path = maker.folder / "tables/table2.csv"

    shares = {seed: [k / items[task] for task, k in zip(PAPERS, counts, strict=True)] for seed, counts in right.items()}
    errors = {
        seed: [math.sqrt(p * (1 - p) / (n - 1)) for p, n in zip(values, items.values(), strict=True)]
        for seed, values in shares.items()
    }
    means = {seed: 100 * sum(values) / 8 for seed, values in shares.items()}
    whole = {seed: 100 * math.sqrt(sum(error**2 for error in values)) / 8 for seed, values in errors.items()}

    row = cell(path, removed=8, method="buddy", task="average")
    assert float(row["value"]) == pytest.approx((means[0] + means[3]) / 2, abs=1e-5)
    assert float(row["stderr"]) == pytest.approx((whole[0] + whole[3]) / 2, abs=1e-5)
    assert float(row["seed_sd"]) == pytest.approx(abs(means[0] - means[3]) / math.sqrt(2), abs=1e-5)
    assert (row["n"], row["seeds"], row["note"], row["published"]) == (str(sum(items.values())), "2", "", "")
    for place, task in enumerate(PAPERS):
        row = cell(path, removed=8, method="buddy", task=task)
        assert float(row["value"]) == pytest.approx(50 * (shares[0][place] + shares[3][place]), abs=1e-5)
        assert row["n"] == str(items[task])


def test_a_missing_seed_is_told(tmp_path: Path) -> None:
    content = demo()
    content["study"]["seeds"] = [0, 1]
    maker = Maker(tmp_path, content)
    maker.accuracy(maker.config.buddy_run("smollm2-135m", maker.config.study.main.model_dump(), 1), 4, uniform(0.5))
    opened = study.load(maker.folder)
    write.table(opened, "table2")
    row = cell(maker.folder / "tables/table2.csv", removed=4, method="buddy", task="average")
    assert (row["value"], row["seeds"], row["note"]) == ("50.0", "1", "1 of 2 seeds")
    assert "1 of 2 seeds" in (maker.folder / "tables/table2.md").read_text()


def test_records_outside_the_study_do_not_enter(small: Maker) -> None:
    """A seed and a depth that the study no longer names, and another variant."""
    main = small.config.study.main.model_dump()
    small.accuracy(small.config.buddy_run("smollm2-135m", main, 0), 4, uniform(0.5))
    small.accuracy(small.config.buddy_run("smollm2-135m", main, 9), 4, uniform(0.9))
    small.accuracy(small.config.buddy_run("smollm2-135m", {**main, "omega": 0.7}, 0), 4, uniform(0.8))
    small.accuracy(small.config.buddy_run("smollm2-135m", main, 0), 5, uniform(0.7))
    write.table(study.load(small.folder), "table2")
    path = small.folder / "tables/table2.csv"
    assert cell(path, removed=4, method="buddy", task="average")["value"] == "50.0"
    assert cells(path, removed=5) == []
    assert {row["value"] for row in cells(path)} == {"50.0", ""}


def test_an_average_needs_all_its_tasks(small: Maker) -> None:
    run = small.config.runs()[1]
    small.accuracy(run, 4, {task: found for task, found in uniform(0.5).items() if task not in ("boolq", "siqa")})
    write.table(study.load(small.folder), "table2")
    path = small.folder / "tables/table2.csv"
    assert cell(path, removed=4, task="piqa")["value"] == "50.0"
    boolq, average = cell(path, removed=4, task="boolq"), cell(path, removed=4, task="average")
    assert (boolq["value"], boolq["note"]) == ("", "not measured")
    assert (average["value"], average["note"]) == ("", "not measured: boolq, siqa")
    row = next(row for row in markdown_rows(small.folder / "tables/table2.md") if row[0] == "4")
    assert [part for part in row if part == render.MISSING] == [render.MISSING] * 3


def test_columns_are_in_the_papers_order(small: Maker) -> None:
    built = tables.build(study.load(small.folder), "table2")
    order = ("OBQA", "PIQA", "BoolQ", "SIQA", "HellaSwag", "ARC-e", "ARC-c", "WinoGrande", "Avg.")
    assert built.headers == order
    assert tuple(TASK_LABELS[task] for task in PAPERS) == order[:-1]


def test_a_study_of_fewer_tasks_says_so_and_meets_no_published_average(tmp_path: Path) -> None:
    content = paper()
    content["evaluation"] = {"tasks": ["winogrande", "piqa"]}
    maker = Maker(tmp_path, content)
    built = tables.build(study.load(maker.folder), "table10")
    assert built.headers == ("PIQA", "WinoGrande", "Avg. of 2")
    dense = {found["task"]: found["published"] for found in built.records() if found["method"] == "dense"}
    assert dense == {"piqa": 79.11, "winogrande": 69.14, "average": None}


# Ranking


def valued(*values: float | None) -> list[grid.Cell]:
    return [grid.Cell({}, Measure(value=value)) for value in values]


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ((50.0, 60.0, 55.0), (0, 1, 2)),
        ((60.001, 60.004, 55.0), ("=", "=", 0)),  # equal as shown: none is best, and the third is not the second
        ((60.0, 60.0, 60.0, 55.0), ("=", "=", "=", 0)),
        ((60.0, 55.0, 55.0, 54.0), (1, 2, 2, 0)),
        ((60.0, None, 55.0), (1, 0, 2)),
        ((60.0, None), (0, 0)),  # nothing to compare with
    ],
)
def test_best_and_second(values: tuple[float | None, ...], ranks: tuple[int | str, ...]) -> None:
    found = valued(*values)
    grid.rank(found)
    assert tuple("=" if one.near else one.rank for one in found) == ranks


def test_what_is_inside_the_noise_of_the_best_is_marked_and_nothing_bold() -> None:
    """By errors as if independent where there are no items: 1.96 times the root of 1 and 1 is 2.77."""
    cells = [grid.Cell({}, Measure(value=value, stderr=1.0)) for value in (60.0, 57.3, 57.1)]
    grid.rank(cells)
    assert [(one.rank, one.near) for one in cells] == [(0, True), (0, True), (0, False)]
    del cells[1]
    for one in cells:
        one.near = False
    grid.rank(cells)
    assert [(one.rank, one.near) for one in cells] == [(1, False), (2, False)]


def test_items_tell_apart_what_errors_do_not() -> None:
    """One is right wherever the other is, and once in ten more: paired, that is no noise."""
    ours, theirs = np.zeros(200), np.zeros(200)
    ours[:120], theirs[:100] = 100, 100
    apart = np.zeros(200)
    apart[100:] = 100
    for other, near in ((theirs, False), (apart, True)):
        cells = [
            grid.Cell({}, Measure(value=float(each.mean()), stderr=3.5, samples=(each,))) for each in (ours, other)
        ]
        grid.rank(cells)
        assert cells[0].near == cells[1].near == near
        # The bootstrap by hand, of the same difference.
        at = np.random.default_rng(1).integers(200, size=(4000, 200))
        low, high = np.percentile((ours - other)[at].mean(1), (2.5, 97.5))
        assert (low <= 0 <= high) == near


def plain(text: str) -> str:
    """A Markdown, LaTeX or HTML cell with marks of one kind: the best in stars, the second in low lines."""
    text = re.sub(r"\*\*(.*?)\*\*|\\textbf\{(.*?)\}|<b>(.*?)</b>", r"*\1\2\3*", text)
    text = re.sub(r"<u>(.*?)</u>|\\underline\{(.*?)\}", r"_\1\2_", text)
    for form, sign in (("--", "–"), (r"$\pm$", "±"), (r"$\approx$", "≈"), (r"\textless{}", "<"), (r"\%", "%")):
        text = text.replace(form, sign)
    return html.unescape(re.sub(r"\{\\scriptsize(.*?)\}|</?small>|</?span.*?>", r"\1", text)).strip()


def test_all_files_show_the_same_text_and_marks() -> None:
    shown = [*valued(60.0, 60.001, 55.0), grid.Cell({}, Measure(value=59.5, stderr=0.25), near=True)]
    for one, place in zip(shown, (1, 1, 2), strict=False):
        one.rank = place
    shown += [grid.Cell({}, Measure()), grid.Cell({}, Measure(note=""), text="p < 5 %: higher")]
    rows = [grid.Row((str(place),), [one]) for place, one in enumerate(shown)]
    whole = grid.Grid("table5", "All.", ("Row",), ("Cell",), rows, latex_errors=frozenset({0}))
    expected = ["*60.00*", "*60.00*", "_55.00_", "59.50 ± 0.25 ≈", "–", "p < 5 %: higher"]
    found = {
        "md": re.findall(r"^\| \d \| (.*) \|$", render.to_markdown(whole), re.M),
        "tex": re.findall(r"^\d & (.*) \\\\$", render.to_latex(whole), re.M),
        "html": re.findall(r"<td>(.*?)</td>", render.to_html(whole)),
    }
    assert {kind: list(map(plain, cells)) for kind, cells in found.items()} == dict.fromkeys(found, expected)
    in_csv = list(csv.DictReader(render.to_csv(whole).splitlines()))
    assert [row["value"] for row in in_csv] == ["60.0", "60.001", "55.0", "59.5", "", ""]
    assert [grid.NEAR in row["note"] for row in in_csv] == [cell.endswith("≈") for cell in expected]
    assert in_csv[-1]["note"] == expected[-1]


def test_the_summary_marks_what_the_table_marks(tmp_path: Path) -> None:
    maker = Maker(tmp_path, methods())
    for method, depths in {"shortgpt": (0.5, 0.6), "sleb": (0.5, 0.5), "pudding": (0.4, 0.4)}.items():
        for removed, share in zip((4, 8), depths, strict=True):
            maker.accuracy(maker.peer(method, removed), removed, uniform(share))
    built = tables.build(study.load(maker.folder), "table2")
    marks = [(row.cells[-1].rank, row.cells[-1].near) for row in built.rows if row.cells[-1] is not None]
    assert (marks.count((0, True)), marks.count((1, False))) == (2, 1)
    text = summary(maker.folder)
    assert text.count("50.00 ± 0.71≈") == 2
    assert text.count("60.00 ± 0.71*") == 1
    assert "≈ among the best: inside the noise (95 %)" in text
    assert grid.NOISE_NOTE in built.notes


def test_bold_and_underline_stand_within_each_depth_and_leave_dense_out(tmp_path: Path) -> None:
    content = methods()
    content["study"]["methods"] = ["dense", "buddy", "shortgpt", "sleb"]
    small = Maker(tmp_path, content)
    dense, buddy = small.config.runs()[:2]
    small.accuracy(dense, 0, uniform(0.9, 0.01))
    values = {"shortgpt": {4: 0.6, 8: 0.5}, "sleb": {4: 0.7, 8: 0.4}}
    for method, depths in values.items():
        for removed, value in depths.items():
            small.accuracy(small.peer(method, removed), removed, uniform(value, 0.01))
    small.accuracy(buddy, 4, uniform(0.65, 0.01))
    small.accuracy(buddy, 8, uniform(0.55, 0.01))
    write.table(study.load(small.folder), "table2")
    shown = {(row[0], row[1]): row[-1] for row in markdown_rows(small.folder / "tables/table2.md")}
    error = 100 * 0.01 / math.sqrt(8)
    expected = {
        ("0", "Dense"): "90.00",
        ("4", "ShortGPT"): "60.00",
        ("4", "SLEB"): "**70.00**",
        ("4", "BUDDY"): "<u>65.00</u>",
        ("8", "ShortGPT"): "<u>50.00</u>",
        ("8", "SLEB"): "40.00",
        ("8", "BUDDY"): "**55.00**",
    }
    assert {key: shown[key] for key in expected} == {key: f"{value} ± {error:.2f}" for key, value in expected.items()}
    assert list(shown)[:4] == [("0", "Dense"), ("4", "ShortGPT"), ("4", "SLEB"), ("4", "BUDDY")]
    latex = (small.folder / "tables/table2.tex").read_text()
    sleb = next(line for line in latex.splitlines() if "SLEB" in line)
    assert sleb.count(r"\textbf{70.00}") == 9
    assert latex.count(r"\underline{65.00}") == 9
    assert not re.search(r"Dense.*\\(textbf|underline)", latex)


# Methods


@pytest.fixture
def compared(tmp_path: Path) -> Maker:
    """A study of every method, with LoRA and without, and two criteria of Shortened LLaMA; nothing measured."""
    content = methods(peers={"criteria": {"shortened_llama": ["ppl", "taylor"]}})
    content["study"] |= {"lora": ["trained", "none"], "seeds": [0, 1]}
    return Maker(tmp_path, content)


AT_EACH_DEPTH = [
    *("Shortened LLaMA (PPL)", "Shortened LLaMA (Taylor)", "ShortGPT", "SLEB", "PuDDing", "FiRST", "BUDDY"),
    *("Shortened LLaMA (PPL, no LoRA)", "Shortened LLaMA (Taylor, no LoRA)", "ShortGPT (no LoRA)", "SLEB (no LoRA)"),
    *("PuDDing (no LoRA)", "FiRST (no LoRA)", "BUDDY (no LoRA)"),
]


def test_unmeasured_methods_have_rows_of_dashes_in_the_papers_order(compared: Maker) -> None:
    opened = study.load(compared.folder)
    built = tables.build(opened, "table2")
    assert [row.labels for row in built.rows] == [
        *(("0", label) for label in ("Dense", "Dense (LoRA)")),
        *(("4", label) for label in AT_EACH_DEPTH),
        *(("8", label) for label in AT_EACH_DEPTH),
    ]
    assert [row.labels for row in built.rows if row.starts_group] == [
        ("0", "Dense"),
        ("4", AT_EACH_DEPTH[0]),
        ("8", AT_EACH_DEPTH[0]),
    ]
    assert {record["value"] for record in built.records()} == {None}
    assert "\N{EN DASH} not measured." in built.notes
    assert not any("bold" in note for note in built.notes)
    text = summary(compared.folder)
    assert "Shortened LLaMA (Taylor, no LoRA)" in text
    assert "GSM8K" not in text


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"methods": ["shortened_llama"]}, ["Shortened LLaMA"]),
        ({"methods": ["shortened_llama"], "lora": ["none"]}, ["Shortened LLaMA (no LoRA)"]),
        ({"methods": ["sleb", "buddy"], "lora": ["none"]}, ["SLEB (no LoRA)", "BUDDY (no LoRA)"]),
    ],
)
def test_a_main_criterion_needs_no_words(tmp_path: Path, changes: dict, labels: list[str]) -> None:
    content = methods()
    content["study"] |= changes
    rows = tables.build(study.load(Maker(tmp_path, content).folder), "table2").rows
    assert [row.labels[1] for row in rows if row.labels[0] == "8"] == labels
    content["peers"] = {"criteria": {"shortened_llama": ["taylor"]}}
    rows = tables.build(study.load(Maker(tmp_path, content).folder), "table2").rows
    told = {"Shortened LLaMA": "Shortened LLaMA (Taylor)", "Shortened LLaMA (no LoRA)": None}
    told["Shortened LLaMA (no LoRA)"] = "Shortened LLaMA (Taylor, no LoRA)"
    assert [row.labels[1] for row in rows if row.labels[0] == "8"] == [told.get(label, label) for label in labels]


def test_seeds_of_an_untrained_static_peer_do_not_differ(compared: Maker) -> None:
    """It has one seed; what was trained has the study's two."""
    compared.accuracy(compared.peer("sleb", 4, lora="none"), 4, uniform(0.5))
    compared.accuracy(compared.peer("sleb", 4, lora="trained"), 4, uniform(0.6))
    compared.accuracy(compared.peer("pudding", 4, lora="none"), 4, uniform(0.4))
    rows = {
        (row["method"], row["lora"]): row
        for row in tables.build(study.load(compared.folder), "table2").records()
        if row["value"] is not None and row["task"] == "average"
    }
    assert {key: (row["value"], row["seeds"], row["note"]) for key, row in rows.items()} == {
        ("sleb", "none"): (pytest.approx(50.0), 1, ""),
        ("sleb", "trained"): (pytest.approx(60.0), 1, "1 of 2 seeds"),
        ("pudding", "none"): (pytest.approx(40.0), 1, "1 of 2 seeds"),
    }


def test_ranks_stand_apart_with_lora_and_without(compared: Maker) -> None:
    values = {
        ("sleb", "trained"): 0.6,
        ("shortgpt", "trained"): 0.5,
        ("first", "trained"): 0.4,
        ("sleb", "none"): 0.3,
        ("shortgpt", "none"): 0.35,
        ("pudding", "none"): 0.2,
    }
    for (method, lora), value in values.items():
        compared.accuracy(compared.peer(method, 8, lora=lora), 8, uniform(value))
    write.table(study.load(compared.folder), "table2")
    rows = markdown_rows(compared.folder / "tables/table2.md")
    shown = {row[1]: row[-1].split(" ±")[0] for row in rows if row[0] == "8" and row[-1] != render.MISSING}
    assert shown == {
        "ShortGPT": "<u>50.00</u>",
        "SLEB": "**60.00**",
        "FiRST": "40.00",
        "ShortGPT (no LoRA)": "**35.00**",
        "SLEB (no LoRA)": "<u>30.00</u>",
        "PuDDing (no LoRA)": "20.00",
    }
    text = (compared.folder / "tables/table2.md").read_text()
    assert "the best method is bold, the second underlined, with LoRA and without it apart." in text


def test_a_method_that_misses_the_depth_says_so_and_is_not_ranked(compared: Maker) -> None:
    """Two seeds of FiRST run 27.2 and 28.4 of 30 blocks where 26 were asked for; PuDDing is off by rounding only."""
    for seed, mean in ((0, 27.2), (1, 28.4)):
        runs = compared.config.method_runs("smollm2-135m", "first")
        (run,) = [run for run in runs if run.seed == seed and run.variant == {"removed": 4, "lora": "trained"}]
        compared.accuracy(run, 4, uniform(0.9), executed=mean)
    compared.accuracy(compared.peer("pudding", 4, lora="trained"), 4, uniform(0.5), executed=26.04)
    compared.accuracy(compared.peer("sleb", 4, lora="trained"), 4, uniform(0.4))
    opened = study.load(compared.folder)
    write.table(opened, "table2")
    rows = {row[1]: row[-1] for row in markdown_rows(compared.folder / "tables/table2.md") if row[0] == "4"}
    assert rows["FiRST (ran 27.8)"].startswith("90.00 ±")
    assert rows["PuDDing"].startswith("**50.00**")
    assert rows["SLEB"].startswith("<u>40.00</u>")
    assert "(ran N): the mean number of blocks that really ran" in (compared.folder / "tables/table2.md").read_text()
    path = compared.folder / "tables/table2.csv"
    first = cell(path, method="first", removed=4, lora="trained", task="average")
    assert (first["executed"], first["executed_mean"]) == ("26", "27.8")
    assert cell(path, method="first", removed=8, lora="trained", task="average")["executed_mean"] == ""
    text = summary(compared.folder)
    assert re.search(r"FiRST +90\.00 ± \d\.\d\d \[27\.8\]", text)
    assert re.search(r"PuDDing +50\.00 ± \d\.\d\d\*", text)
    with style.applied():
        figure = figures.accuracy_vs_budget(opened)
    curve = next(line for line in figure.axes[0].lines if line.get_marker() == style.mark("first").marker)
    assert list(curve.get_xdata()) == [pytest.approx(30 - 27.8, abs=0.3)]
    assert said(figure).endswith("points at the mean depth that ran")


def test_seeds_that_miss_the_depth_on_both_sides_do_not_hide_it(compared: Maker) -> None:
    runs = compared.config.method_runs("smollm2-135m", "first")
    trained = [run for run in runs if run.variant == {"removed": 4, "lora": "trained"}]
    for run, mean in zip(trained, (25.0, 27.0), strict=True):
        compared.accuracy(run, 4, uniform(0.5), executed=mean)
    labels = [row.labels[1] for row in tables.build(study.load(compared.folder), "table2").rows]
    assert "FiRST (ran 26.0)" in labels


def test_records_that_do_not_say_how_many_blocks_ran_are_shown_all_the_same(compared: Maker) -> None:
    path = compared.accuracy(compared.peer("sleb", 4, lora="trained"), 4, uniform(0.5))
    content = json.loads(path.read_text())
    del content["metrics"]["executed_mean"]
    path.write_text(json.dumps(content))
    found = tables.build(study.load(compared.folder), "table2")
    assert {row["executed_mean"] for row in found.records()} == {None}
    assert "SLEB" in [row.labels[1] for row in found.rows]
    assert 50.0 in [row["value"] for row in found.records()]


def test_a_method_that_the_study_leaves_out_has_no_row(compared: Maker) -> None:
    """Whatever was recorded of it."""
    compared.accuracy(compared.peer("sleb", 4, lora="trained"), 4, uniform(0.5))
    content = compared.config.model_dump(mode="json")
    content["study"]["methods"] = ["dense", "shortgpt"]
    (compared.folder / "study.json").write_text(json.dumps(content))
    rows = tables.build(study.load(compared.folder), "table2").rows
    assert {row.labels[1].split(" (")[0] for row in rows} == {"Dense", "ShortGPT"}


def test_published_figures_are_those_of_the_main_variant_with_lora(tmp_path: Path) -> None:
    content = paper(methods=EVERY_METHOD)
    content["study"]["lora"] = ["trained", "none"]
    content["peers"] = {"criteria": {"shortened_llama": ["ppl", "taylor"]}}
    built = tables.build(study.load(Maker(tmp_path, content).folder), "table2")
    at = [row for row in built.records() if row["removed"] == 8 and row["task"] == "average"]
    beside = {(row["method"], row["criterion"], row["lora"]): row["published"] for row in at}
    assert {key: value for key, value in beside.items() if value is not None} == {
        ("shortened_llama", "ppl", "trained"): 57.63,
        ("shortgpt", "block_influence", "trained"): 60.15,
        ("sleb", "ppl", "trained"): 57.27,
        ("pudding", None, "trained"): 52.44,
        ("first", None, "trained"): 45.99,
        ("buddy", None, "trained"): 61.24,
    }
    assert len(beside) == 14


# Generated answers


def test_answers_by_method_and_depth_with_both_filters_in_the_csv(tmp_path: Path) -> None:
    maker = Maker(tmp_path, methods())
    dense, buddy = maker.config.runs()[0], maker.main_run("smollm2-135m")
    maker.generation(dense, 0, 0.5, 0.6)
    maker.generation(buddy, 4, 0.3, 0.45, items=101)
    maker.generation(maker.peer("sleb", 4), 4, 0.2, 0.5)
    maker.generation(maker.peer("first", 4), 4, 0.4, 0.4, executed=28.9)
    opened = study.load(maker.folder)
    write.table(opened, "table12")
    rows = [row for row in markdown_rows(maker.folder / "tables/table12.md") if row[2] != render.MISSING]
    assert [row[:2] for row in rows] == [["0", "Dense"], ["4", "SLEB"], ["4", "FiRST (ran 28.9)"], ["4", "BUDDY"]]
    error = 100 * math.sqrt(0.3 * 0.7 / 100)
    # Ten points apart, of 50 and 101 problems with an error of about five: nothing to be bold about.
    assert rows[3][2] == f"30.00 ± {error:.2f} ≈"
    assert rows[1][2].endswith(" ≈")
    assert rows[2][2].startswith("40.00")
    path = maker.folder / "tables/table12.csv"
    loose = cell(path, method="buddy", removed=4, filter="flexible-extract")
    assert (loose["value"], loose["n"], loose["task"], loose["backbone"]) == ("45.0", "101", "gsm8k", "smollm2-135m")
    assert float(loose["stderr"]) == pytest.approx(100 * math.sqrt(0.45 * 0.55 / 100), abs=1e-5)
    unmeasured = cell(path, method="pudding", removed=8, filter="strict-match")
    assert (unmeasured["value"], unmeasured["note"]) == ("", "not measured")
    text = (maker.folder / "tables/table12.md").read_text()
    assert "Solved examples in the prompt: 5, answers of up to 128 new tokens." in text
    assert "\N{EN DASH} not measured." in text
    assert re.search(r"BUDDY +30\.00 ± \d\.\d\d≈", summary(maker.folder))


def test_answers_of_backbones_stand_side_by_side_where_they_have_the_depth(tmp_path: Path) -> None:
    content = paper(methods=EVERY_METHOD)
    content["study"]["removed"] = {"llama2-7b": [4, 8], "qwen2.5-7b": [8, 12]}
    content["study"] |= {"seeds": [0, 1], "lora": ["trained", "none"]}
    maker = Maker(tmp_path, content)
    built = tables.build(study.load(maker.folder), "table12")
    assert built.headers == ("qwen2.5-7b", "llama2-7b")  # as the study has them
    there = {row.labels: tuple(cell is not None for cell in row.cells) for row in built.rows}
    assert there["0", "Dense"] == (True, True)
    assert there["4", "SLEB"] == (False, True)
    assert there["8", "SLEB"] == (True, True)
    assert there["12", "BUDDY"] == (True, False)
    # The first seed answers, and the first of the two LoRA variants.
    assert len(there) == 2 + 3 * 6
    assert len(built.records()) == 2 * (2 * 2 + 2 * 2 * 6)


# Measured properties


def test_properties_are_the_largest_over_the_depths(tmp_path: Path) -> None:
    maker = Maker(tmp_path, methods())
    buddy = maker.main_run("smollm2-135m")
    maker.trace(buddy, 4, 1, [1, 1, 2, 2])
    maker.trace(buddy, 8, 3, [4, 6, 5, 9])
    maker.trace(maker.peer("first", 4), 4, 3, [1, 1, 1, 1], executed=(24, 27, 25.5))
    maker.trace(maker.peer("first", 8), 8, 4, [1, 1, 1, 1], executed=(21, 27, 24.0))
    maker.trace(maker.peer("sleb", 8), 8, 1, [1, 1, 1, 1])
    opened = study.load(maker.folder)
    write.table(opened, "table1")
    rows = {row[0]: row[1:] for row in markdown_rows(maker.folder / "tables/table1.md")}
    assert list(rows) == ["Shortened LLaMA", "ShortGPT", "SLEB", "PuDDing", "FiRST", "BUDDY"]
    # 4, 6, 5 and 9 have the mean 6, and squared distances 4, 0, 1 and 9 from it.
    assert rows["BUDDY"] == ["0", "1", "3", f"6.00 ± {math.sqrt(14 / 3 / 4):.2f}"]
    assert rows["FiRST"] == ["5", "2", "4", "1.00 ± 0.00"]  # 27 blocks ran where 22 were asked for
    assert rows["SLEB"] == ["0", "2", "1", "1.00 ± 0.00"]
    assert rows["PuDDing"] == [render.MISSING, "2", render.MISSING, render.MISSING]
    path = maker.folder / "tables/table1.csv"
    shown = cell(path, method="buddy", metric="distinct_paths_per_generation", over_depths="largest")
    assert (shown["removed"], shown["dataset"], shown["n"]) == ("8", "alpaca", "4")
    assert cell(path, method="sleb", metric="largest_deviation", over_depths="largest")["note"] == "1 of 2 depths"
    every = cells(path, method="first", metric="largest_deviation", over_depths="")
    assert {row["removed"]: row["value"] for row in every} == {"4": "2.0", "8": "5.0"}
    assert cell(path, method="first", metric="executed_mean", removed=8, over_depths="")["value"] == "24.0"
    text = (maker.folder / "tables/table1.md").read_text()
    assert "distinct paths of the prefills of 4 prompts of alpaca" in text
    assert "up to 16 tokens" in text
    assert "Incomplete: some cells have 1 of 2 depths." in text


def test_properties_of_several_data_sets_take_the_largest(tmp_path: Path) -> None:
    maker = Maker(tmp_path, methods(trace={"datasets": ["alpaca", "samsum"]}))
    buddy = maker.main_run("smollm2-135m")
    maker.trace(buddy, 4, 2, [1, 1])
    maker.trace(buddy, 4, 5, [3, 4], dataset="samsum")
    row = tables.build(study.load(maker.folder), "table1").rows[-1]
    assert [cell and cell.measure.value for cell in row.cells] == [0.0, 1.0, 5.0, 3.5]
    assert row.cells[2] is not None
    assert row.cells[2].at["dataset"] == "samsum"


# Speed of all methods


def test_every_method_is_measured_against_the_dense_model_of_its_own_race(tmp_path: Path) -> None:
    maker = Maker(tmp_path, methods())
    buddy, pudding = maker.main_run("smollm2-135m"), maker.peer("pudding", 8)
    race = ("alpaca", 1, "eager")

    def speedup(ratio: float) -> dict[str, list[float]]:
        return {f"{phase}_speedup": [ratio, ratio] for phase in ("prefill", "decode")}

    maker.latency(buddy, race, "dense", 0, [100.0, 100.0], [10.0, 10.0])
    maker.latency(buddy, race, "sliced", 8, [140.0, 140.0], [14.0, 14.0], **speedup(1.4))
    maker.latency(buddy, race, "recompute", 8, [130.0, 130.0], [13.0, 13.0], **speedup(1.3))
    # The machine was slower by half when the peers were timed.
    maker.latency(pudding, race, "dense", 0, [50.0, 50.0], [5.0, 5.0])
    maker.latency(pudding, race, "reuse", 8, [60.0, 60.0], [6.5, 6.5], **speedup(1.25))
    first = maker.peer("first", 8)
    maker.latency(first, race, "reuse", 8, [40.0, 40.0], [4.5, 4.5], **speedup(0.9), executed_mean=28.25)
    opened = study.load(maker.folder)
    write.table(opened, "table14")
    rows = markdown_rows(maker.folder / "tables/table14.md")
    assert [row[:2] for row in rows] == [
        ["0", "Dense"],
        *(["4", label] for label in ("Static (sliced)", "PuDDing", "FiRST", "BUDDY")),
        *(["8", label] for label in ("Static (sliced)", "PuDDing", f"FiRST (ran 28.2 / {render.MISSING})", "BUDDY")),
    ]
    shown = {row[1].split(" (ran")[0]: [part.split(" ±")[0] for part in row[2:6]] for row in rows if row[0] != "4"}
    assert shown == {
        "Dense": ["100.0", "1.00", "10.0", "1.00"],
        "Static (sliced)": ["140.0", "1.40", "14.0", "1.40"],
        "PuDDing": ["60.0", "1.25", "6.5", "1.25"],
        "FiRST": ["40.0", "0.90", "4.5", "0.90"],
        "BUDDY": ["130.0", "1.30", "13.0", "1.30"],
    }
    assert {part for row in rows for part in row[6:]} == {render.MISSING}  # SAMSum was not timed
    text = (maker.folder / "tables/table14.md").read_text()
    assert "the dense row is that of BUDDY's race" in text
    path = maker.folder / "tables/table14.csv"
    found = cell(path, method="first", removed=8, dataset="alpaca", metric="decode_tok_s")
    assert (found["executed"], found["executed_mean"], found["execution"]) == ("22", "28.25", "reuse")
    assert re.search(r"Alpaca +8 +FiRST \(ran 28\.2\) +40\.0 +0\.90x", summary(maker.folder))


def test_batch_and_engine_of_all_methods_are_named_where_there_are_several(tmp_path: Path) -> None:
    content = methods()
    content["latency"] = {"methods": ["pudding"], "batch_sizes": [4, 1], "datasets": ["samsum"]}
    maker = Maker(tmp_path, content)
    for engine in ("eager", "graph"):
        maker.latency(maker.peer("pudding", 4), ("samsum", 4, engine), "dense", 0, [9.0, 9.0], [9.0, 9.0])
    built = tables.build(study.load(maker.folder), "table14")
    assert built.label_headers == ("Batch", "Engine", "Removed", "Method")
    assert [row.labels for row in built.rows] == [
        (size, engine, removed, label)
        for size in ("1", "4")
        for engine in ("eager", "graph")
        for removed, label in (("0", "Dense"), ("4", "PuDDing"), ("8", "PuDDing"))
    ]
    values = {row.labels[:2]: row.cells[0].measure.value for row in built.rows if row.labels[3] == "Dense"}  # type: ignore[union-attr]
    assert values == {("1", "eager"): None, ("1", "graph"): None, ("4", "eager"): 9.0, ("4", "graph"): 9.0}


def test_a_study_that_times_no_method_of_its_own_has_an_empty_table(tmp_path: Path) -> None:
    content = methods(latency={"methods": ["first"]})
    content["study"]["methods"] = ["dense", "sleb"]
    built = tables.build(study.load(Maker(tmp_path, content).folder), "table14")
    assert built.rows == []
    assert "Table 14" in render.to_markdown(built)
    assert r"\end{tabular}" in render.to_latex(built)


# Limits


def test_limited_records_carry_a_dagger(small: Maker) -> None:
    dense, buddy = small.config.runs()[:2]
    small.accuracy(dense, 0, uniform(0.6))
    small.accuracy(buddy, 4, uniform(0.5), limit=25)
    opened = study.load(small.folder)
    write.table(opened, "table2")
    rows = markdown_rows(small.folder / "tables/table2.md")
    assert [row[1] for row in rows] == ["Dense", "BUDDY †", "BUDDY", "BUDDY"]
    assert "† limited to 25 items per task." in (small.folder / "tables/table2.md").read_text()
    assert r"BUDDY$^\dagger$" in (small.folder / "tables/table2.tex").read_text()
    found = cell(small.folder / "tables/table2.csv", removed=4, task="average")
    assert (found["limit"], found["note"]) == ("25", "limited to 25 items per task")
    write.table(opened, "table6")
    assert [row[0] for row in markdown_rows(small.folder / "tables/table6.md")] == ["none", "taylor †"]
    assert "BUDDY †" in summary(small.folder)
    with style.applied():
        assert "limited to 25 items per task" in said(figures.accuracy_vs_budget(opened))


# Ablations


def test_ablation_cells_are_averages_of_their_variant_with_the_best_bold(small: Maker) -> None:
    main = small.config.study.main.model_dump()
    for prior, value in (("none", 0.6), ("taylor", 0.5)):
        small.accuracy(small.config.buddy_run("smollm2-135m", {**main, "prior": prior}, 0), 4, uniform(value))
    write.table(study.load(small.folder), "table6")
    error = 100 * 0.02 / math.sqrt(8)
    gap = render.MISSING
    assert markdown_rows(small.folder / "tables/table6.md") == [
        ["none", f"**60.00** ± {error:.2f}", gap, gap],
        ["taylor", f"50.00 ± {error:.2f}", gap, gap],
    ]
    row = cell(small.folder / "tables/table6.csv", prior="none", removed=4)
    assert (row["value"], row["omega"], row["feature"], row["task"]) == ("60.0", "0.0", "value", "average")


def test_two_axes_give_rows_of_combinations(tmp_path: Path) -> None:
    content = demo()
    content["study"]["ablations"][0] |= {"omega": [0.1, 0.5]}
    maker = Maker(tmp_path, content)
    built = tables.build(study.load(maker.folder), "table6")
    assert built.label_headers == ("Prior", "Omega")
    # Without a prior omega does nothing: the two combinations are one run, and one row.
    assert [row.labels for row in built.rows] == [("none", "(no prior)"), ("taylor", "0.1"), ("taylor", "0.5")]


# Latency

ALPACA = ("alpaca", 1, "eager")


def test_latency_rates_speed_ups_and_spread(small: Maker) -> None:
    """The machine slows down by a third in the third pass: rates spread, ratios within a pass do not."""
    run = small.config.runs()[1]
    drift = (1.0, 0.98, 0.66)
    dense, sliced, own = ([rate * slow for slow in drift] for rate in (100.0, 150.0, 120.0))
    own[1] *= 1.1
    small.latency(run, ALPACA, "dense", 0, dense, dense)
    speed = [mine / theirs for mine, theirs in zip(sliced, dense, strict=True)]
    small.latency(run, ALPACA, "sliced", 8, sliced, sliced, prefill_speedup=speed, decode_speedup=speed)
    speed = [mine / theirs for mine, theirs in zip(own, dense, strict=True)]
    share = [mine / theirs for mine, theirs in zip(own, sliced, strict=True)]
    both = {f"{phase}_speedup": speed for phase in ("prefill", "decode")}
    both |= {f"{phase}_of_sliced": share for phase in ("prefill", "decode")}
    small.latency(run, ALPACA, "recompute", 8, own, own, **both)
    write.table(study.load(small.folder), "table4")
    path = small.folder / "tables/table4.csv"
    at = {"dataset": "alpaca", "removed": 8, "execution": "recompute", "method": "buddy"}

    rate = cell(path, metric="prefill_tok_s", **at)
    assert [float(rate[key]) for key in ("value", "p10", "p90")] == pytest.approx([120.0, 87.36, 127.488])
    assert (rate["unit"], rate["n"], rate["batch_size"], rate["engine"]) == ("tok/s", "3", "1", "eager")
    speed_up = cell(path, metric="decode_speedup", **at)
    assert float(speed_up["value"]) == pytest.approx(1.2)
    deciles = statistics.quantiles([1.2, 1.32, 1.2], n=10, method="inclusive")
    assert float(speed_up["p10"]) == pytest.approx(deciles[0])
    assert float(speed_up["p90"]) == pytest.approx(deciles[-1])
    # The median of three draws from {1.2, 1.2, 1.32} is 1.32 in 7 of 27 cases, counted by hand.
    assert float(speed_up["stderr"]) == pytest.approx(0.12 * math.sqrt(7 / 27 * 20 / 27), rel=0.05)
    assert float(rate["stderr"]) > 10 * float(speed_up["stderr"])
    share_of_limit = cell(path, metric="prefill_of_sliced", **at)
    assert float(share_of_limit["value"]) == pytest.approx(0.8)
    assert cell(path, metric="prefill_speedup", execution="dense", dataset="alpaca")["value"] == "1.0"
    assert cells(path, metric="peak_memory_mb") == []  # a CPU has none to tell

    rows = markdown_rows(small.folder / "tables/table4.md")
    assert [row[:3] for row in rows if row[0] == "Alpaca"] == [
        ["Alpaca", "0", "Dense"],
        ["Alpaca", "4", "BUDDY (recompute)"],
        ["Alpaca", "8", "Sliced"],
        ["Alpaca", "8", "BUDDY (recompute)"],
        ["Alpaca", "12", "BUDDY (recompute)"],
    ]
    assert rows[1][3:] == [render.MISSING, render.MISSING, "", render.MISSING, render.MISSING, ""]
    text = (small.folder / "tables/table4.md").read_text()
    assert "over 8 prompts, 32 new tokens, batch 1." in text  # what the records say, not the settings (32 prompts)
    assert "Of ideal" not in text


def test_records_of_the_old_form_are_named_and_left_out(small: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """Ratios as bare numbers, no engine: written before batch sizes and engines were told apart."""
    run = small.config.runs()[1]
    path = small.latency(run, ALPACA, "recompute", 8, [9.0, 9.0], [9.0, 9.0])
    content = json.loads(path.read_text())
    for key in ("engine", "capture", "removed_per_sequence", "prefill_of_ideal", "decode_of_ideal"):
        del content["metrics"][key]
    path.write_text(json.dumps(content))
    small.latency(run, ALPACA, "dense", 0, [7.0, 7.0], [7.0, 7.0])
    found, _ = measured.load(small.records)
    assert [one.execution for one in found] == ["dense"]
    assert f"skipped {path}: not a complete record" in caplog.text
    content["metrics"] |= {"engine": "eager", "decode_speedup": 1.3}
    path.write_text(json.dumps(content))
    assert [one.execution for one in measured.load(small.records)[0]] == ["dense"]


def test_memory_bandwidth_and_capture_are_shown_where_there_are_some(small: Maker) -> None:
    run = small.config.runs()[1]
    more = {"decode_gb_s": 900.0, "copy_gb_s": 1200.0, "peak_memory_mb": 512.0}
    small.latency(run, ALPACA, "dense", 0, [9.0, 9.0], [9.0, 9.0], **more)
    built = tables.build(study.load(small.folder), "table4")
    assert built.headers[-3:] == ("GB/s", "Of copy", "Peak MB")
    found = {row["metric"]: row["value"] for row in built.records() if row["execution"] == "dense"}
    assert (found["decode_gb_s"], found["decode_of_copy"], found["peak_memory_mb"]) == (900.0, 0.75, 512.0)
    assert not any("Capturing" in note for note in built.notes)
    captured = {"capture": {"seconds": 3.25, "memory_mb": 41.6, "graphs": 5}}
    small.latency(run, ("alpaca", 1, "graph"), "dense", 0, [9.0, 9.0], [9.0, 9.0], **captured)
    notes = tables.build(study.load(small.folder), "table4").notes
    assert "Capturing the graphs of one execution took at most 3.2 s and 42 MB." in notes


def test_the_best_and_the_worst_case_stand_in_one_table(tmp_path: Path) -> None:
    """Routes of the trained router, and varied ones on their own and under bounds, with what a step of the batch calls."""
    maker = Maker(tmp_path, demo(latency={"datasets": ["alpaca"], "batch_sizes": [8]}))
    run, race = maker.main_run("smollm2-135m"), ("alpaca", 8, "eager")
    maker.latency(run, race, "dense", 0, [9.0, 9.0], [9.0, 9.0], called_mean=30.0, paths_mean=1.0)
    maker.latency(
        run, race, "full", 0, [8.9, 8.9], [8.9, 8.9], called_mean=30.0, paths_mean=1.0, decode_speedup=[0.99, 0.99]
    )
    maker.latency(run, race, "recompute", 8, [9.0, 9.0], [12.0, 12.0], called_mean=22.0, paths_mean=1.0)
    for slack, called, share in ((4, 26.0, 0.97), (None, 29.5, 0.93), (0, 22.0, 0.96)):
        more = {"slack": slack, "called_mean": called, "paths_mean": 8.0, "decode_of_called": [share, share]}
        maker.latency(run, race, "varied", 8, [9.0, 9.0], [10.0, 10.0], **more)
    nested = {"slack": 0, "removed_per_sequence": [4, 8] * 4, "called_mean": 26.0, "paths_mean": 2.0}
    maker.latency(run, race, "nested", 6, [9.0, 9.0], [10.0, 10.0], **nested)
    built = tables.build(study.load(maker.folder), "table4")
    assert built.headers[:2] == ("Paths", "Called")
    assert "Of called" in built.headers
    varied = "BUDDY (varied routes)"
    shown = [row.labels[1:] for row in built.rows]
    assert shown[:2] == [("0", "Dense"), ("0", "BUDDY (all blocks)")]
    at_eight = shown.index(("8", "BUDDY (recompute)"))
    assert shown[at_eight + 1 : at_eight + 4] == [
        ("8", varied),
        ("8", f"{varied}, slack 0"),
        ("8", f"{varied}, slack 4"),
    ]
    assert shown[-1] == ("4\N{EN DASH}8", "BUDDY (nested budgets)")
    found = {
        row.get("slack"): row["value"]
        for row in built.records()
        if row["metric"] == "decode_of_called" and row["value"]
    }
    assert found == {None: 0.93, 0: 0.96, 4: 0.97}
    assert any("0: one set for all" in note for note in built.notes)


EVERY = ["dense", "sliced", "reuse", "recompute", "mixed"]


def test_batch_and_engine_are_columns_where_there_are_several(tmp_path: Path) -> None:
    maker = Maker(tmp_path, demo(latency={"datasets": ["samsum"], "batch_sizes": [4, 1], "executions": EVERY}))
    maker.everything(engines=("eager", "graph"))
    opened = study.load(maker.folder)
    built = tables.build(opened, "table4")
    assert built.label_headers == ("Data set", "Batch", "Engine", "Removed", "Execution")
    assert [row.labels[1:3] for row in built.rows if row.starts_group] == [
        ("1", "eager"),
        ("1", "graph"),
        ("4", "eager"),
        ("4", "graph"),
    ]
    assert len(built.rows) == 4 * (1 + 3 * 3) + 2
    mixed = [row for row in built.rows if "mixed budgets" in row.labels[-1]]
    assert [row.labels[1:4] for row in mixed] == [("4", engine, "0\N{EN DASH}12") for engine in ("eager", "graph")]
    assert len({len(row.cells) for row in built.rows} | {len(built.headers)}) == 1
    for race in (("samsum", 4, "eager"), ("samsum", 1, "graph")):
        place = "dataset~{}/batch~{}/engine~{}/execution~reuse/removed~8.json".format(*race)
        path = maker.records / "latency" / maker.main_run("smollm2-135m").path / place
        values = json.loads(path.read_text())["metrics"]["decode_of_sliced"]["values"]
        at = {"execution": "reuse", "removed": 8, "metric": "decode_of_sliced"}
        at |= dict(zip(("dataset", "batch_size", "engine"), race, strict=True))
        shown = [row for row in built.records() if at.items() <= row.items()]
        assert [row["value"] for row in shown] == [pytest.approx(statistics.median(values))]

    write.table(opened, "table4")
    path = maker.folder / "tables/table4.csv"
    ideal = cell(path, execution="mixed", engine="eager", metric="decode_of_ideal")
    assert (ideal["removed"], ideal["removed_per_sequence"], ideal["batch_size"]) == ("6", "0 4 8 12", "4")
    assert cells(path, execution="recompute", metric="decode_of_ideal") == []
    assert cell(path, execution="recompute", removed=4, batch_size=1, engine="eager", metric="decode_gb_s")
    alone = [row for row in built.rows if row.labels[1] == "1" and "mixed" in row.labels[-1]]
    assert alone == []


def test_batch_sizes_and_engines_outside_the_study_do_not_enter(tmp_path: Path) -> None:
    maker = Maker(tmp_path, demo(latency={"datasets": ["alpaca"], "engines": ["eager"]}))
    run = maker.main_run("smollm2-135m")
    for race, rate in ((ALPACA, 10.0), (("alpaca", 4, "eager"), 20.0), (("alpaca", 1, "graph"), 30.0)):
        maker.latency(run, race, "dense", 0, [rate, rate], [rate, rate])
    built = tables.build(study.load(maker.folder), "table4")
    assert built.label_headers == ("Data set", "Removed", "Execution")
    assert {row["value"] for row in built.records() if row["metric"] == "decode_tok_s"} == {10.0, None}


def test_figure_and_summary_show_the_smallest_batch_and_graphs_where_they_were_timed(tmp_path: Path) -> None:
    maker = Maker(tmp_path, demo(latency={"datasets": ["alpaca"], "batch_sizes": [4, 2]}))
    run = maker.main_run("smollm2-135m")

    def timed(size: int, engine: str, speed: float) -> None:
        race = ("alpaca", size, engine)
        maker.latency(run, race, "dense", 0, [10.0, 10.0], [10.0, 10.0])
        ratios = {"prefill_speedup": [speed, speed], "decode_speedup": [speed, speed]}
        maker.latency(run, race, "recompute", 8, [10 * speed] * 2, [10 * speed] * 2, **ratios)

    def drawn() -> tuple[set[float], str]:
        with style.applied():
            figure = figures.speed_ups(study.load(maker.folder))
        curves = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "o"]
        return {float(y) for line in curves for y in line.get_ydata()}, said(figure).split("; ")[1]

    timed(4, "eager", 1.5)
    assert drawn() == ({1.5}, "batch 4, engine eager")
    timed(2, "eager", 1.25)
    assert drawn() == ({1.25}, "batch 2, engine eager")
    timed(2, "graph", 1.75)
    assert drawn() == ({1.75}, "batch 2, engine graph")
    text = summary(maker.folder)
    assert "Speed of smollm2-135m, batch 2, engine graph, tokens/s, median of the timed passes" in " ".join(
        text.split()
    )
    assert "1.75x" in text
    assert "1.25x" not in text


def test_one_sequence_timed_eagerly_needs_no_words(small: Maker) -> None:
    small.everything()
    assert "Speed of smollm2-135m, tokens/s, median of the timed passes" in summary(small.folder)
    with style.applied():
        told = said(figures.speed_ups(study.load(small.folder)))
    assert told == "smollm2-135m on cpu (Synthetic); bars: 10th to 90th percentile of the timed passes"


# Breakdown

PARTS = {"backbone": 60.0, "decision": 4.0, "gather_scatter": 3.0, "cache": 8.0, "other": 5.0}


def test_breakdown_shows_every_component_with_its_share(small: Maker) -> None:
    run = small.main_run("smollm2-135m")
    phases = {"prefill": PARTS, "decode": {name: spent / 2 for name, spent in PARTS.items()} | {"other": 0.0}}
    small.breakdown(run, 8, phases, {512: ([0.1, 0.3, 0.2], [4.0, 5.0, 9.0]), 128: ([0.2, 0.2], [1.0, 1.0])})
    write.table(study.load(small.folder), "table8")
    path = small.folder / "tables/table8.csv"
    for phase, parts in phases.items():
        for component, spent in parts.items():
            at = {"removed": 8, "phase": phase, "component": component}
            assert float(cell(path, metric="ms", **at)["value"]) == spent
            assert float(cell(path, metric="percent", **at)["value"]) == pytest.approx(
                100 * spent / sum(parts.values())
            )
        assert float(cell(path, removed=8, phase=phase, component="total")["value"]) == sum(parts.values())
    rows = markdown_rows(small.folder / "tables/table8.md")
    assert [row[:3] for row in rows if row[0] == "8"] == [
        ["8", "Backbone compute", "60.00"],
        ["8", "Decision Module", "4.00"],
        ["8", "Gather/scatter", "3.00"],
        ["8", "K/V cache", "8.00"],
        ["8", "Other", "5.00"],
        ["8", "Total", "80.00"],
        ["8", "Without the profiler", "72.00"],
    ]
    assert {part for row in rows if row[0] == "4" for part in row[2:]} == {render.MISSING, ""}

    cost = cell(path, context=512, metric="routing_ms")
    assert (float(cost["value"]), cost["unit"], cost["n"]) == (0.2, "ms", "5")
    assert float(cell(path, context=512, metric="reread_ms")["value"]) == 5.0
    text = (small.folder / "tables/table8.md").read_text()
    assert "**Routing cost.**" in text
    below = text[text.index("**Routing cost.**") :]
    assert re.findall(r"^\| (\d+) \| ([0-9.]+) ± .*\|", below, re.M) == [("128", "0.200"), ("512", "0.200")]
    assert "88.45" not in text  # the paper profiled another backbone
    assert (small.folder / "tables/table8.tex").read_text().count(r"\begin{tabular}") == 2


def test_breakdown_shows_what_the_predictor_costs(small: Maker) -> None:
    run = small.main_run("smollm2-135m")
    asked = {"prefill": {**PARTS, "predictor": 2.0}, "decode": PARTS}
    for removed in (4, 8):
        small.breakdown(run, removed, {"prefill": PARTS, "decode": PARTS}, {}, auto=(22.4, asked))
    write.table(study.load(small.folder), "table8")
    rows = markdown_rows(small.folder / "tables/table8.md")
    assert [row[:4] for row in rows if row[0] == "auto"][2] == ["auto", "Budget Predictor", "2.00", "2.44"]
    assert [row[2] for row in rows if row[0] == "auto"] == [
        "60.00",
        "4.00",
        "2.00",
        "3.00",
        "8.00",
        "5.00",
        "82.00",
        "73.80",
    ]
    assert [row[2] for row in rows if row[0] == "4"] == ["60.00", "4.00", "3.00", "8.00", "5.00", "80.00", "72.00"]
    assert "here 22.4 blocks on average" in (small.folder / "tables/table8.md").read_text()
    path = small.folder / "tables/table8.csv"
    found = cell(path, execution="auto", phase="prefill", component="predictor", metric="ms")
    assert (found["value"], found["removed"]) == ("2.0", "")


def test_a_study_without_a_breakdown_has_no_routing_cost(small: Maker) -> None:
    built = tables.build(study.load(small.folder), "table8")
    assert built.below is None
    assert len(built.rows) == 3 * 7


def test_the_papers_breakdown_stands_beside_its_shape_only(tmp_path: Path) -> None:
    maker = Maker(tmp_path, paper())
    run = maker.main_run("llama2-7b")
    maker.breakdown(run, 4, {"prefill": PARTS, "decode": PARTS}, {})
    maker.breakdown(run, 8, {"prefill": PARTS, "decode": PARTS}, {}, shape=(1, 256))
    built = tables.build(study.load(maker.folder), "table8")
    beside = {
        (row["removed"], row["component"], row["metric"]): row["published"]
        for row in built.records()
        if row["published"] is not None
    }
    assert {key: value for key, value in beside.items() if key[0] == 4} == {
        (4, "backbone", "ms"): 64.11,
        (4, "backbone", "percent"): 79.5,
        (4, "decision", "ms"): 4.58,
        (4, "decision", "percent"): 5.67,
        (4, "gather_scatter", "ms"): 2.64,
        (4, "gather_scatter", "percent"): 3.28,
    }
    assert {key[0] for key in beside} == {4, 12, 16}  # at 8 one sequence was profiled, the paper's pass has five
    assert {row["phase"] for row in built.records() if row["published"] is not None} == {"prefill"}
    shares = [row["percent"] for row in published.load("breakdown")]
    assert any(f"{' + '.join(f'{share:.2f}' for share in shares)} = {sum(shares):.2f}" in note for note in built.notes)


def test_bootstrap_error_of_a_median() -> None:
    """Against the exact value: all 27 resamples of three passes, counted by hand."""
    # The median of three draws from {1, 2, 3} is 1 in 7, 2 in 13 and 3 in 7 of 27 cases.
    exact = math.sqrt(14 / 27)
    assert bootstrap((1.0, 2.0, 3.0)) == pytest.approx(exact, rel=0.05)
    assert bootstrap((5.0, 5.0)) == 0
    assert bootstrap((5.0,)) is None


# Published figures


def test_published_files_are_complete() -> None:
    for name in published.FILES:
        assert published.load(name)
    rows = published.load("accuracy")
    for row in rows:
        tasks = [*row][5:13]
        assert tasks == ["obqa", *list(PAPERS)[1:5], "arc_easy", "arc_challenge", "winogrande"]
        assert sum(row[task] for task in tasks) / 8 == pytest.approx(row["avg"], abs=0.011)
    with pytest.raises(UserError, match="accuracy"):
        published.load("accurate")


@pytest.mark.parametrize(
    ("table", "wanted", "expected"),
    [
        ("table2", {"method": "buddy", "removed": 8, "task": "boolq"}, 75.26),
        ("table2", {"method": "dense", "removed": 0, "task": "average"}, 67.44),
        ("table3", {"method": "buddy", "removed": 16, "task": "arc_challenge"}, 27.99),  # known by its repository
        ("table10", {"method": "sleb", "removed": 12, "task": "openbookqa"}, 36.00),
        ("table11", {"method": "buddy", "removed": 20, "task": "average"}, 51.85),
        ("table5", {"feature": "key+value", "removed": 12}, 49.34),
        ("table6", {"prior": "none", "removed": 16}, 44.78),
        ("table7", {"omega": "1.0", "removed": 4}, 61.57),
        ("table13", {"source_block": 3, "removed": 16}, 47.80),
        ("table4", {"execution": "dense", "dataset": "samsum", "metric": "decode_tok_s"}, 60.70),
        ("table4", {"execution": "recompute", "dataset": "alpaca", "removed": 16, "metric": "prefill_speedup"}, 1.91),
        ("table4", {"execution": "reuse", "dataset": "alpaca", "removed": 16, "metric": "prefill_speedup"}, None),
        ("table8", {"removed": 8, "phase": "prefill", "component": "decision", "metric": "percent"}, 5.67),
        ("table8", {"removed": 8, "phase": "decode", "component": "decision", "metric": "percent"}, None),
        ("table4", {"execution": "sliced", "dataset": "alpaca", "removed": 16, "metric": "prefill_speedup"}, None),
        ("table2", {"method": "first", "removed": 4, "task": "boolq"}, 63.58),
        ("table3", {"method": "shortened_llama", "removed": 16, "task": "average"}, 43.80),
        ("table10", {"method": "dense_lora", "removed": 0, "task": "average"}, None),  # the paper has no such row
        ("table12", {"backbone": "llama2-7b", "method": "dense", "filter": "strict-match"}, 14.03),
        ("table12", {"backbone": "qwen2.5-7b", "method": "buddy", "removed": 8, "filter": "strict-match"}, 14.63),
        ("table12", {"backbone": "qwen2.5-7b", "method": "buddy", "removed": 8, "filter": "flexible-extract"}, None),
        ("table12", {"backbone": "llama2-7b", "method": "sleb", "removed": 12, "filter": "strict-match"}, None),
        ("table14", {"method": "dense", "dataset": "samsum", "metric": "decode_tok_s"}, 60.70),
        ("table14", {"method": "buddy", "dataset": "alpaca", "removed": 12, "metric": "decode_speedup"}, 1.30),
        ("table14", {"method": "pudding", "dataset": "samsum", "removed": 16, "metric": "decode_tok_s"}, 124.85),
        ("table14", {"method": "first", "dataset": "alpaca", "removed": 8, "metric": "prefill_speedup"}, 1.02),
        ("table14", {"method": "sliced", "dataset": "alpaca", "removed": 8, "metric": "prefill_speedup"}, None),
    ],
)
def test_published_figures_stand_beside_the_same_cell(
    papers: Maker, table: str, wanted: dict[str, object], expected: float | None
) -> None:
    row = cell(papers.folder / "tables" / f"{table}.csv", **wanted)
    if expected is None:
        assert (row["published"], row["difference"]) == ("", "")
    else:
        assert float(row["published"]) == expected
        assert float(row["difference"]) == pytest.approx(float(row["value"]) - expected, abs=1e-5)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """The paper's study, all measured, all built."""
    maker = Maker(tmp_path_factory.mktemp("papers"), paper(methods=EVERY_METHOD))
    maker.everything()
    opened = study.load(maker.folder)
    for name in tables.names(opened):
        write.table(opened, name)
    write.comparison(opened)
    return maker


def test_markdown_shows_the_published_figure_in_parentheses(papers: Maker) -> None:
    text = (papers.folder / "tables/table10.md").read_text()
    assert re.search(r"\| 0 \| Dense \|.*\(64\.36\) \|", text)
    assert "In parentheses: the figure published in the paper." in text
    latex = (papers.folder / "tables/table10.tex").read_text()
    assert "64.36" not in latex
    assert "parentheses" not in latex


def test_another_backbone_or_variant_has_no_published_figure(tmp_path: Path) -> None:
    def shown(content: dict, table: str) -> set[float | None]:
        maker = Maker(tmp_path / str(time.monotonic_ns()), content)
        return {found["published"] for found in tables.build(study.load(maker.folder), table).records()}

    assert {value for table in ("table2", "table4", "table6", "table8") for value in shown(demo(), table)} == {None}
    random = paper()
    random["backbones"] = {
        **random["backbones"],
        "llama2-7b": {"source": {"random": "llama2-7b"}, "blocks": 32, "removed": [4]},
    }
    assert shown(random, "table10") == {None}  # random weights have no accuracy to compare
    assert 1753.16 in shown(random, "table4")  # their speed is the architecture's
    assert 64.11 in shown(random, "table8")
    random["latency"] = {**random["latency"], "batch_sizes": [4]}
    assert shown(random, "table4") == {None}  # the paper decodes one sequence
    other = paper()
    other["study"]["main"] = {"omega": 0.5}
    values = shown(other, "table6")
    assert values == {None, 62.21, 58.32, 52.44, 44.78}  # only the rows without a prior are the paper's
    assert 62.63 not in shown(other, "table10")
    assert 64.36 in shown(other, "table10")


# LaTeX


def test_latex_is_escaped() -> None:
    assert render.escape("a_b 5% c&d #1 {x} \N{EN DASH} ± †") == r"a\_b 5\% c\&d \#1 \{x\} -- $\pm$ $^\dagger$"
    assert render.escape("Müller") == "M?ller"


def test_latex_is_booktabs_with_equal_columns(papers: Maker) -> None:
    for path in sorted((papers.folder / "tables").glob("*.tex")):
        text = path.read_text()
        tabulars = re.findall(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}(.*?)\\end\{tabular\}", text, re.S)
        if path.stem not in ("compare", "significance"):  # they take several pages
            assert len(tabulars) == (2 if path.stem == "table8" else 1)
        for columns, body in tabulars:
            rows = [line for line in body.splitlines() if line.endswith(r"\\")]
            assert {line.count(" & ") + 1 for line in rows} == {len(columns)}, path
            for rule in ("toprule", "midrule", "bottomrule"):
                assert f"\\{rule}" in body
        assert not re.search(r"(?<!\\)[_%]", re.sub(r"^%.*|\\label\{.*\}|.*\\begin.*", "", text, flags=re.M)), path


@pytest.mark.skipif(
    shutil.which("pdflatex") is None and not os.environ.get("BUDDY_REQUIRE_LATEX"), reason="pdflatex is not installed"
)
@pytest.mark.parametrize("name", ["table4", "table14"])
def test_latex_says_how_sure_a_speed_up_is(papers: Maker, name: str) -> None:
    built = tables.build(study.load(papers.folder), name)
    text = render.to_latex(built)
    errors = [
        cell.measure.stderr for row in built.rows for cell in row.cells if cell and "speedup" in cell.at["metric"]
    ]
    assert text.count(r"{\scriptsize$\pm$") >= sum(error is not None for error in errors) > 0


@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_latex_compiles_and_nothing_is_wider_than_its_place(papers: Maker, tmp_path: Path, columns: str) -> None:
    paths = sorted((papers.folder / "tables").glob("*.tex"))
    inputs = "\n".join(rf"\input{{{path}}}\clearpage\typeout{{WIDE {path.stem} \the\wd\buddytable}}" for path in paths)
    (tmp_path / "all.tex").write_text(
        rf"\documentclass[{columns}]{{article}}\usepackage{{booktabs}}\usepackage{{graphicx}}\begin{{document}}"
        f"\n{inputs}\n\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_a_long_latex_table_takes_several_pages(tmp_path: Path) -> None:
    maker = Maker(tmp_path, demo(latency={"batch_sizes": [1, 4, 16], "executions": EVERY}))
    maker.everything(engines=("eager", "graph"))
    built = tables.build(study.load(maker.folder), "table4")
    text = render.to_latex(built)
    pages = text.split(r"\sbox{\buddytable}")[1:]
    shown = [[line for line in page.splitlines() if line.endswith(r"\\")] for page in pages]
    assert all(len(rows) - 1 <= render.PAGE_ROWS for rows in shown)  # one of them is the header
    assert sum(len(rows) - 1 for rows in shown) == len(built.rows) > 2 * render.PAGE_ROWS
    assert all(page.count(r"\toprule") == page.count(r"\end{\buddyfloat}") == 1 for page in pages)
    assert text.count(r"\label{tab:table4}") == 1
    assert text.count("(Continued.)") == len(pages) - 1
    # Each page begins with a group, whose labels are then told in full.
    for page in pages:
        first = page[page.index(r"\midrule") :].splitlines()[1]
        assert " & 0 & Dense & " in first


def test_fraction_rounds_halves_up() -> None:
    assert [fraction(20, 32), fraction(28, 32), fraction(32, 32), fraction(22, 30)] == ["0.63", "0.88", "1.00", "0.73"]


# Command


def test_report_writes_what_was_asked_and_leaves_no_temporary(small: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    small.everything()
    report("demo", results=small.folder.parent, table=["2", "table4"], figure=["latency"], summary=True)
    made = sorted(
        str(path.relative_to(small.folder))
        for part in ("tables", "figures")
        for path in (small.folder / part).iterdir()
    )
    assert made == [
        "figures/latency.pdf",
        "figures/latency.png",
        *(f"tables/table{number}.{kind}" for number in (2, 4) for kind in ("csv", "html", "md", "tex")),
    ]
    text = capsys.readouterr().out
    assert "Accuracy of smollm2-135m, average of 8 tasks" in text
    assert "BUDDY (recompute)" in text
    assert f"first of all {small.folder}/figures/latency.png" in text
    assert f"Figures: 1 of {len(figures.names(study.load(small.folder)))} drawn, {small.folder}/figures" in text
    assert f"Tables: 2 written, {small.folder}/tables" in text
    assert "all of them: buddy report --study demo --all" in text
    average = cell(small.folder / "tables/table2.csv", removed=8, method="buddy", task="average")
    assert f"{float(average['value']):.2f} ± {float(average['stderr']):.2f}" in text


def test_the_summary_fits_a_terminal(tmp_path: Path) -> None:
    content = paper(methods=EVERY_METHOD)
    content["evaluation"] = {"limit": None}
    maker = Maker(tmp_path, content)
    maker.everything(items=20)
    text = summary(maker.folder)
    assert [line for line in text.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    # What has no room beside the others stands below them, under its depth.
    accuracy = text[text.index("Accuracy of llama3-8b") : text.index("Accuracy of qwen2.5-7b")]
    assert re.findall(r"blocks removed +(.*)", accuracy) == ["0              4              8             12", "16"]
    assert accuracy.count("  BUDDY ") == 2
    assert accuracy.count("  Dense  ") == 1
    assert "figure4" not in text  # no list of files


def test_all_of_an_unfinished_study_gives_what_there_is(small: Maker) -> None:
    small.accuracy(small.config.runs()[1], 4, uniform(0.5))
    report(str(small.folder), all_=True)
    assert {path.stem for path in (small.folder / "tables").iterdir()} == {
        *("table2", "table4", "table6", "table8"),
        *("compare", "significance"),
    }
    # Figures that the study plans and has nothing for say so in their panels.
    drawn = {path.name for path in (small.folder / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in figures.names(study.load(small.folder)) for kind in ("pdf", "png")}
    assert {"accuracy_vs_budget.pdf", "latency.pdf", "figure4.png"} <= drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": ["2", "9"]}, "--table of study demo: '9' is not one of table2, table4, table6 or table8"),
        ({"figure": ["latencies"]}, "did you mean latency"),
        ({}, "nothing asked of demo"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_written(small: Maker, options: dict, message: str) -> None:
    small.everything()
    with pytest.raises(UserError, match=re.escape(message)):
        report("demo", results=small.folder.parent, **options)
    assert sorted(path.name for path in small.folder.iterdir()) == ["records", "study.json"]


def test_an_absent_study_names_those_there_are(small: Maker) -> None:
    with pytest.raises(UserError, match=r"demos/study\.json: not found; studies in .*: demo$"):
        report("demos", results=small.folder.parent, summary=True)
    (small.folder / "study.json").write_text("{")
    with pytest.raises(UserError, match="not a readable study"):
        report("demo", results=small.folder.parent, summary=True)


def test_no_torch_is_imported(small: Maker) -> None:
    small.everything()
    code = (
        "import sys, pathlib; from buddy.commands.report import report; "
        f"report('demo', results=pathlib.Path({str(small.folder.parent)!r}), table=['4'], "
        "figure=['latency'], summary=True); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (small.folder / "figures/latency.png").is_file()


# Records of another study


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """A study that names records which lie in another folder, given from the working directory."""
    content = demo()
    content["study"]["records"] = "reference/some-machine/records"
    maker = Maker(tmp_path / "results", content)
    maker.records = tmp_path / "reference/some-machine/records"
    monkeypatch.chdir(tmp_path)
    return maker


def test_tables_are_built_from_the_records_that_the_study_names(elsewhere: Maker) -> None:
    elsewhere.everything()
    own = elsewhere.folder / "records/accuracy/x.json"  # what lies in its own folder does not enter
    own.parent.mkdir(parents=True)
    own.write_text("{")
    report("demo", results=Path("results"), table=["4"], figure=["latency"])
    path = elsewhere.records / "latency" / elsewhere.main_run("smollm2-135m").path
    record = json.loads((path / "dataset~samsum/batch~1/engine~eager/execution~reuse/removed~12.json").read_text())
    shown = cell(
        elsewhere.folder / "tables/table4.csv", dataset="samsum", execution="reuse", removed=12, metric="decode_speedup"
    )
    values = record["metrics"]["decode_speedup"]["values"]
    assert float(shown["value"]) == pytest.approx(statistics.median(values), abs=1e-6)
    assert "Records: reference/some-machine/records." in (elsewhere.folder / "tables/table4.md").read_text()
    assert "records of reference/some-machine/records" in summary(elsewhere.folder)
    assert not (elsewhere.records.parent / "tables").exists()


def test_a_folder_without_records_is_named(elsewhere: Maker) -> None:
    named = r"study\.json: study\.records: reference/some-machine/records: "
    with pytest.raises(
        UserError, match=named + r"no such folder in .*; expected a folder that holds accuracy, generation, latency"
    ):
        study.load(elsewhere.folder)
    (elsewhere.records / "records").mkdir(parents=True)
    with pytest.raises(UserError, match=named + "holds no records; expected"):
        study.load(elsewhere.folder)
    (elsewhere.records / "records/latency").mkdir()
    with pytest.raises(UserError, match=named + r"holds no records; did you mean .*/records/records\?$"):
        study.load(elsewhere.folder)


@pytest.mark.parametrize(("loss", "words"), [("ce", "cross-entropy"), ("kl", "KL divergence from the backbone")])
def test_tables_of_trained_methods_say_what_they_were_trained_to_minimise(
    tmp_path: Path, loss: str, words: str
) -> None:
    content = paper(methods=EVERY_METHOD) | {"training": {"loss": loss}}
    opened = study.load(Maker(tmp_path, content).folder)
    kinds = {name: table.kind for name, table in opened.config.study.tables.items()}
    said = {name for name in kinds if any(f"Trained by {words}" in note for note in tables.build(opened, name).notes)}
    assert said == {name for name, kind in kinds.items() if kind not in ("latency", "peer_latency", "breakdown")}
    assert len(said) > 5
    bare = study.load(Maker(tmp_path / "bare", demo(study={"methods": ["dense"], "lora": ["none"]})).folder)
    assert not any("Trained by" in note for note in tables.build(bare, "table2").notes)


def test_a_router_on_one_path_says_so_under_the_tables_that_show_it(tmp_path: Path) -> None:
    content = paper(seeds=2, methods=EVERY_METHOD)
    maker = Maker(tmp_path, content)
    main = maker.main_run("llama2-7b")
    probes = {"prompts": 64, "removed": 16, "first": {"paths": 1.0}, "last": {"paths": 1.0}}
    other = dict(probes, last={"paths": 9.0})
    maker.training(main, wall_s=3600, probes=probes)
    maker.training(dataclasses.replace(main, seed=1), wall_s=3600, probes=other)
    opened = study.load(maker.folder)
    kinds = {name: table.kind for name, table in opened.config.study.tables.items()}
    notes = {name: [note for note in tables.build(opened, name).notes if "one path" in note] for name in kinds}
    told = "BUDDY: one path over 64 probe prompts with 16 blocks removed{}; there it does what a static list does."
    both, first = told.format(" with 1 of 2 seeds"), told.format("")
    assert notes["table3"] == []  # another backbone
    assert notes["table9"] == []
    for name, kind in kinds.items():
        if opened.config.study.tables[name].backbone == "llama2-7b":
            expected = both if kind in ("accuracy", "latency", "breakdown") else first
            assert [note for note in notes[name] if "one path" in note] == [expected], name
    assert notes["table12"] == [f"llama2-7b: {first}"]
    assert notes["table7"] == [both.replace("BUDDY", "BUDDY (omega 0.1)")]
    text = " ".join(summary(maker.folder).split())
    assert text.count(both) == 1
    assert text.count(first) >= 1


@pytest.mark.parametrize(
    ("value", "stderr", "ideal", "doubt"),
    [
        (1.2, 0.1, 1.25, ""),
        (1.3, 0.1, 1.25, ""),  # four percent above the ideal may be chance
        (1.41, 0.05, 1.15, "it is above the ideal"),
        (1.14, 2.81, 1.2, "its error is above 20% of it"),
        (1.5, 0.4, 1.2, "its error is above 20% of it and it is above the ideal"),
        (1.2, None, 1.25, ""),
        (None, None, 1.25, ""),
    ],
)
def test_a_speed_up_that_its_error_or_the_ideal_speaks_against_is_marked(
    value: float | None, stderr: float | None, ideal: float, doubt: str
) -> None:
    cell = grid.Cell({}, Measure(value, stderr)).doubted(ideal)
    assert cell.doubt == doubt
    built = grid.Grid("table4", "Speed.", ("Row",), ("Speed-up",), [grid.Row(("a",), [cell])])
    built.notes = grid.doubt_note(built.rows)
    for text in (render.to_markdown(built), render.to_html(built)):
        assert ("‡" in text) == bool(doubt)
    assert (r"\ddagger" in render.to_latex(built)) == bool(doubt)
