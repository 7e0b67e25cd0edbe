"""``buddy runs``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from buddy.errors import UserError
from buddy.runs import RunInfo
from buddy.runs import found as folders_of


def runs(
    results: Annotated[Path, typer.Option(help="folder searched for runs")] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON: path and all settings of each run")] = False,
) -> None:
    """List the trained runs with their settings and paths.

    \b
    Examples:
      buddy runs
      buddy runs --results results/demo --json
    """

    if not results.is_dir():
        raise UserError(f"--results: {results} is not a folder")
    found, damaged = [], []
    for path in folders_of(results):
        try:
            found.append((path, RunInfo.read(path)))
        except UserError as error:  # one that cannot be read hides no other
            damaged.append(str(error))
    if as_json:
        print(json.dumps([{"path": str(path), **asdict(info)} for path, info in found], indent=1))
        return
    if not found:
        print(f"no runs below {results}; `make demo` trains some, and so does `buddy train`")
    for path, info in found:
        axes = "  ".join(f"{axis}={value}" for axis, value in info.variant.items())
        parts = [info.study, info.backbone, info.method, axes, f"seed={info.seed}", paths(info.probes)]
        print("  ".join(filter(None, parts)) + f"\n    {path}")
    for reason in damaged:
        print(f"not listed: {reason}")


def paths(probes: dict[str, int]) -> str:
    """What is told of a router's paths; "" where there is no router, or a run from before they were looked at."""
    if not probes:
        return ""
    number, over = probes["paths"], f"over {probes['prompts']} probe prompts"
    return f"one path {over}" if number == 1 else f"{number} paths {over}"
