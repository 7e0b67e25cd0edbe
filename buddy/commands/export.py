"""``buddy export``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from buddy import hub, runs
from buddy.commands import _arguments as arg
from buddy.commands._run import measured_of
from buddy.errors import UserError, unknown
from buddy.storage import folders


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
        str,
        typer.Option(help="licence of the backbone, as the Hub spells it; by default what the backbone's card names"),
    ] = "",
    gguf: Annotated[
        Path | None, typer.Option(help="the same model as one GGUF file, for llama.cpp; in --out, it is pushed too")
    ] = None,
    type: Annotated[str, typer.Option(help="of --gguf: f16, or q8_0 (matrices in 8 bits, half the size)")] = "f16",
    push: Annotated[
        str,
        typer.Option(help="send the folder to this model repository on the Hugging Face Hub, owner/name; asks first"),
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="of --push: a repository made now is private")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="of --push: do not ask")] = False,
    backbone: Annotated[Path | None, typer.Option(help="backbone folder, where it has moved")] = None,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Write a run at one depth as a plain Hugging Face folder: blocks taken out, LoRA merged, no code of this package.

    Static peers are exported exactly. BUDDY, PuDDing and FiRST choose blocks by the input: the route that they take most
    often over the prompts of --data is exported, and the model card says how often that is.

    --gguf writes it once more as a file that llama.cpp loads. --push shows what would be sent, how large it is and under
    which licence, and asks; a token that may write must be in HF_TOKEN.

    \b
    Examples:
      buddy export --run results/demo/runs/.../removed~8/lora~trained/seed~0 --removed 8 --out sleb-8
      buddy export --run results/demo/runs/.../seed~0 --removed 8 --data results/demo/data/alpaca --out buddy-8 \\
          --license apache-2.0
      buddy export --run results/demo/runs/.../seed~0 --removed 8 --data results/demo/data/alpaca --out buddy-8 \\
          --gguf buddy-8/buddy-8-q8_0.gguf --type q8_0 --push me/buddy-8
    """
    from buddy import export as exporting
    from buddy.backbones import gguf_model, licence
    from buddy.evaluation import traces
    from buddy.reporting import cards

    folders.claim(out, exporting.HOLDS)
    if gguf is not None:
        gguf_model.claim(gguf)
        if type not in gguf_model.TYPES:
            raise unknown("--type", type, gguf_model.TYPES)
    if push:
        _may_push(push, yes)
    texts = traces.prompts(data)[:prompts] if data else None
    model = runs.load(run, backbone=backbone, device=device, dtype=dtype)
    if removed >= model.blocks:
        raise UserError(f"--removed: {removed} of {model.blocks} blocks leaves none")
    if gguf is not None:
        gguf_model.check(model.config, model.tokenizer)
    found = exporting.chosen(model, removed, texts)
    name, license = name or out.resolve().name, license or licence.of(model.origin.backbone)
    info = model.origin.info
    made, measured = cards.made(asdict(info)), cards.at_depth(measured_of(run, info), removed)
    text = exporting.card(name, model, found, license, [made, measured])
    file = exporting.Gguf(gguf, type, exporting.facts(name, model, found, license, made)) if gguf is not None else None
    exporting.save(model, found.kept, out, text, file)
    typer.echo(
        f"{out}: {len(found.kept)} of {model.blocks} blocks, without {', '.join(map(str, found.removed)) or 'none'}"
    )
    if found.seen:
        typer.echo(
            f"its route covers {100 * found.steps:.1f} % of the steps after {found.seen} prompts, {found.paths} distinct routes"
        )
    if gguf is not None:
        typer.echo(f"{gguf}: {type}, {gguf.stat().st_size / 1e6:,.1f} MB")
    if push:
        _push(out, push, license, private, yes)


def _may_push(repository: str, yes: bool) -> None:
    """Refuse, before any work, what could not be sent after it."""
    hub.check_name(repository, "--push")
    if not (yes or _somebody()):
        raise UserError("--push: asks before it sends, and there is nobody to ask; give --yes as well")
    hub.user()


def _somebody() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty()


def _push(out: Path, repository: str, license: str, private: bool, yes: bool) -> None:
    """Show what is to be sent, ask, and send it."""
    files = sorted(file for file in out.iterdir() if file.is_file() and file.name != folders.MARK)
    sizes = [file.stat().st_size / 1e6 for file in files]
    seen = "private where it is made now" if private else "public where it is made now"
    typer.echo(f"to {repository} on the Hub, as {hub.user()} ({seen}; files of these names there are replaced):")
    for file, size in zip(files, sizes, strict=True):
        typer.echo(f"  {file.name:<40} {size:>12,.3f} MB")
    typer.echo(f"  {len(files)} files, {sum(sizes):,.1f} MB; licence: {license or 'not known (--license)'}")
    if not yes and not typer.confirm("Send it?"):
        typer.echo(f"nothing was sent; {out} stays")
        return
    where = hub.upload(
        out, repository, [file.name for file in files], f"{out.resolve().name}, by buddy export", private
    )
    typer.echo(f"sent: {where}")
