"""The router's recipe as an axis of a run: which runs a study has, where they are, what they read, how they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import buddy
from records_factory import Maker, demo, paper
from safetensors.torch import load_file

from buddy import load
from buddy.commands.train import fit_depths
from buddy.errors import UserError
from buddy.reporting import figures, measured, measures, published, significance, study, style, tables
from buddy.reporting.accuracy import marks
from buddy.reporting.labels import series_labels
from buddy.reporting.likelihood import _variants
from buddy.runs import RunInfo
from buddy.study import config
from buddy.study.config import Config, Run, parse
from buddy.study.records import Record

NAME = "smollm2-135m"
PAPER = f"backbone~{NAME}/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/seed~0"
TUNED = f"backbone~{NAME}/method~buddy/feature~value/prior~taylor/omega~0.1/source_block~1/recipe~tuned/seed~0"


def both(main: str = "tuned", **more: object) -> dict[str, object]:
    """A small study that compares both recipes."""
    content = demo()
    content["study"] |= {"main": {"recipe": main}, "recipes": ["paper", "tuned"], **more}
    return content


def of_buddy(runs: list[Run]) -> list[str]:
    return [run.path for run in runs if run.method == "buddy"]


def test_the_papers_recipe_goes_without_saying_in_a_path() -> None:
    plan = parse(both(ablations=[]))
    assert of_buddy(plan.compared_runs(NAME)) == [PAPER, TUNED]
    assert of_buddy(plan.runs()) == [PAPER, TUNED]
    assert [run.variant["recipe"] for run in plan.method_runs(NAME, "buddy")] == ["paper", "tuned"]
    assert parse(demo()).main_run(NAME).path == PAPER


@pytest.mark.parametrize(("main", "path"), [("paper", PAPER), ("tuned", TUNED)])
def test_what_takes_long_is_measured_of_the_main_recipe_alone(main: str, path: str) -> None:
    plan = parse(both(main, ablations=[]))
    assert of_buddy(plan.timed_runs(NAME)) == [path]
    assert of_buddy(plan.answering_runs(NAME)) == [path]
    assert of_buddy(plan.summarising_runs()) == [path]
    assert of_buddy(plan.predicting_runs()) == [path]
    assert plan.main_run(NAME).path == path
    assert plan.predictors() == [f"{path}/preset~paper", f"{path}/preset~tuned"]


def test_recipes_span_the_grid_with_seeds_lora_and_ablations() -> None:
    ablations = [
        {"name": "recipe", "backbone": NAME, "recipe": ["paper", "tuned"]},
        {"name": "prior", "backbone": NAME, "prior": ["none", "taylor"], "recipe": ["paper"]},
        {"name": "feature", "backbone": NAME, "feature": ["key", "value"]},
    ]
    plan = parse(both(seeds=[0, 1], lora=["trained", "none"], ablations=ablations))
    assert len(of_buddy(plan.compared_runs(NAME))) == 2 * 2 * 2
    recipes = {one.name: [run.variant["recipe"] for run in plan.ablation_runs(one)] for one in plan.study.ablations}
    assert recipes == {"recipe": ["paper"] * 2 + ["tuned"] * 2, "prior": ["paper"] * 4, "feature": ["tuned"] * 4}
    # New to the study are the prior "none" by the paper's recipe and the feature "key" by the tuned one.
    assert len(of_buddy(plan.runs())) == 8 + 2 + 2
    untrained = plan.buddy_run(NAME, plan.study.main.model_dump(), 0, "none")
    assert untrained.path.endswith("source_block~1/recipe~tuned/lora~none/seed~0")


@pytest.mark.parametrize("recipes", [["paper"], ["tuned", "tuned"]])
def test_compared_recipes_hold_the_main_one_and_each_once(recipes: list[str]) -> None:
    with pytest.raises(UserError, match=r"study: recipes: .* must name that of main, tuned, and each recipe once"):
        parse(both(recipes=recipes))


# What a run reads


def options(plan: Config, recipe: str, lora: str = "trained") -> dict[str, object]:
    return plan.training_options(plan.buddy_run(NAME, {**plan.study.main.model_dump(), "recipe": recipe}, 3, lora))


def changed(knob: dict[str, object], **of: str) -> set[str]:
    """Options that another value of a knob changes."""
    before, after = (options(parse({**both(), **settings}), **of) for settings in ({}, knob))
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


def test_a_run_is_told_just_what_its_recipe_reads() -> None:
    assert changed({"router": {"orders": 9}}, recipe="paper") == set()
    assert changed({"router": {"orders": 9}}, recipe="tuned") == {"router_orders"}
    own_rate: dict[str, object] = {"training": {"router_learning_rate": 1e-3}}
    assert changed(own_rate, recipe="paper") == {"router_learning_rate"}
    assert changed(own_rate, recipe="tuned") == set()
    rate: dict[str, object] = {"training": {"learning_rate": 1e-3}}
    assert changed(rate, recipe="tuned") == {"learning_rate"}
    assert changed(rate, recipe="tuned", lora="none") == set()  # nothing is trained after the fit
    assert changed(rate, recipe="paper", lora="none") == {"learning_rate"}  # the router is
    loss: dict[str, object] = {"training": {"loss": "kl"}}
    assert changed(loss, recipe="tuned", lora="none") == set()  # the fit has a loss of its own
    assert "recipe" not in options(parse(both()), "paper")
    told = options(parse(both()), "tuned")
    assert (told["recipe"], told["depths"], told["seed"]) == ("tuned", [4, 8, 12], 3)


def test_every_option_is_one_of_the_command() -> None:
    known = buddy("train", "--help")
    assert known.status == 0
    for recipe in ("paper", "tuned"):
        for name in options(parse(both()), recipe):
            # Help may cut a long name short, but not the first letters of it.
            assert f"--{name.replace('_', '-')}"[:20] in known.out, name


def test_depths_that_routes_are_measured_at() -> None:
    assert fit_depths(None, 15) == [7, 15]
    assert fit_depths(None, 1) == [1]
    assert fit_depths("8,4,8", 8) == [4, 8]
    with pytest.raises(UserError, match=r"--depths: 9 is not between 1 and --most-removed 8"):
        fit_depths("4,9", 8)


def test_an_unknown_recipe_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--backbone", tmp_path, "--data", tmp_path, "--most-removed", 2, "--out", out, "--recipe", "tunde")
    assert "--recipe" in (said := buddy("train", *words)).mistake
    assert "tuned" in said.mistake
    assert not out.exists()


@pytest.mark.parametrize("rank", [2, 0])
def test_the_tuned_recipe_fits_the_router_and_trains_lora_alone(tmp_path: Path, rank: int) -> None:
    def run(*words: object) -> None:
        said = buddy(*words)
        assert said.status == 0, said.err

    run("backbone", "--random", "tiny-llama", "--layers", 6, "--dtype", "float32", "--out", tmp_path / "backbone")
    run("data", "--name", "alpaca", "--source", "embedded", "--out", tmp_path / "alpaca")
    out, record = tmp_path / "run", tmp_path / "record.json"
    run(
        *(
            "train",
            "--backbone",
            tmp_path / "backbone",
            "--data",
            tmp_path / "alpaca",
            "--out",
            out,
            "--record",
            record,
        ),
        *("--recipe", "tuned", "--most-removed", 2, "--depths", "1,2", "--examples", 12, "--epochs", 1),
        *("--lora-rank", rank, "--router-examples", 8, "--router-held-out", 4, "--router-orders", 1),
        *("--router-search-examples", 2, "--router-rounds", 1, "--max-length", 512, "--warmup-steps", 0),
    )
    info, metrics = RunInfo.read(out), Record.read(record).metrics
    assert info.variant["recipe"] == "tuned"
    assert info.variant.get("lora", "trained") == ("trained" if rank else "none")
    assert info.training["router"]["depths"] == [1, 2]
    assert "router_learning_rate" not in info.training
    assert metrics["router"]["depths"] == [1, 2]
    measured, held_out = metrics["router"]["examples"]
    assert 0 < measured <= 8
    assert held_out == 4
    assert metrics["probes"]["first"]["paths"] >= 1
    assert (metrics["steps"] > 0) == (rank > 0)
    # What the fit leaves is what is saved: LoRA's training does not touch the router.
    trainable = (
        sum(tensor.numel() for tensor in load_file(out / "adapter/adapter_model.safetensors").values()) if rank else 0
    )
    assert metrics["trainable_parameters"] == trainable
    assert not (out / "checkpoints").exists()
    assert load(out).policy.prompts_noted
    if not rank:
        return

    # Another run may take the router as it is, and no other variant's.
    words = ("train", "--backbone", tmp_path / "backbone", "--data", tmp_path / "alpaca", "--out", tmp_path / "next")
    words += (
        "--record",
        tmp_path / "next.json",
        "--recipe",
        "tuned",
        "--most-removed",
        2,
        "--examples",
        4,
        "--epochs",
        1,
    )
    words += ("--lora-rank", 1, "--max-length", 512, "--warmup-steps", 0, "--router-start", out, "--seed", 7)
    assert "feature value and not key" in buddy(*words, "--feature", "key").mistake
    run(*words)
    assert Record.read(tmp_path / "next.json").metrics["router"] == {"start": str(out)}
    first, second = (load_file(folder / "router.safetensors") for folder in (out, tmp_path / "next"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith("prompts_"))
    assert all(
        tensor.abs().max() > 0 for tensor in load_file(tmp_path / "next/adapter/adapter_model.safetensors").values()
    )


# How they are shown


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    maker = Maker(tmp_path, both(ablations=[{"name": "recipe", "backbone": NAME, "recipe": ["paper", "tuned"]}]))
    maker.everything()
    return maker


def test_both_recipes_are_told_apart_in_tables_lines_and_comparisons(made: Maker) -> None:
    opened = study.load(made.folder)
    shown = [one for one in opened.compared(NAME) if one.method == "buddy"]
    assert list(series_labels(shown).values()) == ["BUDDY", "BUDDY (tuned)"]
    grid = tables.build(opened, "table2")
    assert [row.labels[1] for row in grid.rows] == ["Dense", *["BUDDY", "BUDDY (tuned)"] * 3]
    values = {(row["recipe"], row["value"]) for row in grid.records() if row["method"] == "buddy"}
    assert {recipe for recipe, _ in values} == {"paper", "tuned"}
    one, other = marks(shown)
    assert one.color != other.color
    assert (one.marker, one.dash) != (other.marker, other.dash)
    table = significance.significance(opened)
    assert table.label_headers[-1] == "BUDDY (tuned) against"
    assert [row.labels[-1] for row in table.rows] == ["BUDDY"] * 3
    assert {(row["recipe"], row["against_recipe"]) for row in table.tidy or []} == {("tuned", "paper")}


def test_a_table_of_recipes(made: Maker) -> None:
    made.config.study.tables["table5"] = made.config.study.tables["table6"].model_copy(update={"ablation": "recipe"})
    (made.folder / "study.json").write_text(made.config.model_dump_json())
    grid = tables.build(study.load(made.folder), "table5")
    assert grid.label_headers == ("Recipe",)
    assert [row.labels for row in grid.rows] == [("paper",), ("tuned",)]
    assert all(cell is not None and cell.measure.value is not None for row in grid.rows for cell in row.cells)


def test_a_variant_is_held_against_the_run_of_its_recipe(tmp_path: Path) -> None:
    ablations = [
        {"name": "recipe", "backbone": NAME, "recipe": ["paper", "tuned"]},
        {"name": "prior", "backbone": NAME, "prior": ["none", "taylor"], "recipe": ["paper"]},
        {"name": "feature", "backbone": NAME, "feature": ["key", "value"]},
    ]
    opened = study.load(Maker(tmp_path, both(ablations=ablations)).folder)
    pairs = [(pair.series, pair.against) for pair in _variants(opened, [NAME]) if pair.removed == 4]
    of = {(one.recipe, one.variant["prior"], one.variant["feature"]): against for one, against in pairs}
    plain, tuned = "BUDDY (prior taylor, omega 0.1)", "BUDDY (tuned, feature value)"
    assert of == {
        ("paper", "taylor", "value"): tuned,
        ("paper", "none", "value"): plain,
        ("tuned", "taylor", "key"): tuned,
    }


def test_a_grid_of_ablations_has_a_row_of_panels_per_recipe(tmp_path: Path) -> None:
    axes = {"prior": ["none", "taylor"], "omega": [0.1, 0.5], "recipe": ["paper", "tuned"]}
    maker = Maker(tmp_path, both(ablations=[{"name": "all", "backbone": NAME, **axes}]))
    maker.everything()
    opened = study.load(maker.folder)
    with style.applied():
        panels = figures.DRAW["ablation"](opened).axes
    assert [panel.get_title() for panel in panels] == [
        f"feature value, source block 1, {recipe}" for recipe in ("paper", "tuned")
    ]
    for recipe, panel in zip(("paper", "tuned"), panels, strict=True):
        # Each minus the run of its own recipe.
        base = opened.main(NAME, recipe)
        rows = [base, *(one for one in opened.ablation_rows("all") if one.variant["prior"] == "taylor")]
        rows = list({one.path: one for one in rows if one.recipe == recipe}.values())
        mean = {one.variant["omega"]: averages(opened, one) for one in rows}
        marks = [one.lines[0].get_ydata()[0] for one in panel.containers if one.get_label() == "Taylor"]
        assert sorted(marks) == pytest.approx(sorted([mean[0.1] - mean[0.1], mean[0.5] - mean[0.1]]))


def averages(opened: study.Study, series: study.Series) -> float:
    """The mean over depths of a variant's average accuracy."""
    depths = opened.removed(NAME)
    found = [measures.accuracy(opened, NAME, series, removed)["average"].value or 0.0 for removed in depths]
    return sum(found) / len(found)


def test_an_older_record_is_of_the_papers_recipe(made: Maker) -> None:
    path = made.records / "accuracy" / PAPER / "removed~4.json"
    content = json.loads(path.read_text())
    del content["variant"]["recipe"]
    path.write_text(json.dumps(content))
    scored = study.load(made.folder).of(measured.Accuracy, NAME)
    recipes = {one.file: one.variant.get("recipe") for one in scored}
    assert recipes[str(path)] == "paper"
    assert {recipe for file, recipe in recipes.items() if "recipe~tuned" in file} == {"tuned"}
    assert {one.variant.get("recipe") for one in scored if one.method == "dense"} == {None}


def test_published_figures_stand_beside_the_papers_recipe_alone(tmp_path: Path) -> None:
    content = paper()
    content["study"] |= {"main": {"recipe": "tuned"}, "recipes": ["paper", "tuned"]}
    content["study"]["ablations"] = [{**one, "recipe": ["paper"]} for one in content["study"]["ablations"]]
    opened = study.load(Maker(tmp_path, content).folder)

    def beside(table: str) -> dict[tuple[str, int], float | None]:
        rows = tables.build(opened, table).records()
        return {(row["recipe"], row["removed"]): row["published"] for row in rows if row["method"] == "buddy"}

    assert [beside("table10")["paper", removed] for removed in (4, 16)] == [62.63, 46.90]
    assert {value for (recipe, _), value in beside("table10").items() if recipe == "tuned"} == {None}
    assert beside("table7")["paper", 4] is not None
    assert published.figure(4, "llama2-7b", published.MAIN_VARIANT, "alpaca")
    assert not published.figure(4, "llama2-7b", opened.main("llama2-7b").variant, "alpaca")


def test_the_papers_study_trains_both_and_its_ablations_are_the_papers() -> None:
    plan = config.read(Path(__file__).resolve().parents[2] / "config.yaml")
    assert plan.study.compared_recipes() == ["paper", "tuned"]
    of = {one.name: {run.variant["recipe"] for run in plan.ablation_runs(one)} for one in plan.study.ablations}
    assert of.pop("recipe") == {"paper", "tuned"}
    assert set(map(frozenset, of.values())) == {frozenset({"paper"})}
