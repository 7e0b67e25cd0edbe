"""The table of likelihoods, and its differences: every figure against one computed here from the same records."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records_factory import Maker, cells, methods
from scipy import stats

from buddy import resampling
from buddy.commands.report import report
from buddy.reporting import study, tables, write
from buddy.reporting.significance import LEVEL

SETS = ("gsm8k", "ptb")
NAME = "smollm2-135m"


def content(**study_settings: Any) -> dict[str, Any]:
    settings = methods(likelihood={"datasets": [*SETS], "kv": ["zero", "mask"], "decode": ["recompute", "reuse"]})
    chosen = {"methods": ["dense", "dense_lora", "buddy", "shortgpt", "sleb", "first"], **study_settings}
    return {**settings, "study": {**settings["study"], **chosen}}


def drawn(nll: float, seed: int, sizes: tuple[int, ...] = (40, 60)) -> dict[str, dict[str, list[float]]]:
    """Items around a mean; the items' own hardness is the same for every seed."""
    hard, draw = random.Random(1), random.Random(seed)
    found = {}
    for name, size in zip(SETS, sizes, strict=True):
        own = [nll + hard.gauss(0, 0.5) + draw.gauss(0, 0.02) for _ in range(size)]
        found[name] = {"nll": own, "kl": [one / 3 for one in own], "agreement": [1 - one / 8 for one in own]}
    return found


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Maker, dict[str, dict[str, dict[str, list[float]]]]]:
    """Four removed: BUDDY below SLEB, the best static one, by 0.05 nats; FiRST at another depth. Eight: BUDDY alone."""
    maker = Maker(tmp_path, content())
    values = {"dense": drawn(2.0, 0), "buddy": drawn(2.45, 1), "sleb": drawn(2.5, 2), "shortgpt": drawn(2.6, 3)}
    main = maker.main_run(NAME)
    maker.likelihood(maker.config.method_runs(NAME, "dense")[0], 0, values["dense"])
    maker.likelihood(main, 4, values["buddy"], paths=17)
    maker.likelihood(main, 4, drawn(2.46, 4), kv="mask", paths=17)
    maker.likelihood(main, 4, drawn(2.7, 5), decode="reuse", paths=9)
    for method in ("sleb", "shortgpt"):
        maker.likelihood(maker.peer(method, 4), 4, values[method])
    maker.likelihood(maker.peer("first", 4), 4, drawn(2.2, 6), executed=27.5, paths=3)
    maker.likelihood(main, 8, drawn(3.0, 7))
    return maker, values


def averaged(values: dict[str, dict[str, list[float]]], measure: str = "nll") -> float:
    """Each data set counts alike, whatever its number of items."""
    return float(np.mean([np.mean(values[name][measure]) for name in SETS]))


def test_cells_are_means_over_data_sets_with_half_of_the_interval(scored: Any) -> None:
    maker, values = scored
    opened = study.load(maker.folder)
    assert tables.names(opened)[-1] == "likelihood"
    write.table(opened, "likelihood")
    path = maker.folder / "tables/likelihood.csv"
    for method, removed in (("dense", 0), ("buddy", 4), ("sleb", 4), ("shortgpt", 4)):
        for measure, scale in (("nll", 1), ("kl", 1), ("agreement", 100)):
            own = {"table": "likelihood", "method": method, "removed": removed, "metric": measure}
            (row,) = cells(path, **own, dataset="average")
            assert float(row["value"]) == pytest.approx(scale * averaged(values[method], measure), abs=1e-5)
            errors = [
                np.std(values[method][name][measure]) / len(values[method][name][measure]) ** 0.5 for name in SETS
            ]
            half = 1.96 * scale * float(np.sqrt(np.sum(np.square(errors)))) / 2
            assert (float(row["high"]) - float(row["low"])) / 2 == pytest.approx(half, rel=0.12)
            for name in SETS:
                (row,) = cells(path, **own, dataset=name)
                assert float(row["value"]) == pytest.approx(scale * np.mean(values[method][name][measure]), abs=1e-5)
                assert (row["rows"], row["n"], row["tokens"]) == (
                    *("evaluation split", str(len(values[method][name][measure]))),
                    str(10 * len(values[method][name][measure])),
                )
    text = (maker.folder / "tables/likelihood.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| 4 | BUDDY |")]
    assert f"**{averaged(values['buddy']):.3f}** ± 0." in lines[0]
    assert lines[0].rstrip(" |").endswith("| 17")
    assert f"{averaged(values['sleb']):.3f}</u>" in text
    assert "| 4 | FiRST (ran 27.5) |" in text
    assert "GSM8K: 40 of the evaluation split (400 tokens scored); PTB: 60 of the evaluation split (600 tokens" in text
    assert "K/V of skipped blocks: zero" in text
    assert "–" in text  # Dense (LoRA) was not scored
    assert (maker.folder / "tables/likelihood.tex").read_text().count(r"\begin{tabular}") == 3


def test_methods_are_held_against_the_best_static_one(scored: Any) -> None:
    maker, values = scored
    write.table(study.load(maker.folder), "likelihood")
    path = maker.folder / "tables/likelihood.csv"
    found = cells(path, table="likelihood_differences", removed=4, metric="nll", dataset="average")
    assert {row["method"]: row["verdict"] for row in found} == {
        "buddy": "lower",
        "shortgpt": "higher",
        "first": "ran 27.5 blocks",
    }
    assert {row["against"] for row in found} == {"SLEB"}
    assert {row["comparisons"] for row in found} == {"2"}
    (row,) = [row for row in found if row["method"] == "buddy"]
    ours, best = values["buddy"], values["sleb"]
    differences = [np.subtract(ours[name]["nll"], best[name]["nll"]) for name in SETS]
    assert float(row["value"]) == pytest.approx(np.mean([one.mean() for one in differences]), abs=1e-5)
    half = 1.96 * np.sqrt(np.sum([one.var() / len(one) for one in differences])) / 2
    assert float(row["high"]) - float(row["low"]) == pytest.approx(2 * half, rel=0.1)
    assert float(row["high"]) < 0
    assert float(row["holm_p"]) < LEVEL
    for place, name in enumerate(SETS):
        (row,) = cells(path, table="likelihood_differences", method="buddy", removed=4, metric="nll", dataset=name)
        assert float(row["value"]) == pytest.approx(differences[place].mean(), abs=1e-5)
        assert float(row["low"]) < float(row["value"]) < float(row["high"])
    (row,) = cells(
        path, table="likelihood_differences", method="buddy", removed=4, metric="agreement", dataset="average"
    )
    assert float(row["value"]) == pytest.approx(
        100 * (averaged(ours, "agreement") - averaged(best, "agreement")), abs=1e-4
    )
    assert cells(path, table="likelihood_differences", removed=8) == []  # no static method was scored there


def test_buddys_modes_are_held_against_its_main_one(scored: Any) -> None:
    maker, _ = scored
    write.table(study.load(maker.folder), "likelihood")
    found = cells(maker.folder / "tables/likelihood.csv", table="likelihood_variants", metric="nll", dataset="average")
    assert {(row["removed"], row["label"]): row["verdict"] for row in found} == {
        ("4", "K/V zero, reuse"): "higher",
        ("4", "K/V mask, recompute"): "higher",
        ("4", "K/V mask, reuse"): "not measured",
        **{("8", f"K/V {mode}"): "not measured" for mode in ("zero, reuse", "mask, recompute", "mask, reuse")},
    }


def test_ablations_are_variants_too(tmp_path: Path) -> None:
    ablations = [{"name": "feature", "backbone": NAME, "feature": ["key", "value"]}]
    settings = content(ablations=ablations, methods=["buddy"])
    settings["likelihood"] |= {"kv": ["zero"], "decode": ["recompute"]}
    maker = Maker(tmp_path, settings)
    for run in maker.config.ablation_runs(maker.config.ablation("feature")):
        maker.likelihood(run, 4, drawn(2.5 + (run.variant["feature"] == "key"), 1))
    write.table(study.load(maker.folder), "likelihood")
    found = cells(maker.folder / "tables/likelihood.csv", table="likelihood_variants", removed=4, dataset="average")
    assert {row["label"] for row in found} == {"BUDDY (feature key)"}
    assert [float(row["value"]) for row in found if row["metric"] == "nll"] == pytest.approx([1.0], abs=1e-5)
    assert {row["against"] for row in found} == {"BUDDY (feature value)"}


def test_an_item_counts_with_its_mean_over_seeds(tmp_path: Path) -> None:
    maker = Maker(tmp_path, content(seeds=[0, 1], methods=["buddy", "sleb"]))
    runs = {run.seed: run for run in maker.config.method_runs(NAME, "buddy")}
    values = {seed: drawn(2.5 + seed, seed) for seed in runs}
    for seed, run in runs.items():
        maker.likelihood(run, 4, values[seed], paths=10 + seed)
    write.table(study.load(maker.folder), "likelihood")
    path = maker.folder / "tables/likelihood.csv"
    (row,) = cells(path, table="likelihood", method="buddy", removed=4, metric="nll", dataset="average")
    assert float(row["value"]) == pytest.approx((averaged(values[0]) + averaged(values[1])) / 2, abs=1e-5)
    assert float(row["seed_sd"]) == pytest.approx(abs(averaged(values[0]) - averaged(values[1])) / 2**0.5, abs=1e-5)
    (row,) = cells(path, table="likelihood", method="buddy", removed=4, metric="distinct_paths")
    assert float(row["value"]) == 10.5
    # One seed alone, or one on other items, is told.
    maker.likelihood(runs[1], 4, values[1], items="other")
    write.table(study.load(maker.folder), "likelihood")
    assert "some cells have 1 of 2 seeds" in (maker.folder / "tables/likelihood.md").read_text()


def test_other_items_are_not_compared(tmp_path: Path) -> None:
    maker = Maker(tmp_path, content(methods=["buddy", "sleb"]))
    maker.likelihood(maker.main_run(NAME), 4, drawn(2.5, 1))
    maker.likelihood(maker.peer("sleb", 4), 4, drawn(2.6, 2), items="other")
    write.table(study.load(maker.folder), "likelihood")
    found = cells(maker.folder / "tables/likelihood.csv", table="likelihood_differences", removed=4, metric="nll")
    assert [row["verdict"] for row in found] == ["not the same items"]


def test_a_study_without_records_says_so_and_one_without_data_sets_has_no_table(tmp_path: Path) -> None:
    maker = Maker(tmp_path, content())
    write.table(study.load(maker.folder), "likelihood")
    text = (maker.folder / "tables/likelihood.md").read_text()
    assert "Nothing was scored yet." in text
    assert "– not measured." in text
    assert "likelihood" not in tables.names(study.load(Maker(tmp_path / "other", methods()).folder))


def test_the_command_builds_it_by_name_without_torch(scored: Any) -> None:
    maker, _ = scored
    report(study=str(maker.folder), table=["likelihood"])
    assert (maker.folder / "tables/likelihood.html").exists()
    code = "import sys, buddy.reporting.likelihood, buddy.resampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_drawing_items_is_drawing_how_often_each_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], 200, p=[0.2, 0.5, 0.3])
    counted = resampling.estimate([values, values[:50]])
    monkeypatch.setattr(resampling, "MANY", 0)
    monkeypatch.setattr(resampling, "ENTRIES_AT_ONCE", 1000)  # several parts
    drawn_one_by_one = resampling.estimate([values, values[:50]])
    assert drawn_one_by_one.value == counted.value == pytest.approx((values.mean() + values[:50].mean()) / 2)
    assert (drawn_one_by_one.low, drawn_one_by_one.high) == pytest.approx((counted.low, counted.high), abs=0.01)
    assert drawn_one_by_one.p == pytest.approx(counted.p, rel=0.5, abs=0.001)


def test_items_of_one_data_set_have_the_interval_of_a_plain_bootstrap() -> None:
    values = np.random.default_rng(4).normal(0.3, 1.0, 150)
    ours = resampling.estimate([values], resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    error = values.std(ddof=1) / len(values) ** 0.5
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * error)
    # Of a second data set without spread, the mean of both is half as wide.
    both = resampling.estimate([values, np.zeros(10)], resamples=20_000)
    assert (both.low, both.high) == pytest.approx((theirs.low / 2, theirs.high / 2), abs=0.025 * error)
