"""``buddy plan``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.study import config as studies
from buddy.study import planning
from buddy.study.devices import DEVICES
from buddy.study.jobs import Jobs

if TYPE_CHECKING:
    from rich.table import Table

    from buddy.study.estimates import Estimates
    from buddy.study.planning import Plan

WIDTH = 118
"""Of what is printed where no terminal says how wide it is."""


def plan(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="tables, figures, or paths of outputs, as snakemake takes them; all by default"),
    ] = None,
    configfile: Annotated[
        list[Path] | None,
        typer.Option(help="overlay of config.yaml, as snakemake takes it; several as often as needed"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=f"what the jobs run on: {', '.join(DEVICES)}; limits.device by default")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="how many run side by side, to say when all is done", min=1)] = None,
    results: arg.Results = Path("results"),
) -> None:
    """Say what a study takes before it is submitted: jobs, GPU-hours stage by stage, the longest chain, and memory.

    Counts what is not done yet. Times are arithmetic of parameters, tokens and the device (docs/planning.md), corrected by the
    study's own jobs that ran on it.

    \b
    Examples:
      buddy plan --device h100
      buddy plan table2 table4 --device h100 --gpus 8 --configfile workflow/weekend.yaml
    """
    from rich.console import Console

    study = studies.read(Path("config.yaml"), *(configfile or []))
    folder = results / study.study.name
    estimates, found = planning.read(Jobs(study, str(folder)), folder, device or study.limits.device, targets or [])
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = WIDTH
    title = f"{study.study.name} on {estimates.device.name}"
    console.print(_table(found, title, estimates.device.is_gpu))
    for line in _lines(estimates, found):
        console.print(line, markup=False, soft_wrap=True)
    if gpus is not None and found.jobs:
        console.print(f"On {gpus} GPUs all is done after {_time(planning.makespan(estimates, found, gpus))}.")


def _table(found: Plan, title: str, gpu: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, show_footer=True)
    columns = (
        *(("stage", "all"), ("jobs", str(found.jobs)), ("done", str(sum(row.done for row in found.rows)))),
        *(("GPU-hours" if gpu else "hours", f"{found.gpu_seconds / 3600:.1f}"), ("longest", ""), ("time limit", "")),
        *(("device memory", ""), ("host memory", "")),
    )
    for place, (name, footer) in enumerate(columns):
        table.add_column(name, footer, justify="left" if place == 0 else "right")
    for row in found.rows:
        on_gpu = row.memory > 0
        cells = (
            *(str(len(row.jobs) or "-"), str(row.done or "-"), f"{row.seconds / 3600:.1f}" if on_gpu else "-"),
            *(_time(row.longest) if row.jobs else "-", _time(60 * row.minutes) if on_gpu else "-"),
            *(f"{row.memory / 1e9:.0f} GB" if on_gpu else "-", f"{row.host_mb / 1e3:.0f} GB" if on_gpu else "-"),
        )
        table.add_row(row.stage, *cells)
    return table


def _time(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _lines(estimates: Estimates, found: Plan) -> Iterator[str]:
    device = estimates.device
    if not found.jobs:
        yield "Nothing is left to be done."
        return
    yield f"Longest chain, {_time(sum(map(estimates.seconds, found.chain)))}, however many run side by side:"
    for job in found.chain:
        yield f"  {_time(estimates.seconds(job)):>8}  {job.stage} {job.name}".rstrip()
    demand = estimates.demand(found.largest) if found.largest else None
    if found.largest is not None and demand is not None:
        held = demand.memory(device) / 1e9
        verdict = (
            "" if held <= device.memory_gb else ": it does not fit; lower its batch_size or set gradient_checkpointing"
        )
        yield f"Largest job: {found.largest.stage} {found.largest.name}, {held:.0f} of {device.memory_gb:g} GB{verdict}"
    for row in found.rows:
        if row.memory and row.minutes * 60 < row.longest:
            yield f"{row.stage}: a limit of {_time(60 * row.minutes)} is less than it takes; raise `hours` of its backbone, or leave it out"
    for stage, one in estimates.corrections.items():
        yield f"Corrected by {one.jobs} jobs of {stage} that ran on {device.name}: {one.factor:.2f} times the arithmetic"
    for name in estimates.jobs.study.study.backbones:
        if not estimates.shape(name).known:
            yield f"{name}: its size is not known before it is fetched, and a guess; say `parameters` of it in billions"
    yield f"{device.name}: {device.memory_gb:g} GB, {device.flops / 1e12:.3g} TFLOP/s and {device.bytes_s / 1e9:.4g} GB/s at work"
