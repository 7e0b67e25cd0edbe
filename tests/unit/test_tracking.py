"""W&B is a view: the real client writes what it should, and no failure of it reaches the job."""

from __future__ import annotations

import base64
import http.server
import itertools
import json
import os
import re
import socket
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
from wandb_files import history, no_settings, only, read_back, read_file
from wandb_server import KEY, WandbServer

from buddy import tracking
from buddy.errors import UserError
from buddy.pages import report
from buddy.reporting import study as reporting
from buddy.study import config, manifest
from buddy.study.settings import Tracking
from buddy.tracking import client, lineage, modes, sync
from buddy.tracking import job as jobs

ROOT = Path(__file__).resolve().parents[2]
JOB: dict[str, Any] = {
    "study": "demo",
    "run_path": "backbone~tiny/method~buddy/feature~value/seed~0",
    "group": "tiny × buddy",
    "config": {"learning_rate": 1e-4, "variant": {"feature": "value"}},
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting, key or warning of this machine or of another test."""
    no_settings(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(modes, "_warned", set())
    monkeypatch.setattr(jobs, "_unreachable", set())
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def id_of(study: Path, stage: str) -> str:
    """Id of a job's run, of a study in this folder."""
    return tracking.run_id(tracking.study_id(study), stage, JOB["run_path"])


def track(folder: Path, stage: str = "train", mode: str = "offline", **changed: Any) -> Any:
    settings = Tracking.model_validate({"mode": mode})
    return tracking.track(stage, **{**JOB, **changed}, folder=folder, settings=settings, tags=["smoke"])


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
    assert run.run_id == id_of(tmp_path, "train")
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
from buddy.study.settings import Tracking
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

    (messages,) = read_back(folder)  # the second attempt holds all of the first one
    assert only(messages, "run").run_id == id_of(tmp_path, "train")
    points = [(step, values["loss"]) for step, values in history(messages) if "loss" in values]
    assert points == [(step, float(step)) for step in range(8)]


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
    assert only(messages, "run").run_id == id_of(tmp_path, "train")


def test_every_job_has_a_run_of_its_own() -> None:
    jobs = itertools.product(("demo", "paper"), ("train", "evaluate"), ("seed~0", "seed~1"))
    assert len({tracking.run_id(*job) for job in jobs}) == 8


def test_disabled_writes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
from buddy import tracking
from buddy.study.settings import Tracking
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
    monkeypatch.setattr(client, "JOB", client.Waits(init=3.0, artifacts=2.0, finish=3.0))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    address, stop = serve(server)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    study = Study(tmp_path / "demo")
    started = time.monotonic()
    with track(tmp_path / "wandb", mode="auto", reads=[study.backbone], writes=[study.run]) as tracker:
        tracker.log({"loss": 1.0}, step=0)
    assert time.monotonic() - started < 20
    stop()
    wandb.teardown()

    (warning,) = warnings(caplog)
    if server == "hangs after the start":
        assert "artifact failed, this job goes on" in warning
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


class Study:
    """A study's folder with a backbone, a run and its records, and the jobs that would have made them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wandb = folder / "wandb"
        self.backbone = self._file("backbones/tiny/backbone.json", {"source": "random"}).parent
        (self.backbone / "model.safetensors").write_bytes(b"0" * 1000)
        self.run = self._file("runs/backbone~tiny/method~buddy/seed~0/run.json", {"method": "buddy"}).parent
        records = "records/accuracy/backbone~tiny/method~buddy/seed~0"
        self.records = self._file(f"{records}/removed~1.json", {"metrics": 1}).parent
        self._file(f"{records}/removed~2.json", {"metrics": 2})
        self.table = self._file("tables/table2.csv", {"cells": 1}).with_suffix("")

    def _file(self, path: str, content: Any) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        return file

    def jobs(self, mode: str) -> None:
        """Fetch, train, evaluate and tabulate, as far as W&B sees it."""
        for stage, reads, writes in (
            ("backbone", [], [self.backbone]),
            ("train", [self.backbone], [self.run]),
            ("evaluate", [self.run], [self.records]),
            ("table", [self.records], [self.table]),
        ):
            with track(self.wandb, stage, mode, reads=reads, writes=writes) as tracker:
                for step in range(3):
                    tracker.log({"loss": 2.0 - step}, step=step)
                tracker.summary({"final": stage})
                tracker.table("accuracy", pd.DataFrame({"removed": [1, 2], "average": [0.5, 0.25]}))
                if stage == "table":
                    tracker.image("figure", picture(self.folder))
        wandb.teardown()


def picture(folder: Path) -> Path:
    from PIL import Image

    file = folder / "picture.png"
    Image.new("RGB", (3, 2), "red").save(file)
    return file


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.address)
        yield running
    wandb.teardown()


def check_what_arrived(server: WandbServer, study: Path) -> None:
    """Four runs with their settings and points, and table <- records <- run <- backbone."""
    ids = {stage: id_of(study, stage) for stage in ("backbone", "train", "evaluate", "table")}
    assert set(server.runs) == set(ids.values())
    for stage, id in ids.items():
        run = server.runs[id]
        assert run.project == "buddy"
        assert (run.fields["groupName"], run.fields["jobType"]) == (JOB["group"], stage)
        assert set(run.fields["tags"]) == {"demo", "smoke"}
        assert run.config["learning_rate"] == 1e-4
        assert run.config["variant"] == {"feature": "value"}
        assert (run.config["study"], run.config["stage"], run.config["run"]) == ("demo", stage, JOB["run_path"])
        assert run.history("loss") == [(0, {"loss": 2}), (1, {"loss": 1}), (2, {"loss": 0})]
        assert run.summary["final"] == stage
        assert run.exit_code == 0
        (table,) = [content for name, content in run.files.items() if "media/table/accuracy" in name]
        assert json.loads(table) == {"columns": ["removed", "average"], "data": [[1, 0.5], [2, 0.25]]}
    assert any("media/images/figure" in name for name in server.runs[ids["table"]].files)

    chain = [server.artifact(f"demo-{kind}-") for kind in ("backbone", "run", "records", "table")]
    assert [one.type for one in chain] == ["backbone", "run", "records", "table"]
    stages = list(ids)
    for place, one in enumerate(chain):
        assert one.made_by[0] == ids[stages[place]]
        assert one.used_by == [ids[stage] for stage in stages[place + 1 : place + 2]]
    backbone, run, found, table = chain
    assert backbone.files == {"backbone.json": b'{"source": "random"}'}  # and no weights
    assert backbone.metadata["weights"] == {"model.safetensors": 1000}
    assert run.metadata["description"] == {"method": "buddy"}
    assert set(found.manifest) == set(found.files) == {"removed~1.json", "removed~2.json"}
    assert set(table.manifest) == {"table2.csv"}
    assert server.runs[ids["evaluate"]].config["reads"] == [run.name]


def check_no_key(server: WandbServer, folder: Path) -> None:
    assert any(KEY[:8] not in key and key.startswith("Basic ") for key in server.keys), "no request was signed"
    assert not any(KEY.encode() in body for body in server.bodies)
    assert not any(KEY in path for path in server.paths)
    sent = base64.b64encode(f"api:{KEY}".encode())
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert KEY.encode() not in content, f"{file} holds the key"
        assert sent not in content, f"{file} holds the key as it is sent"


@pytest.mark.parametrize("name", ["WANDB_DEBUG", "WANDB_CORE_DEBUG"])
def test_debugging_wandb_never_writes_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv(name, "true")
    with track(tmp_path / "wandb", mode="online") as tracker:
        tracker.log({"loss": 1.0}, step=0)
    wandb.teardown()
    assert server.runs
    check_no_key(server, tmp_path)
    assert warnings(caplog) == [
        f"W&B: {name} is not followed, since W&B would write your key into a log among the results"
    ]


def test_online_jobs_arrive_with_their_lineage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    study = Study(tmp_path / "demo")
    study.jobs("auto")
    assert warnings(caplog) == []
    check_what_arrived(server, study.folder)
    check_no_key(server, tmp_path)
    assert not list(study.wandb.glob("offline-run-*"))


def buddy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    command = [sys.executable, "-m", "buddy", *arguments]
    return subprocess.run(command, env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_sync_sends_what_was_kept_offline_once(tmp_path: Path, server: WandbServer) -> None:
    study = Study(tmp_path / "demo")
    study.jobs("auto")  # no key: offline
    assert server.runs == {}
    refused = buddy("wandb-sync", "--study", str(study.folder))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "WANDB_API_KEY" in refused.stderr
    assert server.runs == {}

    # Jobs of a study have WANDB_MODE=offline where it says so: the sync goes online all the same.
    first = buddy("wandb-sync", "--study", str(study.folder), WANDB_API_KEY=KEY, WANDB_MODE="disabled")
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == "4 sent, 0 sent before, 0 of jobs that are still running, 0 failed"
    check_what_arrived(server, study.folder)
    check_no_key(server, tmp_path)
    assert KEY not in first.stdout + first.stderr

    asked = len(server.operations)
    second = buddy("wandb-sync", "--study", str(study.folder), WANDB_API_KEY=KEY)
    assert second.stdout.strip() == "0 sent, 4 sent before, 0 of jobs that are still running, 0 failed"
    assert server.operations[asked:] == ["Viewer"]  # whose key it is, and nothing else


def test_a_run_that_goes_on_is_sent_on(tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "demo" / "wandb"
    with pytest.raises(RuntimeError):
        log_losses(folder, 3.0, 2.0, fail=True)
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert sync.send(folder).sent == 1
    monkeypatch.delenv("WANDB_API_KEY")
    log_losses(folder, 3.0, 2.0, 1.0, 0.5)  # the second attempt: two steps are new
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    outcome = sync.send(folder)
    assert (outcome.sent, outcome.already, outcome.failed) == (1, 0, {})
    (run,) = server.runs.values()
    assert [values["loss"] for _, values in run.history("loss")] == [3, 2, 1, 0.5]
    assert (sync.send(folder).sent, run.exit_code) == (0, 0)


def test_a_running_job_is_sent_when_it_has_ended(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo" / "wandb"
    with track(folder) as tracker:
        for step in range(3):
            tracker.log({"loss": 1.0}, step=step)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        outcome = sync.send(folder)
        assert (outcome.sent, outcome.running) == (0, 1)
        assert server.runs == {}
    wandb.teardown()
    assert sync.send(folder).sent == 1
    assert len(next(iter(server.runs.values())).history("loss")) == 3


def test_a_killed_job_is_sent_when_it_has_been_silent(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo" / "wandb"
    log_losses(folder, 1.0)
    wandb.teardown()
    progress = next(folder.glob("*.json"))
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "finished": False, "closed": False}))
    target = {"server": server.address, "entity": None, "project": None}
    (before,) = sync.kept(folder, target)
    for file in (before.file, progress, progress.with_suffix(".jsonl")):
        os.utime(file, (time.time() - 2 * sync.SILENT_S,) * 2)
    (after,) = sync.kept(folder, target)
    assert (before.state, after.state) == ("running", "unsent")


def test_makers_go_before_users() -> None:
    def attempt(run: str, reads: set[str], makes: set[str]) -> sync.Kept:
        return sync.Kept(run, "unsent", reads=frozenset(reads), makes=frozenset(makes))

    table = attempt("table", {"records", "old"}, {"table"})
    evaluate = attempt("evaluate", {"run"}, {"records"})
    train = attempt("train", {"backbone"}, {"run", "cost"})
    alone = attempt("alone", set(), set())
    assert sync.waves([table, evaluate, train, alone]) == [[train, alone], [evaluate], [table]]
    circle = [attempt("a", {"y"}, {"x"}), attempt("b", {"x"}, {"y"})]
    assert sync.waves(circle) == [circle]


def test_what_is_no_part_of_the_study_has_no_lineage(tmp_path: Path) -> None:
    outside = [tmp_path / "somewhere" / "records", tmp_path / "demo" / "logs" / "x.log"]
    assert lineage.things(outside, "demo") == []
    inside = tmp_path / "demo" / "records" / "training" / "backbone~a" / "seed~0.json"
    (thing,) = lineage.things([inside, inside], "demo")
    assert (thing.kind, thing.path) == ("records", "records/training/backbone~a/seed~0.json")
    other = lineage.thing(tmp_path / "demo" / "records" / "training" / "backbone~a-seed~0.json", "demo")
    assert other is not None
    assert thing.name != other.name
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", thing.name)


def test_records_that_a_job_made_together_are_one_thing(tmp_path: Path) -> None:
    """Figures read single files of what `buddy budget-eval` and `buddy evaluate --budget auto` have made as a folder."""
    made = tmp_path / "demo" / "records" / "budget" / "backbone~a" / "seed~0" / "preset~tuned"
    alone = tmp_path / "demo" / "records" / "training" / "backbone~a" / "seed~0.json"
    for file in (made / "dataset~alpaca.json", made / "dataset~all.json", alone):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    manifest.write(made)
    (maker,) = lineage.things([made], "demo")
    assert lineage.things([made / "dataset~all.json", made / "dataset~alpaca.json"], "demo") == [maker]
    assert set(maker.files()) == {"dataset~all.json", "dataset~alpaca.json"}
    (single,) = lineage.things([alone], "demo")
    assert single.path == "records/training/backbone~a/seed~0.json"


def test_a_key_has_one_type_in_every_job() -> None:
    train = jobs.typed({"data": "alpaca", "kv": "zero", "training": {"data": "alpaca"}})
    score = jobs.typed(
        {"data": ["alpaca", "piqa"], "kv": ["zero", "mask"], "decode": ("recompute",), "removed_at": [4]}
    )
    assert train == {"data": ["alpaca"], "kv": "zero", "training": {"data": ["alpaca"]}}
    assert score == {"data": ["alpaca", "piqa"], "kv": "zero,mask", "decode": "recompute", "removed_at": [4]}


def test_pictures_are_in_the_history(tmp_path: Path) -> None:
    with track(tmp_path / "wandb") as tracker:
        tracker.image("figure4", picture(tmp_path))
    (messages,) = read_back(tmp_path / "wandb")
    ((_, point),) = history(messages)
    assert point["figure4._type"] == "image-file"


@pytest.fixture
def plan() -> config.Config:
    return config.read(ROOT / "config.yaml", ROOT / "tests" / "tiny.yaml")


def test_a_report_is_renewed_at_its_address(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, plan: config.Config
) -> None:
    folder = tmp_path / "tiny"
    (folder / "tables").mkdir(parents=True)
    (folder / "tables" / "table2.md").write_text("| a | b |")
    (folder / "study.json").write_text(plan.model_dump_json())
    refused = buddy("wandb-report", "--study", str(folder))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "WANDB_API_KEY" in refused.stderr
    empty = buddy("wandb-report", "--study", str(folder), WANDB_API_KEY=KEY)
    assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)
    assert "buddy wandb-sync" in empty.stderr

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    log_losses(folder / "wandb", 1.0, mode="online", study="tiny")
    wandb.teardown()
    made = buddy("wandb-report", "--study", str(folder), WANDB_API_KEY=KEY)
    assert made.returncode == 0, made.stderr
    again = buddy("wandb-report", "--study", str(folder), WANDB_API_KEY=KEY)
    assert made.stdout == again.stdout
    assert made.stdout.startswith(f"{server.address}/somebody/buddy/reports/")
    (page,) = server.reports.values()
    assert "| a | b |" in page["spec"]


def reported(plan: config.Config, folder: Path) -> reporting.Study:
    (folder / "study.json").write_text(plan.model_dump_json())
    return reporting.load(folder)


def test_a_report_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: config.Config) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=r"wandb_workspaces is not installed; .*pip install 'buddy-routing\[track\]'"):
        report.save(reported(plan, tmp_path), None, "buddy")


@pytest.fixture(autouse=True, scope="module")
def no_leftover_service() -> Iterator[None]:
    """End W&B's service process with this file's tests."""
    yield
    wandb.teardown()
