"""``buddy data``: fetch a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buddy import runs
from buddy.commands import _arguments as arg
from buddy.commands._common import backbone_folder, check_one_gpu, tracked_job
from buddy.data.catalogue import CATALOGUE
from buddy.study.settings import Data

if TYPE_CHECKING:
    from buddy.data.rows import Row
    from buddy.data.store import Answerer

_fields = Data.model_fields


def data(
    name: Annotated[str, typer.Option(help="data set: " + ", ".join(CATALOGUE))],
    out: arg.Folder,
    source: Annotated[str, typer.Option(help=_fields["source"].description)] = _fields["source"].default,
    of: Annotated[
        str, typer.Option(help="of pairs: the data sets whose prompts it is made of, separated by commas")
    ] = "",
    answers_by: Annotated[
        Path | None,
        typer.Option(help="backbone folder, or its name in a study: it answers the prompts of the training split"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help=_fields["new_tokens"].description, min=1)] = _fields[
        "new_tokens"
    ].default,
    batch_size: Annotated[int, typer.Option(help=_fields["batch_size"].description, min=1)] = _fields[
        "batch_size"
    ].default,
    examples: Annotated[int | None, typer.Option(help="answer the first N prompts (all by default)", min=1)] = None,
    study: arg.StudyIfAny = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where a backbone answers")] = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Fetch a data set: one JSON Lines file per split, and data.json, which says where they came from.

    Commands that read the folder need no network. The embedded sets are small and original; they have the columns
    of the published ones, so that both go through the same code.

    Examples:

    \b
      # The published PIQA
      buddy data --name piqa --source hub --out results/main/data/piqa
    \b
      # The small set inside this package
      buddy data --name piqa --source embedded --out results/demo/data/piqa
    \b
      # Your own rows, in /mine/piqa.validation.jsonl and /mine/piqa.train.jsonl
      buddy data --name piqa --source /mine --out results/mine/data/piqa
    \b
      # Prompts alone, in /mine/alpaca.train.jsonl, answered by a backbone; killed, it goes on when run again
      buddy data --name alpaca --source /mine --answers-by results/demo/backbones/smollm2-135m --out answered
    \b
      # The same of one file of your own, a line {"prompt": "..."} each; with a "response" in each none is needed
      buddy data --name pairs --source prompts.jsonl --answers-by my-backbone --out answered
    \b
      # Prompts of several sets in one, spread evenly; prose gives passages and what follows them
      buddy data --name pairs --source embedded --of alpaca,gsm8k,samsum,wikitext2 --out pairs
    """
    from buddy.data import materialise

    sets = [part.strip() for part in of.split(",") if part.strip()]
    answerer = None
    config: dict[str, Any] = {"data": name, "source": source, **({"of": sets} if sets else {})}
    reads: list[str | Path] = []
    if answers_by is not None:
        backbone = backbone_folder(answers_by, option="--answers-by")
        reads = [backbone, source]
        answerer = _answerer(backbone, name, new_tokens, batch_size, examples, out, device, dtype)
        config |= {"answered_by": backbone.name, "new_tokens": new_tokens, "examples": examples}
    stage, path = ("data", name) if answers_by is None else ("answers", f"answered_by~{backbone.name}/{name}")
    with tracked_job(stage, study, path, "data", config, reads=reads, writes=[out]) as job:
        content = materialise(name, source, out, answerer, sets)
        job.summary({f"{split}_rows": facts["rows"] for split, facts in content["splits"].items()})
    sizes = ", ".join(f"{split} {facts['rows']} rows" for split, facts in content["splits"].items())
    typer.echo(f"{out}: {name} from {source}, {sizes}" + _told(content))


def _answerer(
    backbone: Path,
    name: str,
    new_tokens: int,
    batch_size: int,
    examples: int | None,
    out: Path,
    device: str,
    dtype: str,
) -> Answerer:
    """What answers rows: the backbone, loaded when there are rows to answer."""

    def answered(rows: list[Row]) -> tuple[list[Row], dict[str, Any]]:
        from buddy.evaluation.answers import answer
        from buddy.training import fingerprints

        model = runs.load(backbone, device=device, dtype=dtype)
        check_one_gpu(model.device.type)
        kept = out.absolute().parent / f".{out.name}.answers"
        rows, facts = answer(
            model, fingerprints.of_weights(model.backbone), name, rows[:examples], new_tokens, batch_size, kept
        )
        return rows, {"by": backbone.name, "backbone": _backbone(backbone), **facts}

    return answered


def _backbone(folder: Path) -> dict[str, Any] | None:
    """Where a backbone came from, as far as its folder says it."""
    from buddy import backbones

    if not (folder / backbones.PROVENANCE).exists():
        return None
    found = backbones.read(folder)
    return {key: found.get(key) for key in ("name", "source", "revision", "sha256")}


def _told(content: dict[str, Any]) -> str:
    """Who answered, and how many answers had not come to their end."""
    if "answers" not in content:
        return ""
    facts = content["answers"]
    return f", answered by {facts['by']} ({facts['cut']} cut off after {facts['new_tokens']} tokens)"
