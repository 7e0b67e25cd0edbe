"""W&B is a view: the real client writes what it should, and no failure of it reaches the job."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb

from buddy import tracking
from buddy.settings import Tracking

KEY = "0123456789abcdef" * 2 + "01234567"
JOB: dict[str, Any] = {
    "study": "demo",
    "run_path": "backbone~tiny/method~buddy/feature~value/seed~0",
    "group": "tiny × buddy",
    "config": {"learning_rate": 1e-4, "variant": {"feature": "value"}},
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting, key or warning of this machine or of another test."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(tracking, "_warned", set())


def track(folder: Path, stage: str = "train", mode: str = "offline", **changed: Any) -> Any:
    settings = Tracking.model_validate({"mode": mode})
    return tracking.track(stage, **{**JOB, **changed}, folder=folder, settings=settings, tags=["smoke"])


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


def history(messages: list[Any]) -> list[tuple[int, dict[str, Any]]]:
    points = []
    for message in messages:
        if message.WhichOneof("record_type") == "history":
            values = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in message.history.item
            }
            points.append((values.pop("_step"), {k: v for k, v in values.items() if not k.startswith("_")}))
    return points


def only(messages: list[Any], kind: str) -> Any:
    return next(getattr(message, kind) for message in messages if message.WhichOneof("record_type") == kind)


def test_a_run_holds_what_was_logged(tmp_path: Path) -> None:
    started = time.monotonic()
    with track(tmp_path / "wandb") as tracker:
        for step in (0, 10, 20):
            tracker.log({"loss": 2.0 - step / 100, "tok_s": 5.0}, step=step)
        tracker.summary({"final_loss": 1.8})
        tracker.table("accuracy", pd.DataFrame({"removed": [1, 2], "average": [0.5, 0.4]}))
    assert time.monotonic() - started < 20

    (messages,) = read_back(tmp_path / "wandb")
    run = only(messages, "run")
    assert (run.project, run.run_group, run.job_type) == ("buddy", JOB["group"], "train")
    assert run.run_id == tracking.run_id("demo", "train", JOB["run_path"])
    assert set(run.tags) == {"demo", "smoke"}
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["variant"] == {"feature": "value"}
    assert {"learning_rate", "study", "stage", "run", "commit"} <= set(config)
    points = history(messages)
    assert [(step, values["loss"]) for step, values in points if "loss" in values] == [(0, 2.0), (10, 1.9), (20, 1.8)]
    summary = {
        ".".join(item.nested_key) or item.key: item.value_json
        for message in messages
        if message.WhichOneof("record_type") == "summary"
        for item in message.summary.update
    }
    assert json.loads(summary["final_loss"]) == 1.8
    assert any(name.startswith("accuracy") for name in summary)
    assert only(messages, "exit").exit_code == 0


def test_an_exception_passes_and_marks_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), track(tmp_path / "wandb"):
        raise ZeroDivisionError
    (messages,) = read_back(tmp_path / "wandb")
    assert only(messages, "exit").exit_code == 1


KILLED = """
import json, pathlib, sys, time
from buddy import tracking
from buddy.settings import Tracking
job, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
with tracking.track("train", **job, folder=folder, settings=Tracking(mode="offline")) as tracker:
    for step in range(5):
        tracker.log({"loss": float(step)}, step=step)
    time.sleep(60)
"""


def test_a_killed_job_continues_its_run_and_doubles_no_step(tmp_path: Path) -> None:
    folder = tmp_path / "wandb"
    process = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(JOB), str(folder)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        files = list(folder.glob("offline-run-*/*.wandb"))
        if files and len(history(read_file(files[0]))) == 4:  # the fifth is held until a sixth begins
            break
        time.sleep(0.2)
    process.kill()
    process.wait()
    with track(folder) as tracker:  # goes on from a checkpoint at step 3
        for step in range(3, 8):
            tracker.log({"loss": float(step)}, step=step)

    attempts = read_back(folder)
    assert len(attempts) == 2
    assert len({only(messages, "run").run_id for messages in attempts}) == 1
    steps = [step for messages in attempts for step, values in history(messages) if "loss" in values]
    assert steps == list(range(8))


def log_losses(folder: Path, *losses: float, fail: bool = False, **changed: Any) -> None:
    with track(folder, **changed) as tracker:
        for step, loss in enumerate(losses):
            tracker.log({"loss": loss}, step=step)
        if fail:
            raise RuntimeError("killed")


@pytest.mark.parametrize("what", ["finished", "another setting"])
def test_a_job_made_anew_replaces_its_run(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "wandb"
    if what == "finished":
        log_losses(folder, 3.0, 2.0)
        wandb.teardown()
        log_losses(folder, 1.0, 0.5)
    else:
        with pytest.raises(RuntimeError):
            log_losses(folder, 3.0, 2.0, fail=True)
        wandb.teardown()
        log_losses(folder, 1.0, 0.5, config={"learning_rate": 2e-4})
    (messages,) = read_back(folder)
    assert [values["loss"] for _, values in history(messages)] == [1.0, 0.5]
    assert only(messages, "run").run_id == tracking.run_id("demo", "train", JOB["run_path"])


def test_every_job_has_a_run_of_its_own() -> None:
    jobs = itertools.product(("demo", "paper"), ("train", "evaluate"), ("seed~0", "seed~1"))
    assert len({tracking.run_id(*job) for job in jobs}) == 8


def test_disabled_writes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
from buddy import tracking
from buddy.settings import Tracking
with tracking.track("train", **{JOB!r}, folder=pathlib.Path({str(tmp_path / "wandb")!r}), settings=Tracking(mode="online")) as tracker:
    tracker.log({{"loss": 1.0}}, step=0)
    tracker.summary({{"loss": 1.0}})
    tracker.table("t", None)
print([name for name in ("wandb", "torch", "pandas") if name in sys.modules])
"""
    environment = {**os.environ, "WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    ("variable", "setting", "key", "mode"),
    [
        (None, "auto", None, "offline"),
        (None, "auto", "variable", "online"),
        (None, "auto", "netrc", "online"),
        (None, "offline", "variable", "offline"),
        (None, "disabled", "variable", "disabled"),
        ("online", "disabled", "netrc", "online"),
        ("online", "auto", None, "offline"),
        ("disabled", "online", "variable", "disabled"),
        ("dryrun", "online", "variable", "offline"),
        ("nonsense", "online", "variable", "offline"),
    ],
)
def test_the_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None, setting: str, key: str | None, mode: str
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    if key == "variable":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    if key == "netrc":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert tracking.choose_mode(Tracking.model_validate({"mode": setting})) == mode


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with track(tmp_path / "file" / "wandb") as tracker:
        tracker.log({"loss": 1.0}, step=0)
        tracker.summary({"loss": 1.0})
    (warning,) = warnings(caplog)
    assert "this job goes on without W&B" in warning


def test_a_client_that_breaks_in_the_middle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with track(tmp_path / "wandb") as tracker:
        for step in range(3):
            tracker.log({"loss": object()}, step=step)  # type: ignore[dict-item]
        tracker.table("not a frame", object())  # type: ignore[arg-type]
        tracker.summary({"final": 1})
    assert len(warnings(caplog)) == 1
    (messages,) = read_back(tmp_path / "wandb")
    assert only(messages, "exit").exit_code == 0


@pytest.mark.parametrize("server", ["refuses", "never answers", "hangs after the start"])
def test_a_server_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, server: str
) -> None:
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 3.0)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    address, stop = serve(server)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    started = time.monotonic()
    with track(tmp_path / "wandb", mode="auto") as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert time.monotonic() - started < 20
    stop()
    wandb.teardown()

    (warning,) = warnings(caplog)
    if server == "hangs after the start":
        assert "finish failed, this job goes on" in warning
        kept = list((tmp_path / "wandb").glob("run-*/*.wandb"))
    else:
        assert "kept offline" in warning
        kept = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [(step, values["loss"]) for step, values in history(read_file(kept[0]))] == [(0, 1.0)]
    for file in (tmp_path / "wandb").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), f"{file} holds the key"
    assert KEY not in caplog.text


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == "buddy.tracking"]


def serve(kind: str) -> tuple[str, Any]:
    """A W&B server that fails in the given way: its address, and a function that ends it."""
    if kind == "refuses":
        return "http://127.0.0.1:9", lambda: None
    if kind == "never answers":
        listener = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}", listener.close
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers.get("content-length") or 0)).decode(errors="replace")
            operation = re.search(r'"operationName":\s*"(\w+)"', asked)
            answer = ANSWERS.get(operation[1] if operation else "")
            if answer is None:
                done.wait(60)
            body = json.dumps({"data": answer}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=running.serve_forever, daemon=True).start()

    def stop() -> None:
        done.set()
        running.shutdown()
        running.server_close()

    return f"http://127.0.0.1:{running.server_port}", stop


BUCKET = {"id": "1", "name": "x", "project": {"id": "1", "name": "buddy", "entity": {"id": "1", "name": "me"}}}
ANSWERS = {"RunResumeStatus": {"model": None}, "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}}}


@pytest.fixture(autouse=True, scope="module")
def no_leftover_service() -> Iterator[None]:
    """End W&B's service process with this file's tests."""
    yield
    wandb.teardown()
