"""The real W&B client without this machine's settings, and what it has written down: its files, read without it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb


def no_settings(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """No setting, key or proxy of this machine: only what a test says itself."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)


def read_back(folder: Path) -> list[list[Any]]:
    """The messages of every offline run below ``folder``, oldest run first, straight from W&B's files."""
    wandb.teardown()  # as at the end of a process: its service writes what it still holds
    return [read_file(file) for file in sorted(folder.glob("offline-run-*/*.wandb"), key=os.path.getmtime)]


def read_file(file: Path) -> list[Any]:
    """Messages of a .wandb file: after 7 bytes, a LevelDB log of protobuf records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, found, partial = file.read_bytes(), 7, [], b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        partial += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(partial)
            found.append(message)
            partial = b""
    return found


def values(items: Iterable[Any]) -> dict[str, Any]:
    """What a message's items say, by dotted name."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(messages: list[Any]) -> list[tuple[int, dict[str, Any]]]:
    """Points of curves: step and values, without W&B's own."""
    points = []
    for message in messages:
        if message.WhichOneof("record_type") == "history":
            point = values(message.history.item)
            points.append((point.pop("_step"), {k: v for k, v in point.items() if not k.startswith("_")}))
    return points


def only(messages: list[Any], kind: str) -> Any:
    """The first message of a kind."""
    return next(getattr(message, kind) for message in messages if message.WhichOneof("record_type") == kind)


@dataclass
class Logged:
    """A run as its file has it."""

    id: str
    stage: str
    tags: list[str]
    config: dict[str, Any]
    points: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def runs(folder: Path) -> list[Logged]:
    """Every offline run below a folder."""
    found = []
    for messages in read_back(folder):
        run = only(messages, "run")
        logged = Logged(run.run_id, run.job_type, list(run.tags), values(run.config.update))
        logged.points = [point for _, point in history(messages)]
        for message in messages:
            if message.WhichOneof("record_type") == "summary":
                logged.summary |= values(message.summary.update)
        found.append(logged)
    return found
