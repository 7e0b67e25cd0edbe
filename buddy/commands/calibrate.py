"""``buddy calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import Importance

if TYPE_CHECKING:
    from buddy.baselines.removal import Removal


@with_settings(Importance, leave_out=("corpus",))
def calibrate(
    backbone: Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")],
    corpus: Annotated[Path, typer.Option(help="prose: a data set folder from `buddy data`, or a text file")],
    method: Annotated[str, typer.Option(help="shortgpt, shortened_llama or sleb")],
    removed: Annotated[int, typer.Option(help="number of blocks to remove")],
    settings: Importance,
    criterion: Annotated[str, typer.Option(help="what ranks the blocks: ppl or taylor for shortened_llama")] = "",
    protect: Annotated[
        str,
        typer.Option(
            help="blocks never removed, from 0, negative from the end: 0,1,-1, or none; its authors' if empty"
        ),
    ] = "",
    seed: Annotated[
        int | None,
        typer.Option(help="draw the windows at random with this seed; the first ones without", min=0, max=2**32 - 1),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    out: Annotated[Path | None, typer.Option(help="record to write (JSON)")] = None,
    study: Annotated[str, typer.Option(help="study it belongs to")] = "adhoc",
    name: Annotated[str, typer.Option(help="the backbone's name in the study; its folder's name by default")] = "",
    batch_size: Annotated[int, typer.Option(help="windows per pass", min=1)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Choose the blocks that a static peer removes: ShortGPT, Shortened LLaMA or SLEB. Blocks are counted from 0.

    \b
    Examples:
      buddy calibrate --backbone results/demo/backbones/smollm2-135m --method sleb --removed 8 \\
          --corpus results/demo/data/wikitext2 --samples 8 --length 256
      buddy calibrate --backbone DIR --method shortened_llama --criterion taylor --removed 8 --corpus book.txt \\
          --protect none --json --out taylor.json
    """
    from contextlib import nullcontext

    from buddy import baselines as peers
    from buddy.backbones.fingerprint import of_backbone
    from buddy.commands._common import backbone_folder, check_one_gpu, provenance, tracked
    from buddy.data import inputs
    from buddy.importance import windows
    from buddy.runs import load_backbone
    from buddy.study.config import Run
    from buddy.study.records import Budget, Record, Stopwatch, claim

    criterion, peer = peers.peer(method, criterion or None)
    protecting = _blocks(protect)
    if out:
        claim(out)
    text = inputs.prose(corpus)
    backbone = backbone_folder(backbone)
    model, tokenizer = load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    blocks = model.config.num_hidden_layers
    candidates = peers.removable(peer, blocks, removed, protecting)
    ids = windows(tokenizer, text, settings.samples, settings.length, seed)
    run = Run(name or backbone.name, method, (), 0)
    facts: dict[str, Any] = {
        "method": method,
        "criterion": criterion,
        "blocks": blocks,
        "protected": [block for block in range(blocks) if block not in candidates],
        "corpus": corpus.name,
        "samples": settings.samples,
        "length": settings.length,
        "window_seed": seed,
    }
    part = f"{criterion}/removed~{removed}"
    with tracked("calibrate", study, run, facts, part, [backbone, corpus], [out]) if out else nullcontext() as tracker:
        watch = Stopwatch(str(model.device))
        found = peer.find(model, ids.to(model.device), removed, candidates, batch_size)
        facts |= {"removed": found.order, "score": peer.score, "scores": found.rounds, "ppl": found.ppl}
        if out and tracker:
            Record(
                kind="calibration",
                study=study,
                backbone=run.backbone,
                method=method,
                metrics=facts,
                n=settings.samples,
                budget=Budget.of(blocks - removed, blocks),
                digests={"backbone": of_backbone(backbone)},
                **provenance(model, watch),
            ).write(out)
            tracker.summary({"removed": ",".join(map(str, found.order))})
    typer.echo(_as_json({"backbone": run.backbone, **facts}) if json else _table(facts, found))


def _blocks(text: str) -> list[int] | None:
    """Blocks from ``0,1,-1``; [] from ``none``, None from nothing.

    Raises:
        UserError: something else.
    """
    from buddy.errors import UserError

    if not text:
        return None
    if text == "none":
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--protect: {text!r} is neither a list of blocks such as 0,1,-1 nor none") from None


def _as_json(facts: dict[str, Any]) -> str:
    import json

    return json.dumps(facts, indent=1)


def _table(facts: dict[str, Any], found: Removal) -> str:
    """What was removed, for people: a line per block, or per round where each removal was measured anew."""
    lines = [f"{facts['method']} ({facts['score']}), {len(found.order)} of {facts['blocks']} blocks, counted from 0"]
    if found.ppl is not None:
        lines.append(f"perplexity of the full model: {found.ppl:.4f}")
    if len(found.rounds) == 1:
        lines += ["place  block  score"]
        place = {block: index + 1 for index, block in enumerate(found.order)}
        scores = found.rounds[0]
        for block in [*found.order, *sorted(scores.keys() - place.keys(), key=scores.__getitem__)]:
            mark = place.get(block, "kept" if block in facts["protected"] else "")
            lines.append(f"{mark:>5}  {block:>5}  {scores[block]:.6g}")
    else:
        lines += ["round  block  score       next best"]
        for index, (block, scores) in enumerate(zip(found.order, found.rounds, strict=True), start=1):
            others = sorted((score, other) for other, score in scores.items() if other != block)
            best = f"{others[0][1]} ({others[0][0]:.6g})" if others else ""
            lines.append(f"{index:>5}  {block:>5}  {scores[block]:<10.6g}  {best}".rstrip())
    return "\n".join([*lines, "removed: " + ",".join(map(str, found.order))])
