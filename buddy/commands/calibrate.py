"""``buddy calibrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._measured import open_backbone
from buddy.commands._options import with_settings
from buddy.errors import UserError, choices
from buddy.methods import of_kind
from buddy.settings import Importance
from buddy.study.records import claim

if TYPE_CHECKING:
    from buddy.baselines.removal import Removal


@with_settings(Importance, leave_out=("corpus",))
def calibrate(
    backbone: arg.Backbone,
    corpus: arg.Corpus,
    method: Annotated[str, typer.Option(help=choices(of_kind("static")))],
    removed: Annotated[int, typer.Option(help="number of blocks to remove")],
    settings: Importance,
    criterion: Annotated[
        str, typer.Option(help="what ranks the blocks: ppl, taylor or ppl_unprotected for shortened_llama")
    ] = "",
    protect: Annotated[
        str,
        typer.Option(
            help="blocks never removed, from 0, negative from the end: 0,1,-1, or none; its authors' if empty"
        ),
    ] = "",
    seed: arg.WindowSeed = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    out: arg.RecordOut = None,
    study: arg.Study = "adhoc",
    name: arg.Name = "",
    batch_size: Annotated[int, typer.Option(help="windows per pass", min=1)] = 1,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Choose the blocks that a static peer removes: ShortGPT, Shortened LLaMA or SLEB. Blocks are counted from 0.

    \b
    Examples:
      buddy calibrate --backbone results/demo/backbones/smollm2-135m --method sleb --removed 8 \\
          --corpus results/demo/data/wikitext2 --samples 8 --length 256
      buddy calibrate --backbone DIR --method shortened_llama --criterion taylor --removed 8 --corpus book.txt \\
          --protect none --json --out taylor.json
    """
    from buddy import baselines as peers
    from buddy.data import inputs
    from buddy.importance import windows

    criterion, peer = peers.peer(method, criterion or None)
    protecting = _blocks(protect)
    if out:
        claim(out)
    text = inputs.prose(corpus)
    opened, tokenizer = open_backbone(backbone, method, study, name, device, dtype)
    candidates = peers.removable(peer, opened.blocks, removed, protecting)
    ids = windows(tokenizer, text, settings.samples, settings.length, seed)
    facts: dict[str, Any] = {
        "method": method,
        "criterion": criterion,
        "blocks": opened.blocks,
        "protected": [block for block in range(opened.blocks) if block not in candidates],
        "corpus": corpus.name,
        "samples": settings.samples,
        "length": settings.length,
        "window_seed": seed,
    }
    part = f"{criterion}/removed~{removed}"
    with opened.tracked("calibrate", facts, [out], part, [corpus]) as tracker:
        watch = opened.watch()
        found = peer.find(opened.model, ids.to(opened.model.device), removed, candidates, batch_size)
        facts |= {"removed": found.order, "score": peer.score, "scores": found.rounds, "ppl": found.ppl}
        if out:
            opened.write("calibration", out, removed, facts, settings.samples, watch)
        tracker.summary({"order": ",".join(map(str, found.order))})
    typer.echo(_as_json({"backbone": opened.info.backbone, **facts}) if json else _table(facts, found))


def _blocks(text: str) -> list[int] | None:
    """Blocks from ``0,1,-1``; [] from ``none``, None from nothing.

    Raises:
        UserError: something else.
    """
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
