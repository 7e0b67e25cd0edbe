"""A study's page in W&B from top to bottom: what a group decides by, over the runs that its jobs have logged.

A panel is there only if something was measured that it can show, and a line is the mean of the runs behind one row of
the table beside it (`buddy.pages.runsets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy.pages.runsets import Runset, of_ablation, of_series, seeds
from buddy.reporting import cards, render, tables
from buddy.reporting.compare import compare
from buddy.reporting.grid import Grid
from buddy.reporting.labels import DATASETS, TASK_LABELS, series_labels, variant_labels
from buddy.reporting.measured import Accuracy, Latency
from buddy.reporting.significance import significance
from buddy.reporting.study import Race, Series, Study
from buddy.study.settings import Ablation
from buddy.tracking.job import at_depth

FULL, HALF, THIRD = 24, 12, 8
"""Widths of panels in a grid of 24 columns."""


@dataclass(frozen=True)
class Page:
    """What the blocks of a page are made from.

    Attributes:
        wr: W&B's module of reports.
        study: settings and records.
        entity, project: where the runs are.
        shared: conditions that every run of this study meets.
    """

    wr: Any
    study: Study
    entity: str
    project: str
    shared: Mapping[str, Any]

    def blocks(self) -> Iterator[Any]:
        """The page from top to bottom."""
        yield self.wr.MarkdownBlock(text=cards.provenance(self.study))
        yield self.wr.TableOfContents()
        yield from self._verdicts()
        yield self.wr.H1("Accuracy against budget")
        for backbone in self.study.config.study.backbones:
            yield from self._accuracy(backbone)
        for ablation in self.study.config.study.ablations:
            yield from self._ablation(ablation)
        for backbone in self.study.config.timed_backbones():
            yield from self._latency(backbone)
        yield self.wr.H1("Training")
        for backbone in self.study.config.study.backbones:
            yield from self._training(backbone)
        if self.study.config.predicting_runs():
            yield from self._predictors()
        yield from self._tables_and_figures()

    # --- blocks

    def _verdicts(self) -> Iterator[Any]:
        """The study beside the paper, and BUDDY against its peers."""
        yield self.wr.H1("Verdicts")
        for name, build in (("compare", compare), ("significance", significance)):
            yield self.wr.MarkdownBlock(text=self._table(name, build))

    def _accuracy(self, backbone: str) -> Iterator[Any]:
        compared = self.study.compared(backbone)
        found = self._sets(backbone, compared, series_labels(compared), "evaluate")
        scored = self.study.of(Accuracy, backbone)
        tasks = [task for task in self.study.tasks if any(task in one.scores for one in scored)]
        if not tasks:
            return
        shared = {"x": "budget", "title_x": "fraction of blocks executed", **self._grouped(found)}
        depths = [removed for removed in self.study.removed(backbone) if any(one.removed == removed for one in scored)]
        panels = [
            self._line("average accuracy (%)", ["accuracy/average"], FULL, 10, **shared),
            *(
                self._bars(f"average accuracy (%), {depth} removed", at_depth("average", depth), found)
                for depth in depths
            ),
            *(self._line(f"{TASK_LABELS[task]} (%)", [f"accuracy/{task}"], THIRD, 6, **shared) for task in tasks),
        ]
        yield self.wr.H2(backbone)
        yield self._grid(found, panels)

    def _ablation(self, ablation: Ablation) -> Iterator[Any]:
        """Parallel coordinates over the axes that vary, ending in the accuracy at each depth, and every axis by itself."""
        found = of_ablation(self.study.config, ablation, {**self.shared, "stage": "evaluate"})
        varied = ablation.axes()
        depths = self.study.removed(ablation.backbone)
        score = at_depth("average", depths[-1])
        wr = self.wr
        columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(axis), display_name=axis) for axis in varied]
        columns += [
            wr.ParallelCoordinatesPlotColumn(
                metric=wr.SummaryMetric(at_depth("average", depth)), display_name=f"accuracy, {depth} removed"
            )
            for depth in depths
        ]
        # The last column colours the lines: yellow is good.
        gradient = [wr.GradientPoint(color=color, offset=offset) for color, offset in _GRADIENT]
        panels = [
            wr.ParallelCoordinatesPlot(
                columns=columns, title=ablation.name, gradient=gradient, layout=wr.Layout(w=FULL, h=10)
            ),
            wr.ParameterImportancePlot(with_respect_to=score, layout=wr.Layout(w=HALF, h=8)),
            wr.RunComparer(diff_only="split", layout=wr.Layout(w=HALF, h=8)),
            *(
                wr.BarPlot(
                    title=f"accuracy (%) by {axis}, {depths[-1]} removed: mean and standard error over its runs",
                    metrics=[score],
                    groupby=wr.Config(axis),
                    groupby_aggfunc="mean",
                    groupby_rangefunc="stderr",
                    layout=wr.Layout(w=HALF, h=8),
                )
                for axis in varied
            ),
            *(
                wr.ScatterPlot(
                    title=f"accuracy (%) by {axis}, {depths[-1]} removed",
                    x=wr.Config(axis),
                    y=wr.SummaryMetric(score),
                    layout=wr.Layout(w=HALF, h=8),
                )
                for axis in varied
            ),
        ]
        yield wr.H1(f"Ablation: {ablation.name}")
        if ablation.backbone not in self.study.config.scored_backbones():
            yield self._grid([found], panels, columns=_columns(varied, depths))
            return
        # A run's evaluation and its likelihoods are jobs, and runs of W&B, of their own: a row of the table is both.
        panels += [
            wr.BarPlot(
                title=at_depth(name, depth).replace("_", " "),
                metrics=[at_depth(name, depth)],
                groupby=wr.Config("run"),
                layout=wr.Layout(w=HALF, h=8),
            )
            for depth in depths
            for name in ("nll", "distinct_paths")
        ]
        both = found.among(stage=("evaluate", "score"))
        scores = ("average", "nll", "kl", "distinct_paths")
        yield self._grid([both], panels, columns=_columns(varied, depths, scores), rows="config.run")

    def _latency(self, backbone: str) -> Iterator[Any]:
        """Tokens per second over the number of removed blocks, as they were timed against each other."""
        timed = self.study.timed(backbone)
        labels = variant_labels(timed)
        races = self.study.races(backbone, [one.path for one in timed])
        for dataset in self.study.config.latency.datasets:
            panels: list[Any] = []
            for race in [race for race in races if race.dataset == dataset]:
                panels += self._race(backbone, timed, race)
            if panels:
                found = [one.also(dataset=dataset) for one in self._sets(backbone, timed, labels, "latency")]
                yield self.wr.H1(f"Latency of {backbone}, {DATASETS.get(dataset, dataset)}")
                yield self._grid(found, panels)

    def _race(self, backbone: str, timed: Sequence[Series], race: Race) -> list[Any]:
        """Prefill and decode of one race; mixed batches have no one depth and are in the summary."""
        found = [record for one in timed for record in self.study.race(backbone, race, one.path)]
        names = list(dict.fromkeys(_execution(one) for one in found if one.execution not in ("mixed", "nested")))
        return [
            self._line(
                f"{phase} tokens/s, batch {race.batch_size}, {race.engine}",
                [f"b{race.batch_size}/{race.engine}/{name}/{phase}_tok_s" for name in names],
                HALF,
                title_x="blocks removed",
                groupby=self.wr.Config("method"),
            )
            for phase in ("prefill", "decode")
            if names
        ]

    def _training(self, backbone: str) -> Iterator[Any]:
        """The loss over the steps, and what routers learn."""
        trained = [one for one in self.study.compared(backbone) if one.method != "dense"]
        labels = series_labels(trained)
        routers = [one for one in trained if one.method == "buddy"]
        peers = [one for one in trained if one not in routers]
        found = [*self._sets(backbone, routers, labels, "train"), *self._sets(backbone, peers, labels, "adapt")]
        if not found:
            return
        grouped = self._grouped(found)
        panels = [self._line("loss", ["loss"], HALF, **grouped), self._line("tokens/s", ["tok_s"], HALF, **grouped)]
        if routers:
            panels += [self._line(title, names, THIRD, 6, **grouped) for title, names in _PROBES.items()]
        yield self.wr.H2(backbone)
        yield self._grid(found, panels)

    def _predictors(self) -> Iterator[Any]:
        """What budget predictors learn, and the accuracy at the depths that they choose."""
        wr = self.wr
        presets = self.study.config.predictor.presets
        where = {key: (value,) for key, value in self.shared.items()}
        trained = [Runset(name, {**where, "stage": ("predictor",), "preset": (name,)}) for name in presets]
        scored = [Runset(name, {**where, "stage": ("evaluate-auto",), "preset": (name,)}) for name in presets]
        yield wr.H1("Budget predictors")
        panels = [self._line(title, [name], THIRD, 6) for name, title in _PREDICTOR.items()]
        yield self._grid(trained, panels)
        if any(isinstance(one, Accuracy) and one.preset for one in self.study.records):
            panel = wr.ScatterPlot(
                title="average accuracy (%) at predicted depths",
                x=wr.SummaryMetric("executed_predicted"),
                y=wr.SummaryMetric("average_predicted"),
                layout=wr.Layout(w=FULL, h=8),
            )
            yield self._grid(scored, [panel])

    def _tables_and_figures(self) -> Iterator[Any]:
        """The tables as text and as W&B keeps them, for sorting and filtering, and the figures."""
        wr = self.wr
        yield wr.H1("Tables and figures")
        names = tables.names(self.study)
        for name in names:
            yield wr.MarkdownBlock(text=self._table(name, lambda study, name=name: tables.build(study, name)))
        panels = [wr.WeavePanelSummaryTable(table_name=name, layout=wr.Layout(w=FULL, h=12)) for name in names]
        figures = sorted(file.stem for file in (self.study.folder / "figures").glob("*.png"))
        if figures:
            panels.append(wr.MediaBrowser(media_keys=figures, num_columns=2, layout=wr.Layout(w=FULL, h=14)))
        where = {key: (value,) for key, value in self.shared.items()}
        found = [Runset(f"{stage}s", {**where, "stage": (stage,)}) for stage in ("table", "figure")]
        yield self._grid(found, panels)

    # --- parts of blocks

    def _sets(self, backbone: str, series: Sequence[Series], labels: Mapping[str, str], stage: str) -> list[Runset]:
        shared = {**self.shared, "stage": stage}
        return [of_series(one, labels[one.path], backbone, shared) for one in series]

    def _grid(
        self, runsets: Sequence[Runset], panels: Sequence[Any], columns: Sequence[str] = (), rows: str = ""
    ) -> Any:
        """Panels over sets of runs, whose table shows these columns, or what people have chosen; with ``rows`` the runs that
        have the same of it are one row, which has the value of each column from whichever of them has one."""
        place = {"entity": self.entity, "project": self.project}
        shown: dict[str, Any] = {"visible_columns": list(columns), "lock_columns": True} if columns else {}
        shown |= {"groupby": [rows]} if rows else {}
        sets = [self.wr.Runset(**place, name=one.name, filters=one.filters(), **shown) for one in runsets]
        return self.wr.PanelGrid(runsets=sets, panels=list(panels))

    def _grouped(self, runsets: Sequence[Runset]) -> dict[str, Any]:
        """All runs of a set are one line, with its standard error where they differ in their seed."""
        area = "stderr" if seeds(runsets) > 1 else "none"
        return {"groupby": self.wr.Config("method"), "groupby_aggfunc": "mean", "groupby_rangefunc": area}

    def _line(self, title: str, names: list[str], width: int, height: int = 8, x: str = "Step", **more: Any) -> Any:
        """Curves of these names over the steps, in a panel of this size."""
        return self.wr.LinePlot(title=title, x=x, y=names, layout=self.wr.Layout(w=width, h=height), **more)

    def _bars(self, title: str, metric: str, runsets: Sequence[Runset]) -> Any:
        """A bar for each set of runs."""
        layout = self.wr.Layout(w=HALF, h=8)
        return self.wr.BarPlot(title=title, metrics=[metric], layout=layout, **self._grouped(runsets))

    def _table(self, name: str, build: Any) -> str:
        """A table as the study's folder has it, or built anew where it has none."""
        file = Path(self.study.folder) / "tables" / f"{name}.md"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        grid: Grid = build(self.study)
        return render.to_markdown(grid)


def _columns(axes: Sequence[str], depths: Sequence[int], scores: Sequence[str] = ("average",)) -> list[str]:
    """Columns of a table of runs: what varies, what came out at each depth, and whose it is."""
    return [
        *(f"config:{axis}.value" for axis in axes),
        *(f"summary:{at_depth(score, depth)}" for score in scores for depth in depths),
        *("config:seed.value", "config:commit.value", "tags:__ALL__"),
    ]


_GRADIENT = (("#440154", 0), ("#21918c", 50), ("#fde725", 100))


def _execution(timed: Latency) -> str:
    """An execution's name in the curves of a latency job."""
    return timed.execution if timed.slack is None else f"{timed.execution}_slack{timed.slack}"


_PROBES = {
    "distinct paths of the probe prompts": ["probe_paths"],
    "share of probe prompts off the prior's route": ["probe_off_prior"],
    "scores: spread between prompts, and margin": ["probe_spread_prompts", "probe_margin"],
}
"""What a router does with the prompts that it is watched on (`buddy.training.probes`)."""

_PREDICTOR = {"loss": "loss", "entropy": "entropy (nats)", "mean_budget": "mean budget"}


def title(study: Study) -> str:
    """The page's title."""
    return f"BUDDY study {study.name}"[:128]
