"""Figures: what is drawn is checked against the synthetic records; what was not measured is told in its panel."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from records_factory import EVERY_METHOD, Maker, demo, methods, paper, said, uniform

from buddy.errors import UserError
from buddy.reporting import figures, measured, published, study, style, write
from buddy.reporting.importance import removal_orders
from buddy.reporting.measures import Measure
from buddy.study import planned_figures
from buddy.study.config import parse
from buddy.study.settings import METHODS

NAME = "smollm2-135m"


@pytest.fixture
def small(tmp_path: Path) -> Maker:
    return Maker(tmp_path, demo())


# Figures


def test_figures_are_one_column_wide_and_the_same_bytes_each_time(small: Maker) -> None:
    small.everything()
    small.trainings()
    for name in ("accuracy_vs_budget", "latency", "figure1", "figure4", "figure12", "figure13", "ablation"):
        first = figures.build(study.load(small.folder), name)
        again = figures.build(study.load(small.folder), name)
        assert first == again
        assert first["pdf"].startswith(b"%PDF")
        assert b"CreationDate" not in first["pdf"]
        width = int.from_bytes(first["png"][16:20], "big")  # IHDR
        assert width == round(3.4 * 200)
        assert b"tEXt" not in first["png"]


def test_accuracy_figure_draws_the_records(small: Maker) -> None:
    dense, buddy = small.config.runs()[:2]
    small.accuracy(dense, 0, uniform(0.7))
    small.accuracy(buddy, 4, uniform(0.6))
    small.accuracy(buddy, 12, uniform(0.5))
    with style.applied():
        axes = figures.accuracy_vs_budget(study.load(small.folder)).axes[0]
    curve = next(line for line in axes.lines if line.get_marker() == style.mark("buddy").marker)
    assert list(curve.get_xdata()) == [4, 12]
    assert list(curve.get_ydata()) == pytest.approx([60.0, 50.0])
    segments = axes.containers[-1].lines[2][0].get_segments()
    error = 100 * 0.02 / math.sqrt(8)
    assert [list(segment[:, 1]) for segment in segments] == [
        pytest.approx([60 - error, 60 + error]),
        pytest.approx([50 - error, 50 + error]),
    ]
    levels = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
    chance = 100 * (4 * 0.25 + 3 * 0.5 + 1 / 3) / 8
    assert any(level == pytest.approx(chance) for level in levels)
    assert any(level == pytest.approx(70.0) for level in levels)
    assert [label.get_text() for label in axes.child_axes[0].get_xticklabels()] == ["1.00", "0.87", "0.73", "0.60"]


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """The paper's study, all measured."""
    maker = Maker(tmp_path_factory.mktemp("papers"), paper(methods=EVERY_METHOD))
    maker.everything(items=100)
    return maker


def test_one_panel_per_backbone(papers: Maker) -> None:
    with style.applied():
        figure = figures.accuracy_vs_budget(study.load(papers.folder))
    assert [axes.get_title() for axes in figure.axes] == [
        "llama3-8b (32 blocks)",
        "qwen2.5-7b (28 blocks)",
        "llama2-7b (32 blocks)",
        "llama1-13b (40 blocks)",
    ]
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    methods = {"Dense", "Dense (LoRA)", "Shortened LLaMA", "ShortGPT", "SLEB", "PuDDing", "FiRST", "BUDDY"}
    assert len(entries) == len(set(entries))
    assert set(entries) == {*methods, "Chance"}


def test_legends_stay_inside_the_figure_and_below_the_panels(tmp_path: Path) -> None:
    content = methods(peers={"criteria": {"shortened_llama": ["ppl", "taylor"]}})
    content["study"]["lora"] = ["trained", "none"]
    small = Maker(tmp_path, content)
    small.everything()
    opened = study.load(small.folder)
    for draw in (figures.accuracy_vs_budget, figures.speed_ups):
        with style.applied():
            figure = draw(opened)
            figure.draw_without_rendering()
            legend = figure.legends[0].get_window_extent()
            assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
            assert all(axes.get_tightbbox().y0 >= legend.y1 for axes in figure.axes)


def test_marks_differ_in_colour_marker_and_grey() -> None:
    for names in ((*METHODS, "buddy_tuned"), ("dense", "sliced", "reuse", "recompute")):
        marks = [style.mark(name) for name in names]
        assert len({mark.color for mark in marks}) == len(names)
        assert len({(mark.marker, str(mark.dash)) for mark in marks}) == len(names)
    assert style.mark("buddy") == style.mark("recompute")
    again = style.mark("sleb", 1)
    assert (again.color, again.marker) == (style.mark("sleb").color, style.mark("sleb").marker)
    assert again.line() != style.mark("sleb").line()


def drawn(maker: Maker, name: str):
    """The figure of a study as matplotlib has it."""
    with style.applied():
        return figures.DRAW[name](study.load(maker.folder))


def words(figure) -> str:
    """Every text in the panels of a figure."""
    return " ".join(text.get_text() for axes in figure.axes for text in [axes.title, *axes.texts])


@pytest.mark.parametrize("name", planned_figures.NAMES)
def test_what_is_not_measured_is_a_panel_with_the_reason(small: Maker, name: str) -> None:
    assert "not measured" in words(drawn(small, name)).replace("\n", " ")
    paths = write.figure(study.load(small.folder), name)
    assert [path.read_bytes()[:4] for path in paths] == [b"%PDF", b"\x89PNG"]


def test_planned_figures_need_what_they_show() -> None:
    everything = {*(f"figure{n}" for n in (1, 4, 5, 6, 9, 10, 11, 12, 13)), "ablation"}
    everything |= {"accuracy_vs_budget", "accuracy_vs_speed", "latency", "savings", "route_ribbon"}
    assert set(planned_figures.planned(parse(paper(methods=EVERY_METHOD)))) == everything
    orders = {"indicators": ["taylor", "cosine"], "corpora": ["ptb"], "lengths": [256, 272]}
    assert set(planned_figures.planned(parse({**paper(methods=EVERY_METHOD), "orders": orders}))) == {
        *everything,
        *("figure2", "figure7", "figure8"),
    }
    content = demo(**{name: {"backbones": []} for name in ("predictor", "trace", "summaries", "latency")})
    content["study"]["ablations"] = []
    content["study"]["main"] = {"prior": "none"}
    del content["study"]["tables"]["table6"]
    assert planned_figures.planned(parse(content)) == ["accuracy_vs_budget"]
    # Three depths: there is no fourth to draw.
    assert "figure11" not in planned_figures.planned(parse(demo()))
    assert "figure6" in planned_figures.planned(parse(demo()))


def test_what_is_ranked_for_each_figure() -> None:
    asked = {"indicators": ["cosine", "taylor"], "corpora": ["ptb", "texts/book.txt"], "lengths": [256, 272]}
    config = parse({**paper(), "orders": {"backbones": ["qwen2.5-7b"], **asked}})
    own = {one.removeprefix("backbone~qwen2.5-7b/") for one in planned_figures.orders(config, "figure8")}
    assert own == {
        *("indicator~cosine.json", "corpus~ptb/indicator~cosine.json"),
        "corpus~book/indicator~cosine.json",
    }
    assert planned_figures.orders(config, "figure7") == [
        f"backbone~qwen2.5-7b/corpus~{name}/indicator~taylor.json" for name in ("ptb", "book")
    ]
    assert planned_figures.orders(config, "figure2") == [
        f"backbone~qwen2.5-7b/length~{length}/indicator~taylor.json" for length in (256, 272)
    ]
    # Figure 1 shows what the runs of the ablations' backbone fuse, and what is looked at besides.
    assert set(planned_figures.orders(config, "figure1")) == {
        *(f"backbone~llama2-7b/indicator~{name}.json" for name in ("delta_ppl", "taylor")),
        "backbone~qwen2.5-7b/indicator~taylor.json",
    }
    assert ("qwen2.5-7b", "cosine") in config.importances()
    nothing = parse({**paper(), "orders": {"backbones": [], **asked}})
    assert [planned_figures.orders(nothing, name) for name in ("figure2", "figure7", "figure8")] == [[], [], []]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"corpora": ["ptb", "texts/ptb.txt"]}, "has a name twice"),
        ({"corpora": ["my book.txt"]}, "'my book' has other signs"),
        ({"lengths": [256]}, "not two or more different ones"),
        ({"lengths": [256, 256]}, "not two or more different ones"),
        ({"lengths": [256, 7]}, "greater than or equal to 8"),
        ({"indicators": ["tailor"]}, "'block_influence'"),
        ({"backbones": ["llama2"]}, "orders.backbones"),
    ],
)
def test_orders_that_make_no_sense_are_refused(asked: dict[str, list[object]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse({**paper(), "orders": {"indicators": ["taylor"], **asked}})


def test_other_corpora_have_a_panel_each(tmp_path: Path) -> None:
    orders = {"indicators": ["taylor", "cosine"], "corpora": ["ptb", "book.txt"]}
    maker = Maker(tmp_path, demo(orders=orders))
    rising = [[float(block) for block in range(30)]]
    for corpus in ("ptb", "book"):
        maker.importance(NAME, "taylor", rising, corpus=corpus)
    maker.importance(NAME, "cosine", rising, corpus="book")
    titles = [axes.get_title() for axes in drawn(maker, "figure7").axes]
    assert [title.split(",")[:2] for title in titles if "1 windows" in title] == [
        ["Taylor", " ptb"],
        ["Taylor", " book"],
    ]
    assert len(titles) == 2  # the other indicator is neither planned nor there
    # Planned on the study's own corpus, too, and not there yet; block influence is neither.
    assert [axes.get_title().split(",")[:2] for axes in drawn(maker, "figure8").axes] == [
        ["Cosine", " wikitext2"],
        ["Cosine", " book"],
    ]
    assert "no importance record of cosine on the calibration corpus" in words(drawn(maker, "figure8")).replace(
        "\n", " "
    )


def test_figures_that_were_measured_unplanned_are_named_too(small: Maker) -> None:
    assert "figure7" not in figures.names(study.load(small.folder))
    small.importance(NAME, "taylor", [[float(block) for block in range(30)]], corpus="ptb")
    small.importance(NAME, "taylor", [[float(block) for block in range(30)]], length=256)
    small.importance(NAME, "cosine", [[float(block) for block in range(30)]])
    small.rouge(small.main_run(NAME), 4, "reuse", [0.3, 0.2, 0.4], [0.2, 0.1, 0.3])
    assert {"figure2", "figure5", "figure7", "figure8"} <= set(figures.names(study.load(small.folder)))


def test_names_of_figures(small: Maker) -> None:
    opened = study.load(small.folder)
    assert figures.resolve(opened, "4") == figures.resolve(opened, "figure4") == "figure4"
    with pytest.raises(UserError, match="'figure3' is not one of"):
        figures.resolve(opened, "figure3")


def test_records_given_have_the_figures_that_they_can_show(tmp_path: Path) -> None:
    maker = Maker(tmp_path, demo())
    maker.everything(items=10)
    for kind in ("accuracy", "trace"):
        shutil.rmtree(maker.records / kind, ignore_errors=True)
    content = demo()
    content["study"] |= {"name": "given", "records": str(maker.records)}
    assert figures.names(study.load(Maker(tmp_path, content).folder)) == ["latency", "savings"]


# Removal orders


def test_removal_order_ranks_the_least_important_first() -> None:
    # By hand: 0.1 < 0.4 = 0.4 < 2; equal blocks share places 2 and 3.
    assert removal_orders([[0.4, 2.0, 0.1, 0.4]]).tolist() == [[2.5, 4.0, 1.0, 2.5]]


def test_boxes_show_the_orders_of_the_windows(small: Maker) -> None:
    windows = [[float((7 * block + 3 * window) % 30) for block in range(30)] for window in range(5)]
    small.importance(NAME, "taylor", windows)
    small.importance(NAME, "taylor", [window[::-1] for window in windows], corpus="ptb")  # another figure's
    (below,) = drawn(small, "figure1").axes
    medians = [
        line.get_ydata()[0] for line in below.lines if len(set(line.get_ydata())) == 1 and line.get_linewidth() > 1
    ]
    # Values are whole numbers below 30 and differ within a window, so the order is the value plus one.
    assert medians == pytest.approx(np.median(np.array(windows) + 1, axis=0).tolist())
    medians = [
        line.get_ydata()[0]
        for line in drawn(small, "figure7").axes[0].lines
        if len(set(line.get_ydata())) == 1 and line.get_linewidth() > 1
    ]
    assert medians == pytest.approx(np.median(np.array(windows)[:, ::-1] + 1, axis=0).tolist())


def test_heat_map_of_orders_by_context_length(small: Maker) -> None:
    rising = [float(block) for block in range(30)]
    small.importance(NAME, "taylor", [rising, rising], length=512)
    small.importance(NAME, "taylor", [rising, rising[::-1]], length=256)
    small.importance(NAME, "taylor", [rising[::-1]])  # of the study's own length: not in this figure
    (panel, _) = drawn(small, "figure2").axes
    shown = panel.images[0].get_array()
    assert shown.shape == (2, 30)
    assert shown[0].tolist() == [15.5] * 30  # 256 tokens: both orders average out
    assert shown[1].tolist() == list(range(1, 31))
    assert [label.get_text() for label in panel.get_yticklabels()] == ["256", "512"]


# Paths


def test_paths_per_generation_are_means_over_prompts(small: Maker) -> None:
    run = small.main_run(NAME)
    small.trace(run, 4, 3, [1, 2, 3, 6])
    small.trace(run, 8, 3, [2, 2, 2, 2])
    small.trace(run, 8, 3, [5, 5, 7, 7], dataset="piqa")  # a task is not generated after
    (axes,) = drawn(small, "figure4").axes
    (container,) = axes.containers
    line = container.lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([4, 8], [3.0, 2.0])
    low, high = container.lines[2][0].get_segments()[0][:, 1]
    assert 1 <= low < 3 < high <= 6
    assert [text.get_text() for text in drawn(small, "figure4").legends[0].get_texts()] == ["Alpaca"]


def test_published_paths_stand_beside_the_papers_backbone(papers: Maker) -> None:
    figure = drawn(papers, "figure4")
    (axes,) = figure.axes
    published = next(line for line in axes.lines if line.get_label() == "Alpaca, published")
    assert dict(zip(published.get_xdata(), published.get_ydata(), strict=True)) == {4: 1.0, 8: 4.47, 12: 5.22, 16: 2.93}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Alpaca", "Alpaca, published"]


def test_heat_maps_take_their_depth_of_the_study(small: Maker) -> None:
    run = small.main_run(NAME)
    for place, (name, removed) in enumerate((("figure9", 4), ("figure10", 8), ("figure6", 12))):
        frequency = [1.0] + [0.1 * (place + 1)] * 28 + [1.0]
        small.trace(run, removed, 2, [1, 2], dataset="piqa", frequency=frequency)
        small.trace(run, removed, 2, [1, 2], dataset="openbookqa", frequency=frequency[::-1])
        panel = drawn(small, name).axes[0]
        shown = panel.collections[0].get_array().reshape(2, 30)
        assert shown[1].tolist() == frequency
        assert [label.get_text() for label in panel.get_yticklabels()] == ["OBQA", "PIQA"]  # the paper's order
        assert f"{removed} of 30 blocks removed" in panel.get_title()
    assert "no traced backbone has 4 depths" in words(drawn(small, "figure11")).replace("\n", " ")


def test_tasks_stand_above_what_is_generated_and_stay_out_of_figure_4(small: Maker) -> None:
    run = small.main_run(NAME)
    for dataset in ("alpaca", "winogrande", "boolq"):
        small.trace(run, 4, 2, [1, 1, 3], dataset=dataset)
    names = [label.get_text() for label in drawn(small, "figure9").axes[0].get_yticklabels()]
    assert names == ["BoolQ", "WinoGrande", "Alpaca"]
    (axes,) = drawn(small, "figure4").axes
    assert len(axes.containers) == 1


def example(tokens: list[str], *routes: str, prompt: str = "A question?") -> dict[str, object]:
    """As a trace record has it; a route names the blocks that it leaves out, counted from 1."""
    digits = ["".join("0" if str(block) in route.split() else "1" for block in range(1, 31)) for route in routes]
    return {"prompt": prompt, "tokens": tokens, "routes": digits}


def test_the_ribbon_has_a_column_per_token_and_a_row_per_budget(small: Maker) -> None:
    run = small.main_run(NAME)
    for removed, (first, second) in {4: ("3 4 5 6", "3 4 5 7"), 8: ("2 3 4 5 6 7 8 9", "3 4 5 6 7 8 9 10")}.items():
        shown = example(["$5", " and\n"], first, second, prompt="Tell me how this one ends.")
        small.trace(run, removed, 2, [2, 2], example=shown)
        small.trace(run, removed, 2, [1, 1], dataset="piqa", example=example(["Yes"], first))
    figure = drawn(small, "route_ribbon")
    figure.draw_without_rendering()
    upper, task, lower, _ = figure.axes
    # 0 skipped, 1 ran, 2 ran but not at every token of the row; a column is a token.
    states = upper.collections[0].get_array().reshape(30, 2).T.tolist()
    ran = [1] * 30
    ran[2:5] = [0, 0, 0]
    assert states == [[*ran[:5], 0, 2, *ran[7:]], [*ran[:5], 2, 0, *ran[7:]]]
    assert task.collections[0].get_array().reshape(30, 1)[:, 0].tolist() == states[0]
    assert [label.get_text() for label in upper.get_xticklabels()] == ["$5", "and\\n"]
    assert [label.get_text() for label in task.get_xticklabels()] == ["PIQA"]
    assert lower.get_ylabel() == "22 of 30 blocks\nbudget 0.73"
    assert upper.get_title().startswith("Alpaca\n")
    assert upper.get_title().endswith("this one ends.")
    assert f"{NAME} on cpu (Synthetic)" in said(figure)


def test_traces_without_an_example_are_read_and_have_no_ribbon(small: Maker) -> None:
    run = small.main_run(NAME)
    small.trace(run, 4, 1, [1, 2])
    assert [one.example for one in study.load(small.folder).of(measured.Trace, NAME)] == [None]
    assert "no traces of BUDDY that have an example" in words(drawn(small, "route_ribbon")).replace("\n", " ")
    small.trace(run, 8, 1, [1, 2], example=example(["Yes", " no"], "3 4"))  # a route less than tokens
    assert [one.removed for one in study.load(small.folder).of(measured.Trace, NAME)] == [4]


def test_a_ribbon_shows_at_most_three_budgets(tmp_path: Path) -> None:
    content = demo()
    content["backbones"][NAME]["removed"] = [2, 3, 4, 5, 6]
    maker = Maker(tmp_path, content)
    for removed in (2, 3, 4, 5, 6):
        left_out = " ".join(map(str, range(3, 3 + removed)))
        maker.trace(maker.main_run(NAME), removed, 1, [1], example=example(["a", "b"], left_out, left_out))
    assert [axes.get_ylabel().split()[0] for axes in drawn(maker, "route_ribbon").axes] == ["28", "26", "24"]


# Speed


def test_accuracy_stands_over_the_speed_that_was_measured(tmp_path: Path) -> None:
    maker = Maker(tmp_path, methods())
    race = ("alpaca", 1, "eager")
    buddy, sleb, pudding = maker.main_run(NAME), maker.peer("sleb", 4), maker.peer("pudding", 4)
    dense, *_ = maker.config.runs()
    for run, removed, score in ((dense, 0, 0.7), (buddy, 4, 0.65), (buddy, 8, 0.5), (sleb, 4, 0.6), (pudding, 4, 0.55)):
        maker.accuracy(run, removed, uniform(score))
    passes = [10.0, 10.0, 10.0]
    for run in (buddy, pudding):
        maker.latency(run, race, "dense", 0, passes, passes)
    for removed, ratios in ((4, [1.08, 1.1, 1.12]), (8, [1.2, 1.3, 1.4])):
        maker.latency(buddy, race, "recompute", removed, passes, passes, decode_speedup=ratios)
    maker.latency(buddy, race, "sliced", 4, passes, passes, decode_speedup=[1.14, 1.15, 1.16])
    maker.latency(pudding, race, "reuse", 4, passes, passes, decode_speedup=[1.05, 1.06, 1.07])
    figure = drawn(maker, "accuracy_vs_speed")
    (axes,) = figure.axes
    found = {one.get_label(): one.lines[0] for one in axes.containers}
    points = {
        label: [(round(x, 6), round(y, 6)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        for label, line in found.items()
    }
    assert points == {
        "Dense": [(1.0, 70.0)],
        "SLEB": [(1.15, 60.0)],  # as fast as the model with as many blocks cut out
        "PuDDing": [(1.06, 55.0)],  # in a race of its own
        "BUDDY": [(1.1, 65.0), (1.3, 50.0)],
    }
    assert {label for label, line in found.items() if line.get_linestyle() != "None"} == {"BUDDY"}
    above = axes.child_axes[0]
    assert [label.get_text() for label in above.get_xticklabels()] == ["0", "4", "8"]
    assert list(above.get_xticks()) == pytest.approx([1, 30 / 26, 30 / 22])
    note = said(figure)
    assert "one standard error of the accuracy; 10th to 90th percentile of the timed passes" in note
    assert f"{NAME} on cpu (Synthetic)" in note


def test_the_saving_is_led_from_the_ideal_to_what_was_measured(tmp_path: Path) -> None:
    maker = Maker(tmp_path, demo(latency={"batch_sizes": [1, 4], "executions": ["dense", "sliced", "recompute"]}))
    run, passes = maker.main_run(NAME), [10.0, 10.0, 10.0]
    speed_ups = {1: {"sliced": 1.25, "recompute": 1.2}, 4: {"sliced": 1.25, "recompute": 1.28, "varied": 1.0}}
    for size, timed in speed_ups.items():
        maker.latency(run, ("alpaca", size, "eager"), "dense", 0, passes, passes)
        for execution, ratio in timed.items():
            ratios = [ratio - 0.02, ratio, ratio + 0.02]
            more = {"decode_speedup": ratios, "paths_mean": 2.5 if execution == "recompute" and size > 1 else None}
            maker.latency(run, ("alpaca", size, "eager"), execution, 8, passes, passes, **more)
    figure = drawn(maker, "savings")
    ideal = 100 * 22 / 30
    for axes, steps in zip(figure.axes, ([80.0, 100 / 1.2], [80.0, 100 / 1.28, 100.0]), strict=True):
        ends = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
        assert ends == [pytest.approx(pair) for pair in zip([ideal, *steps], steps, strict=False)]
    assert [axes.get_title() for axes in figure.axes] == ["batch 1", "batch 4"]
    bars = [one for one in figure.axes[0].containers if hasattr(one, "has_yerr")]
    low, high = bars[0].lines[2][0].get_segments()[0][:, 1]
    assert low < 80 < high < 100 / 1.23 + 1e-9
    assert "by batch: 4: 2.5" in said(figure)


def test_a_bar_of_a_stalled_pass_is_cut_with_an_arrow(small: Maker) -> None:
    run, passes = small.main_run(NAME), [10.0, 10.0, 10.0]
    small.latency(run, ("alpaca", 1, "eager"), "dense", 0, passes, passes)
    for removed, ratios in ((4, [1.1, 1.1, 9.0]), (12, [1.4, 1.4, 1.4])):
        more = {"prefill_speedup": ratios, "decode_speedup": [1.1, 1.1, 1.1]}
        small.latency(run, ("alpaca", 1, "eager"), "recompute", removed, passes, passes, **more)
    prefill, decode = drawn(small, "latency").axes[:2]
    low, high = prefill.get_ylim()
    assert low < 1.0
    assert 30 / 18 < high < 1.75  # the ideal, not the pass that stalled
    arrows = [line for line in prefill.lines if line.get_marker() == "^" and line.get_color() == style.INK]
    assert [float(line.get_ydata()[0]) for line in arrows] == [high]
    assert not [line for line in decode.lines if line.get_marker() == "^" and line.get_color() == style.INK]


def test_bars_that_lie_are_cut_sideways() -> None:
    _, (axes,) = style.panels(1, 1, 3.4, 2.0)
    axes.set_xlim(1, 2)
    bars = [(50.0, Measure(value=1.5, low=0.9, high=1.8)), (60.0, Measure(value=1.9, low=1.8, high=2.5))]
    style.cut_bars(axes, bars, sideways=True)
    arrows = [(line.get_marker(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert arrows == [("<", [1.0], [50.0]), (">", [2.0], [60.0])]


def test_figures_of_one_model_name_it_its_device_and_their_bars(small: Maker) -> None:
    small.everything()
    small.trainings()
    run = small.main_run(NAME)
    small.trace(run, 4, 3, [1, 2, 3, 6])
    small.rouge(run, 4, "reuse", [0.25, 0.2, 0.3], [0.15, 0.1, 0.2])
    bars = {
        "accuracy_vs_budget": "bars and band: \N{PLUS-MINUS SIGN} one standard error",
        "latency": "bars: 10th to 90th percentile of the timed passes",
        "figure1": "boxes: quartiles over the windows, with the median; whiskers: 5th to 95th percentile",
        "figure4": "mean over 4 prompts, 95 % intervals",
        "figure5": "95 % intervals over the prompts",
        "figure9": "",
    }
    for name, told in bars.items():
        assert said(drawn(small, name)).startswith(f"{NAME} on cpu (Synthetic)"), name
        assert told in said(drawn(small, name)), name


def test_rouge_shows_both_modes_with_their_intervals(small: Maker) -> None:
    run = small.main_run(NAME)
    small.rouge(run, 4, "reuse", [0.25, 0.2, 0.3], [0.15, 0.1, 0.2])
    small.rouge(run, 4, "recompute", [0.35, 0.33, 0.4], [0.25, 0.2, 0.3])
    one, longest = drawn(small, "figure5").axes
    assert sorted(container.lines[0].get_ydata()[0] for container in one.containers) == [0.25, 0.35]
    assert sorted(container.lines[0].get_ydata()[0] for container in longest.containers) == [0.15, 0.25]
    ends = sorted(tuple(container.lines[2][0].get_segments()[0][:, 1]) for container in one.containers)
    assert ends == [pytest.approx((0.2, 0.3)), pytest.approx((0.33, 0.4))]


# The budget predictor


def test_training_curves_stand_beside_the_uniform_policy(small: Maker) -> None:
    run = small.main_run(NAME)
    curve = [
        {"step": step, "loss": 1 / step, "reward": -step, "entropy": 3.3 - step / 100, "histogram": [1]}
        for step in (1, 2, 4)
    ]
    small.training(run, 60.0, preset="paper", curve=curve, entropy_uniform=math.log(28))
    loss, absent, reward, _, entropy, _ = drawn(small, "figure12").axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[1, 0.5, 0.25]]
    assert list(reward.lines[0].get_xdata()) == [1, 2, 4]
    # Below the entropy of the policy that picks all depths alike, at 0; above, all of it: one depth for each input.
    assert list(entropy.lines[0].get_ydata()) == pytest.approx([math.log(28) - each for each in (3.29, 3.28, 3.26)])
    assert [line.get_ydata()[0] for line in entropy.lines[1:]] == pytest.approx([0, math.log(28)])
    assert "not measured" in absent.texts[0].get_text()


def test_predictor_is_held_against_constant_depths(small: Maker) -> None:
    run = small.main_run(NAME)
    small.budget(run, "tuned", gain=0.05)
    quality, gain, own, chosen, _ = drawn(small, "figure13").axes
    lines = {container.get_label(): container.lines[0] for container in gain.containers}
    assert list(lines["Tuned recipe"].get_ydata()) == pytest.approx([0.05] * 5)
    assert list(lines["Same depths, random inputs"].get_ydata()) == pytest.approx([-0.02] * 5)
    assert list(lines["Oracle"].get_ydata()) == pytest.approx([0.1] * 5)
    (mark,) = own.containers
    assert mark.lines[0].get_xdata()[0] == pytest.approx(0.05)
    assert list(mark.lines[2][0].get_segments()[0][:, 0]) == pytest.approx([0.04, 0.06])
    assert own.get_xlabel() == "Mean gain over all prices (nats per token)"
    assert said(drawn(small, "figure13")).startswith(f"{NAME} on cpu (Synthetic); 95 % intervals over the inputs")
    constants = next(line for line in quality.lines if line.get_label() == "Constant depth")
    expected = [1.5 + 3 * (1 - depth / 30) ** 2 for depth in range(15, 31)]
    assert list(constants.get_ydata()) == pytest.approx(expected)
    assert chosen.images[0].get_array().sum() == pytest.approx(1)


def test_records_of_a_real_predictor_are_drawn(small: Maker) -> None:
    torch = pytest.importorskip("torch")
    from buddy.evaluation.budgets import measure, table_depths
    from buddy.policies.predictor import BudgetPredictor

    run = small.main_run(NAME)
    random = torch.Generator().manual_seed(0)
    contexts = torch.randn(40, 6, generator=random)
    for preset, price in (("paper", None), ("tuned", 0.5)):
        predictor = BudgetPredictor(6, list(range(15, 31, 3)), preset, price=price)
        depths = torch.tensor(table_depths(predictor, 30))
        losses = 1.5 + (30 - depths) * (0.05 + 0.05 * torch.rand(40, 1, generator=random, dtype=torch.float64))
        metrics = {"dataset": "alpaca", **measure(predictor, contexts, losses, 30, resamples=50)}
        path = small.records / "budget" / run.path / f"preset~{preset}" / "dataset~alpaca.json"
        small.record("budget", run, 0, metrics, n=40).write(path)
    quality, gain, *_ = drawn(small, "figure13").axes
    lines = {container.get_label(): container.lines[0] for container in gain.containers}
    # Untrained, the paper's preset picks the first of its depths for every input: a constant, so it gains nothing.
    assert list(lines["Paper's recipe"].get_xdata()) == [15]
    assert list(lines["Paper's recipe"].get_ydata()) == pytest.approx([0])
    assert all(line.get_ydata().min() > -1e-9 for name, line in lines.items() if name == "Oracle")
    constants = next(line for line in quality.lines if line.get_label() == "Constant depth")
    assert list(constants.get_ydata()) == pytest.approx(losses.mean(0).tolist())


def test_losses_of_two_kinds_share_no_axis(small: Maker) -> None:
    """A predictor of divergences beside one of cross-entropies: its gain is shown, and not on the others' frontier."""
    run = small.main_run(NAME)
    small.budget(run, "tuned", gain=0.05)
    path = small.budget(run, "rise", gain=0.02)
    content = json.loads(path.read_text())
    content["metrics"]["loss"] = "kl"
    path.write_text(json.dumps(content))
    quality, gain, own, *_ = drawn(small, "figure13").axes
    for axes in (quality, gain):
        assert {container.get_label() for container in axes.containers} >= {"Tuned recipe"}
        assert "Rise recipe" not in {container.get_label() for container in axes.containers}
    assert quality.get_ylabel() == "Loss (nats per token)"
    shown = sorted(float(container.lines[0].get_xdata()[0]) for container in own.containers)
    assert shown == pytest.approx([0.02, 0.05])
    for file in (small.records / "budget" / run.path / "preset~tuned").iterdir():
        file.unlink()
    alone, *_ = drawn(small, "figure13").axes
    assert alone.get_ylabel() == "KL (nats per token)"


def test_what_is_left_of_scores_is_of_the_whole_model(small: Maker) -> None:
    run = small.main_run(NAME)
    dense = next(one for one in small.config.runs() if one.method == "dense")
    small.budget(run, "tuned")
    score = {"acc": 0.6, "acc_stderr": 0.03, "n": 100}
    whole, left = "1" * 80 + "0" * 20, "1" * 55 + "0" * 40 + "1" * 5
    full = {**score, "acc": 0.8, "items": {"acc": whole}}
    small.accuracy(dense, 0, {"piqa": full, "arc_challenge": {**score, "acc_norm": 0.5}})
    shallow = {"arc_challenge": {**score, "acc_norm": 0.4, "acc_norm_stderr": 0.02, "executed_mean": 15}}
    small.predicted(run, "tuned", {"piqa": {**score, "items": {"acc": left}, "executed_mean": 24.0}, **shallow})
    axes = drawn(small, "figure13").axes[-2]  # the colour bar is last
    assert [label.get_text() for label in axes.get_xticklabels()] == ["PIQA", "ARC-c"]
    (bars,) = axes.containers
    assert list(bars.lines[0].get_ydata()) == pytest.approx([75, 80])
    (piqa, arc) = bars.lines[2][0].get_segments()
    ours, theirs = (np.array([int(digit) for digit in text]) for text in (left, whole))
    at = np.random.default_rng(3).integers(100, size=(20_000, 100))  # the same items of both
    ends = 100 * np.percentile(ours[at].sum(1) / theirs[at].sum(1), (2.5, 97.5))
    assert list(piqa[:, 1]) == pytest.approx(list(ends), abs=1)
    assert list(arc[:, 1]) == pytest.approx([80, 80])  # no items, no interval
    assert any(list(line.get_ydata()) == pytest.approx([80, 50]) for line in axes.lines)
    # Scores without a depth enter no table.
    scored = study.load(small.folder).of(measured.Accuracy, NAME)
    assert [one.removed for one in scored if one.preset == "tuned"] == [None]


def test_what_is_left_of_mmlu_and_of_answers_is_shown_too(small: Maker) -> None:
    """Tasks that no table compares: the whole model's scores of them have a record of their own."""
    run = small.main_run(NAME)
    dense = next(one for one in small.config.runs() if one.method == "dense")
    small.budget(run, "tuned")
    whole, left = "1" * 50 + "0" * 50, "0" * 10 + "1" * 30 + "0" * 60
    score = {"acc_stderr": 0.05, "n": 100}
    small.accuracy(dense, 0, {"piqa": {**score, "acc": 0.8}})
    metrics = {"tasks": {"mmlu": {**score, "acc": 0.5, "items": {"acc": whole}}}, "executed_mean": 30.0}
    more = {"few_shot": 0, "limit": None}
    small.record("accuracy", dense, 0, {**metrics, **more}).write(
        small.records / "whole" / dense.path / "removed~0.json"
    )
    small.generation(dense, 0, 0.5, 0.5, items=10, right="1111100000")
    small.generation(run, 0, 0.4, 0.5, items=10, executed=24.0, preset="tuned", right="1110000001")
    mmlu = {**score, "acc": 0.3, "items": {"acc": left}, "executed_mean": 21.0}
    small.predicted(run, "tuned", {"piqa": {**score, "acc": 0.6, "executed_mean": 24.0}, "mmlu": mmlu})
    axes = drawn(small, "figure13").axes[-2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["PIQA", "MMLU", "GSM8K"]
    (bars,) = axes.containers
    assert list(bars.lines[0].get_ydata()) == pytest.approx([75, 60, 80])
    (_, of_mmlu, of_gsm8k) = bars.lines[2][0].get_segments()
    ours, theirs = (np.array([int(digit) for digit in text]) for text in (left, whole))
    at = np.random.default_rng(4).integers(100, size=(20_000, 100))  # the same items of both
    ends = 100 * np.percentile(ours[at].sum(1) / theirs[at].sum(1), (2.5, 97.5))
    assert list(of_mmlu[:, 1]) == pytest.approx(list(ends), abs=1.5)
    assert of_gsm8k[0, 1] < 80 < of_gsm8k[1, 1]
    assert any(list(line.get_ydata()) == pytest.approx([80, 70, 80]) for line in axes.lines)
    # Answers without a depth enter no table, nor do the whole model's scores on a task that no table has.
    answered = [one.removed for one in study.load(small.folder).of(measured.Generation, NAME)]
    assert sorted(answered, key=str) == [0, None]


def test_the_papers_predictor_is_shown_beside() -> None:
    theirs = published.retention("llama2-7b", published.MAIN_VARIANT)
    assert theirs["openbookqa"] == (84.6, 53.5)
    assert theirs["gsm8k"] == (75.1, 72.7)
    assert published.retention("qwen2.5-7b-instruct", published.MAIN_VARIANT) == {}
    assert published.retention("llama2-7b", {**published.MAIN_VARIANT, "recipe": "tuned"}) == {}


def test_many_data_sets_are_rows_of_one_column(small: Maker) -> None:
    run = small.main_run(NAME)
    for place, dataset in enumerate(("alpaca", "piqa", "siqa", "hellaswag", "all")):
        for preset in ("paper", "tuned") if dataset != "siqa" else ("tuned",):
            small.budget(run, preset, dataset, gain=0.01 * place)
    figure = drawn(small, "figure13")
    assert figure.get_figwidth() == pytest.approx(3.4)
    frontier, gain, own, paper_chose, tuned_chose, _ = figure.axes
    assert (frontier.get_title(), gain.get_title()) == ("Alpaca", "Alpaca")
    assert frontier.get_ylabel() == "Loss (nats per token)"
    names = [label.get_text() for label in own.get_yticklabels()]
    assert names == ["Alpaca", "PIQA", "SIQA", "HellaSwag", "All, pooled"]
    gains = {
        (round(float(one.lines[0].get_ydata()[0])), round(float(one.lines[0].get_xdata()[0]), 6))
        for one in own.containers
    }
    assert gains == {(row, 0.01 * row) for row in range(5)}
    assert len(own.containers) == 9
    # What a preset was not evaluated on is no row of zeros.
    shares = paper_chose.images[0].get_array()
    assert [bool(np.ma.getmaskarray(np.ma.masked_invalid(row)).all()) for row in shares] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert not np.isnan(np.asarray(tuned_chose.images[0].get_array(), dtype=float)).any()


def test_incomplete_records_of_figures_are_named_and_left_out(small: Maker, caplog: pytest.LogCaptureFixture) -> None:
    run = small.main_run(NAME)
    small.record("budget", run, 0, {"preset": "paper", "blocks": 30}).write(small.records / "budget/one.json")
    small.record("importance", run, 0, {"indicator": "taylor", "per_sample": [[1.0], [1.0, 2.0]]}).write(
        small.records / "importance/two.json"
    )
    small.record("training", run, 0, {"preset": "paper", "curve": []}).write(small.records / "training/three.json")
    small.record("rouge", run, 4, {"rouge1": {"mean": 0.2}}).write(small.records / "rouge/four.json")
    assert not measured.load(small.records)[0]
    warned = caplog.text
    assert all(f"{name}.json" in warned for name in ("one", "two", "three", "four"))


# Ablations


def test_one_axis_at_a_time_has_a_panel_per_ablation(papers: Maker) -> None:
    panels = drawn(papers, "ablation").axes
    assert [axes.get_title() for axes in panels] == ["Feature", "Prior", "Omega", "Source block"]
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["0.01", "0.1", "0.3", "0.5", "0.7", "1"]
    # A mark for each feature and depth, none of them joined; the four of a feature stand side by side.
    marks = [container.lines[0] for container in panels[0].containers]
    assert len(marks) == 3 * 4
    assert {line.get_linestyle() for line in marks} == {"None"}
    places = [float(line.get_xdata()[0]) for line in marks]
    assert min(np.diff(sorted(places))) > 0.1
    assert said(drawn(papers, "ablation")).endswith("95 % intervals over the items; hollow: the main run itself")


def right(share: float, items: int = 200, first: int = 0) -> dict[str, dict[str, object]]:
    """Every task with that share of its items right, one after the other from the first on."""
    digits = "".join("1" if (item - first) % items < round(share * items) else "0" for item in range(items))
    return {
        task: {"acc": share, "acc_stderr": 0.03, "n": items, "items": {"acc": digits}} for task in published_tasks()
    }


def published_tasks() -> list[str]:
    return [*uniform(0.5)]


def test_a_variant_is_drawn_as_what_it_is_over_the_main_run(small: Maker) -> None:
    none, taylor = small.config.ablation_runs(small.config.ablation("prior"))
    assert taylor.path == small.main_run(NAME).path
    for removed in (4, 8, 12):
        small.accuracy(taylor, removed, right(0.5))
        small.accuracy(none, removed, right(0.6, first=20))
    (axes,) = drawn(small, "ablation").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["\N{EN DASH}", "0.1"]  # omega
    at = {round(float(one.lines[0].get_xdata()[0])): one for one in axes.containers}
    assert at[0].lines[0].get_ydata()[0] == pytest.approx(10)
    # Right by one alone: 20 items by the main run, 40 by the variant. The bootstrap by hand, over the items of each task.
    ours, theirs = (
        np.array([float(digit) for digit in next(iter(right(*of).values()))["items"]["acc"]])
        for of in ((0.6, 200, 20), (0.5,))
    )
    drawn_items = np.random.default_rng(5).integers(200, size=(4000, 8, 200))
    ends = 100 * np.percentile((ours - theirs)[drawn_items].mean((1, 2)), (2.5, 97.5))
    assert list(at[0].lines[2][0].get_segments()[0][:, 1]) == pytest.approx(list(ends), abs=0.15)
    assert at[0].lines[0].get_fillstyle() == "full"
    assert list(at[1].lines[2][0].get_segments()[0][:, 1]) == [0, 0]
    assert at[1].lines[0].get_fillstyle() == "none"


def test_a_grid_has_a_panel_per_feature_and_source_block(tmp_path: Path) -> None:
    content = demo()
    axes = {"feature": ["key", "value"], "prior": ["none", "taylor"], "omega": [0.1, 0.5], "source_block": [1, 2]}
    content["study"]["ablations"] = [{"name": "prior", "backbone": NAME, **axes}]
    maker = Maker(tmp_path, content)
    runs = maker.config.ablation_runs(maker.config.ablation("prior"))
    for place, run in enumerate(runs):
        for removed in (4, 8, 12):
            maker.accuracy(run, removed, uniform(0.4 + 0.01 * place + 0.001 * removed))
    panels = drawn(maker, "ablation").axes
    assert [axes.get_title() for axes in panels] == [
        f"feature {feature}, source block {source}" for source in (1, 2) for feature in ("key", "value")
    ]
    main = [run.path for run in runs].index(maker.main_run(NAME).path)
    wanted = {"feature": "value", "prior": "taylor", "source_block": 2}
    places = [place for place, run in enumerate(runs) if wanted.items() <= run.variant.items()]
    taylor = [container.lines[0] for container in panels[3].containers if container.get_label() == "Taylor"]
    # The mean over the depths, which all see the same: what a run has more than the main one. No items, no bars.
    assert [line.get_ydata()[0] for line in taylor] == pytest.approx([float(place - main) for place in places])
    bars = [container.lines[2][0].get_segments() for container in panels[3].containers]
    assert all(np.isnan(segments).any() or len(segments) == 0 for (segments,) in bars)
