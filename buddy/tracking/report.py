"""A study's page in W&B: the views that people review a sweep with, over the runs that its jobs have logged.

Curves and axes are live, so a page that is saved once goes on showing what arrives later. Saving again renews the
tables and keeps the page's address, which a file beside the study's runs remembers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from buddy.errors import UserError, lacking
from buddy.settings import HEADLINE
from buddy.storage.files import read_json, write_json
from buddy.study.config import Config
from buddy.study.settings import Ablation, Variant
from buddy.tracking.modes import in_one_line

PAGE = "report.json"
FULL, HALF, THIRD = 24, 12, 8
"""Widths of panels in a grid of 24 columns."""


def save(study: Config, folder: Path, entity: str | None, project: str) -> str:
    """Make the page or renew it.

    Args:
        study: the study.
        folder: the study's folder, with ``tables/`` and ``wandb/``.
        entity, project: where its runs are; the key's own user by default.

    Returns:
        The page's address.

    Raises:
        UserError: the package that writes pages is missing, or the server refuses.
    """
    wr = _package()
    import wandb

    page = folder / "wandb" / PAGE
    try:
        owner = str(entity or wandb.Api().default_entity)
        known = _known(page, owner, project)
        report = wr.Report(
            project=project, entity=owner, title=title(study), description=describe(study), width="fluid"
        )
        report.blocks = list(blocks(wr, study, folder, owner, project))
        report.id = known
        report.save()
    except (wandb.errors.Error, ValueError, TypeError, KeyError) as error:
        # A project without runs, a server without pages, a page that somebody has deleted: the reason is the server's.
        raise UserError(
            f"W&B: no report of {project} ({in_one_line(error)}); are its runs there? `buddy wandb-sync --study "
            f"{study.study.name}` sends them, and without {page} a new report is made"
        ) from None
    write_json(page, {"id": report.id, "url": report.url, "entity": owner, "project": project})
    return str(report.url)


def _package() -> Any:
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise (lacking("wandb_workspaces") or error) from None
    return wr


def _known(page: Path, entity: str, project: str) -> str:
    """Id of the page saved before in this place, "" if there is none."""
    content = read_json(page)
    return str(content.get("id", "")) if (content.get("entity"), content.get("project")) == (entity, project) else ""


def title(study: Config) -> str:
    """The page's title."""
    return f"BUDDY study {study.study.name}"[:128]


def describe(study: Config) -> str:
    """What the study compares, in one line."""
    plan = study.study
    return f"{', '.join(plan.methods)} on {', '.join(plan.backbones)}; seeds {', '.join(map(str, plan.seeds))}"


def blocks(wr: Any, study: Config, folder: Path, entity: str, project: str) -> Iterator[Any]:
    """The page from top to bottom."""

    def runs(name: str, **config: str) -> Any:
        return _runs(wr, entity, project, name, {"study": study.study.name, **config})

    yield wr.TableOfContents()
    yield wr.H1("Accuracy against budget")
    for backbone in study.study.backbones:
        yield wr.H2(backbone)
        yield wr.PanelGrid(runsets=_compared(runs, study, backbone), panels=_accuracy(wr, study))
    for ablation in study.study.ablations:
        yield wr.H1(f"Ablation: {ablation.name}")
        recipes = ablation.recipe or [study.study.main.recipe]
        fixed = {"recipe": recipes[0]} if len(recipes) == 1 and len(_recipes(study)) > 1 else {}
        chosen = runs(ablation.name, stage="evaluate", backbone=ablation.backbone, method="buddy", **fixed)
        yield wr.PanelGrid(runsets=[chosen], panels=_ablation(wr, study, ablation))
    for backbone in study.timed_backbones():
        yield wr.H1(f"Latency of {backbone}")
        chosen = runs(backbone, stage="latency", backbone=backbone)
        yield wr.PanelGrid(runsets=[chosen], panels=_latency(wr, study))
    yield wr.H1("Training")
    stages = [runs("BUDDY", stage="train"), runs("peers", stage="adapt")]
    yield wr.PanelGrid(runsets=stages, panels=_training(wr))
    yield wr.H1("Tables and figures")
    for name in study.measured_tables():
        file = folder / "tables" / f"{name}.md"
        if file.is_file():
            yield wr.MarkdownBlock(text=file.read_text(encoding="utf-8"))
    yield wr.PanelGrid(
        runsets=[runs("tables", stage="table"), runs("figures", stage="figure")], panels=_shown(wr, study, folder)
    )


def _runs(wr: Any, entity: str, project: str, name: str, config: Mapping[str, str]) -> Any:
    """The runs whose settings are these, most recent first."""
    from wandb_workspaces import expr

    filters = [expr.Config(key) == value for key, value in config.items()]
    return wr.Runset(entity=entity, project=project, name=name, filters=filters)


def _recipes(study: Config) -> list[str]:
    """Recipes of the router that occur in the study."""
    found = [str(run.variant["recipe"]) for run in study.runs() if run.method == "buddy"]
    return list(dict.fromkeys(found))


def _compared(runs: Any, study: Config, backbone: str) -> list[Any]:
    """The evaluations of a backbone; BUDDY's recipes are sets of their own where there are several, as runs of one method
    are drawn as one line."""
    recipes = _recipes(study)
    if len(recipes) < 2:
        return [runs(backbone, stage="evaluate", backbone=backbone)]
    others = [method for method in study.study.methods if method != "buddy"]
    return [
        *(runs(method, stage="evaluate", backbone=backbone, method=method) for method in others),
        *(
            runs(f"buddy, {recipe}", stage="evaluate", backbone=backbone, method="buddy", recipe=recipe)
            for recipe in recipes
        ),
    ]


def _accuracy(wr: Any, study: Config) -> list[Any]:
    """The average over the tasks against the budget, one line per method, and the same for every task."""
    shared = {"x": "budget", "groupby": wr.Config("method")}
    executed = "fraction of blocks executed"
    first = _line(wr, "average accuracy (%)", ["average"], FULL, 10, title_x=executed, **shared)
    scores = [f"{task}/{HEADLINE[task]}" for task in study.evaluation.tasks]
    return [first, *(_line(wr, score, [score], THIRD, 6, **shared) for score in scores)]


def _line(wr: Any, title: str, names: list[str], width: int, height: int = 8, x: str = "Step", **more: Any) -> Any:
    """Curves of these names over the steps, in a panel of this size."""
    return wr.LinePlot(title=title, x=x, y=names, layout=wr.Layout(w=width, h=height), **more)


def _ablation(wr: Any, study: Config, ablation: Ablation) -> list[Any]:
    """Parallel coordinates over the axes that vary, ending in the accuracy at each depth; what matters most beside."""
    varied = [axis for axis in Variant.model_fields if len(getattr(ablation, axis) or []) > 1]
    depths = sorted(study.removed(ablation.backbone))
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=wr.Config(axis), display_name=axis) for axis in varied or ["omega"]
    ]
    columns += [
        wr.ParallelCoordinatesPlotColumn(
            metric=wr.SummaryMetric(average_name(depth)), display_name=f"accuracy, {depth} removed"
        )
        for depth in depths
    ]
    return [
        wr.ParallelCoordinatesPlot(columns=columns, title=ablation.name, layout=wr.Layout(w=FULL, h=10)),
        *(
            wr.ScatterPlot(
                title=f"{axis}, {depths[-1]} removed",
                x=wr.Config(axis),
                y=wr.SummaryMetric(average_name(depths[-1])),
                layout=wr.Layout(w=HALF, h=8),
            )
            for axis in varied
        ),
    ]


def average_name(removed: int) -> str:
    """Name of the average accuracy at a depth in a run's summary, where W&B can sort and compare runs by it."""
    return f"average_removed_{removed}"


def _latency(wr: Any, study: Config) -> list[Any]:
    """Tokens per second against the number of removed blocks, one line per execution."""
    panels = []
    for size in study.latency.batch_sizes:
        for phase in ("prefill", "decode"):
            for engine in study.latency.engines:
                names = [
                    f"b{size}/{engine}/{execution}/{phase}_tok_s"
                    for execution in study.latency.executions
                    if execution not in ("mixed", "nested")  # no one depth: it is in the summary
                ]
                title = f"{phase} tokens/s, batch {size}, {engine}"
                panels.append(_line(wr, title, names, HALF, title_x="blocks removed"))
    return panels


def _training(wr: Any) -> list[Any]:
    """The loss over the steps, and what the routers learn."""
    return [
        _line(wr, "loss", ["loss"], HALF, groupby=wr.Config("method")),
        _line(wr, "tokens/s", ["tok_s"], HALF),
        *(_line(wr, title, names, THIRD, 6) for title, names in _PROBES.items()),
    ]


_PROBES = {
    "distinct paths of the probe prompts": ["probe_paths"],
    "share of probe prompts off the prior's route": ["probe_off_prior"],
    "scores: spread between prompts, and margin": ["probe_spread_prompts", "probe_margin"],
}
"""What a router does with the prompts that it is watched on (`buddy.training.probes`)."""


def _shown(wr: Any, study: Config, folder: Path) -> list[Any]:
    """The tables as W&B keeps them, for sorting and filtering, and the figures."""
    tables = [
        wr.WeavePanelSummaryTable(table_name=name, layout=wr.Layout(w=FULL, h=12)) for name in study.measured_tables()
    ]
    figures = sorted(file.stem for file in (folder / "figures").glob("*.png"))
    if not figures:
        return tables
    return [*tables, wr.MediaBrowser(media_keys=figures, num_columns=2, layout=wr.Layout(w=FULL, h=14))]
