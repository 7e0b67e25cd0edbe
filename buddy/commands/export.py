"""``buddy export``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from buddy import runs
from buddy.commands import _arguments as arg
from buddy.errors import UserError
from buddy.storage import folders
from buddy.study.records import Record
from buddy.tasks import percents


def export(
    run: arg.Run,
    removed: Annotated[int, typer.Option(help="number of blocks that are left out", min=0)],
    out: arg.Folder,
    data: Annotated[
        Path | None,
        typer.Option(help="prompts, for methods that choose by the input: a data set folder from `buddy data`"),
    ] = None,
    prompts: Annotated[int, typer.Option(help="prompts of it that are looked at", min=1)] = 100,
    name: Annotated[str, typer.Option(help="the exported model's name; its folder's by default")] = "",
    license: Annotated[
        str, typer.Option(help="licence of the backbone, as the Hub spells it, for the model card")
    ] = "",
    backbone: Annotated[Path | None, typer.Option(help="backbone folder, where it has moved")] = None,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Write a run at one depth as a plain Hugging Face folder: blocks taken out, LoRA merged, no code of this package.

    Static peers are exported exactly. BUDDY, PuDDing and FiRST choose blocks by the input: the route that they take most
    often over the prompts of --data is exported, and the model card says how often that is.

    \b
    Examples:
      buddy export --run results/demo/runs/.../removed~8/lora~trained/seed~0 --removed 8 --out sleb-8
      buddy export --run results/demo/runs/.../seed~0 --removed 8 --data results/demo/data/alpaca --out buddy-8 \\
          --license apache-2.0
    """
    from buddy import export as exporting
    from buddy.evaluation import traces

    folders.claim(out, exporting.HOLDS)
    texts = traces.prompts(data)[:prompts] if data else None
    model = runs.load(run, backbone=backbone, device=device, dtype=dtype)
    if removed >= model.blocks:
        raise UserError(f"--removed: {removed} of {model.blocks} blocks leaves none")
    found = exporting.chosen(model, removed, texts)
    text = exporting.card(name or out.resolve().name, model, found, license, list(_scores(run, removed)))
    exporting.save(model, found.kept, out, text)
    typer.echo(
        f"{out}: {len(found.kept)} of {model.blocks} blocks, without {', '.join(map(str, found.removed)) or 'none'}"
    )
    if found.seen:
        typer.echo(
            f"its route covers {100 * found.steps:.1f} % of the steps after {found.seen} prompts, {found.paths} distinct routes"
        )


def _scores(run: Path, removed: int) -> Iterator[str]:
    """What the records of the run's study say of it at a depth; none for a run outside a study."""
    folder = run.resolve()
    study = next((parent for parent in folder.parents if parent.name == "runs"), None)
    if study is None:
        return
    records, path = study.parent / "records", folder.relative_to(study)
    accuracy = records / "accuracy" / path / f"removed~{removed}.json"
    if accuracy.exists():
        metrics = Record.read(accuracy).metrics
        tasks = percents(metrics["tasks"]).values()
        limit = f", the first {metrics['limit']} items of each" if metrics.get("limit") else ""
        yield f"accuracy, average of {len(tasks)} tasks: {fmean(tasks):.2f} %{limit}"
    for file in sorted((records / "likelihood" / path).rglob(f"removed~{removed}.json")):
        found = Record.read(file).metrics
        sets = ", ".join(found["datasets"])
        yield f"held-out text ({sets}; K/V {found['kv']}, {found['decode']}): {found['average']['nll']['mean']:.3f} nats per token"
