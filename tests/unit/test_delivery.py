"""Nothing is lost on the way to a W&B server that fails, and two people's studies are two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import buddy
from records_factory import Maker, demo
from wandb_files import no_settings
from wandb_server import KEY, Fault, WandbServer

from buddy import tracking
from buddy.tracking import modes, sync

ROOT = Path(__file__).resolve().parents[2]
PATH = "backbone~tiny/method~buddy/seed~0"
JOB = """
import logging, sys, time
from pathlib import Path
import pandas as pd
from buddy import tracking
from buddy.study.settings import Tracking
from buddy.tracking import client
if sys.argv[5] != "as they are":
    client.JOB = client.Waits(*map(float, sys.argv[5].split()))
logging.basicConfig(level="WARNING", format="%(message)s")
study, first, last, pause = Path(sys.argv[1]), *map(float, sys.argv[2:5])
told = dict(study=study.name, run_path="backbone~tiny/method~buddy/seed~0", group="g", config={"rate": 0.1})
places = dict(reads=[study / "backbones" / "tiny"], writes=[study / "runs" / "x"])
begun = time.monotonic()
with tracking.track("train", **told, **places, folder=study / "wandb", settings=Tracking(mode="auto")) as tracker:
    waited = time.monotonic() - begun
    for step in range(int(first), int(last)):
        tracker.log({"loss": 100.0 - step}, step=step)
        print(step, flush=True)
        time.sleep(pause)
    tracker.summary({"final": last})
    tracker.table("rows", pd.DataFrame({"removed": [4, 8], "average": [60.5, 54.25]}))
    begun = time.monotonic()
print("waited", waited + time.monotonic() - begun)
"""

SHORT = "8 2 3"
"""A job's waits for opening a run, its artifacts and its end, where only what comes after them matters."""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_settings(monkeypatch, tmp_path / "home")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name, value in modes.PATIENCE.items():
        shorter = "1" if "_RETRY_" in name else value
        monkeypatch.setitem(modes.PATIENCE, name, shorter)
        monkeypatch.setenv(name, shorter)  # as commands do, which outlives them in this process
    monkeypatch.setattr(modes, "ASK_TIMEOUT_S", 2.0)
    monkeypatch.setattr(modes, "ASK_WAIT_S", 0.01)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.address)
        yield running


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return study_at(tmp_path / "results" / "demo")


def study_at(folder: Path) -> Path:
    for file in ("backbones/tiny/backbone.json", "runs/x/run.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps({"of": file}))
    return folder


def command(study: Path, first: int = 0, last: int = 20, pause: float = 0.0, waits: str = SHORT) -> list[str]:
    return [sys.executable, "-c", JOB, str(study), str(first), str(last), str(pause), waits]


def job(study: Path, first: int = 0, last: int = 20, waits: str = SHORT) -> subprocess.CompletedProcess[str]:
    """A job that logs these steps."""
    done = subprocess.run(
        command(study, first, last, waits=waits), capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done


def killed_after(study: Path, step: int, pause: float, when: Callable[[], bool] = lambda: True) -> None:
    """A job that is killed with all its processes once it has logged a step and something holds."""
    process = subprocess.Popen(
        command(study, 0, 1000, pause), stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    for line in process.stdout or ():
        if int(line) >= step and when():
            break
    os.killpg(process.pid, 9)
    process.wait()


def lines_of(study: Path) -> int:
    """Points that a job has logged, wherever they are."""
    (journal,) = (study / "wandb").glob("*.jsonl")
    return len(journal.read_text().splitlines())


def curve(server: WandbServer) -> list[tuple[int, float]]:
    (run,) = server.runs.values()
    return [(step, values["loss"]) for step, values in run.history("loss")]


def steps(last: int) -> list[tuple[int, float]]:
    return [(step, 100.0 - step) for step in range(last)]


def check_whole(server: WandbServer, last: int = 20) -> None:
    """One run with all its points, once and in order, its summary, table and artifacts."""
    assert curve(server) == steps(last)
    (run,) = server.runs.values()
    assert (run.summary["final"], run.exit_code) == (last, 0)
    assert any("media/table/rows" in name for name in run.files)
    backbone, made = (server.artifact(f"demo-{kind}-") for kind in ("backbone", "run"))
    assert set(made.made_by) == set(backbone.used_by) == {run.name}
    assert made.files.keys() == {"run.json"}


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def test_a_killed_online_job_loses_no_point(server: WandbServer, study: Path) -> None:
    """Its client has sent a part of them; the attempt after it begins at a checkpoint."""
    killed_after(study, 60, 0.05, when=lambda: bool(server.runs) and len(curve(server)) > 0)
    time.sleep(0.5)
    logged = lines_of(study)
    assert 0 < len(curve(server)) < logged  # a part was on its way
    assert job(study, first=logged - 5, last=logged + 20).stderr == ""
    check_whole(server, logged + 20)


def test_a_connection_lost_in_the_middle_is_healed_by_sync(server: WandbServer, study: Path) -> None:
    killed_after(study, 30, 0.05, when=lambda: bool(server.runs) and len(curve(server)) > 0)
    server.fault = lambda what: "cut"
    logged = lines_of(study)
    said = only_line(job(study, first=logged - 5, last=logged + 20).stderr)
    assert "kept offline" in said
    assert len(curve(server)) < logged + 20
    server.fault = lambda what: None
    outcome = sync.send(study / "wandb")
    assert (outcome.sent, outcome.already, outcome.failed) == (1, 0, {})
    check_whole(server, logged + 20)
    asked = len(server.operations)
    assert (sync.send(study / "wandb").already, len(server.operations)) == (1, asked)


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        *(("file_stream", fault) for fault in (401, 429, 500, "hang", "cut")),
        *(("CreateArtifact", fault) for fault in (500, "hang")),
        ("upload", 401),
    ],
)
def test_a_server_that_fails_in_mid_job(server: WandbServer, study: Path, what: str, fault: Fault) -> None:
    server.fault = lambda asked: fault if asked == what else None
    done = job(study, waits="as they are" if (what, fault) == ("file_stream", "hang") else SHORT)
    said = only_line(done.stderr)
    assert f"`buddy wandb-sync --study {study}` sends what is missing" in said
    assert float(done.stdout.split()[-1]) < 30
    server.fault = lambda asked: None
    outcome = sync.send(study / "wandb")
    assert (outcome.sent, outcome.failed) == (1, {})
    check_whole(server)


@pytest.mark.parametrize("fault", [500, "hang", 401])
def test_a_server_that_fails_from_the_start(server: WandbServer, study: Path, fault: Fault) -> None:
    server.fault = lambda asked: fault
    done = job(study, waits="as they are")
    assert "kept offline" in only_line(done.stderr)
    assert float(done.stdout.split()[-1]) < 30
    server.fault = lambda asked: None
    outcome = sync.send(study / "wandb")
    assert (outcome.sent, outcome.failed) == (1, {})
    check_whole(server)


def test_a_run_that_was_deleted_on_the_server_goes_on_under_another_id(server: WandbServer, study: Path) -> None:
    gone = tracking.run_id(tracking.study_id(study), "train", PATH)
    server.deleted.add(gone)
    said = only_line(job(study).stderr)
    assert "was deleted on the server" in said
    assert set(server.runs) == {sync.next_id(gone)}
    check_whole(server)
    assert job(study, last=5).stderr == ""  # made anew: its other id is known
    assert gone not in server.runs


def test_a_deleted_run_that_was_kept_offline_is_sent_under_another_id(
    server: WandbServer, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    job(study)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.deleted.add(tracking.run_id(tracking.study_id(study), "train", PATH))
    assert buddy("wandb-sync", "--study", study).out.startswith("1 sent, 0 sent before")
    check_whole(server)
    assert buddy("wandb-sync", "--study", study).out.startswith("0 sent, 1 sent before")


@pytest.mark.parametrize("what", ["file_stream", "CreateArtifact", "CommitArtifact", "upload"])
def test_what_a_sync_could_not_send_the_next_one_does(
    server: WandbServer, study: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    job(study)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.fault = lambda asked: 500 if asked == what else None
    assert "1 runs were not sent" in buddy("wandb-sync", "--study", study).mistake
    server.fault = lambda asked: None
    assert buddy("wandb-sync", "--study", study).out.startswith("1 sent, 0 sent before")
    check_whole(server)


def test_two_people_s_studies_of_one_name_are_two(server: WandbServer, tmp_path: Path) -> None:
    mine, theirs = (study_at(tmp_path / who / "results" / "demo") for who in ("me", "them"))
    job(mine)
    job(theirs, last=10)
    assert len(server.runs) == 2
    told: dict[str, Any] = {run.config["study_id"]: len(run.history("loss")) for run in server.runs.values()}
    assert told == {tracking.study_id(mine): 20, tracking.study_id(theirs): 10}
    job(mine, last=20)
    assert len(server.runs) == 2


def test_jobs_that_begin_together_agree_on_the_study(tmp_path: Path) -> None:
    code = "import sys, pathlib; from buddy import tracking; print(tracking.study_id(pathlib.Path(sys.argv[1])))"
    asked = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "demo")], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    assert len({process.communicate()[0] for process in asked}) == 1
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["study_id"]


@pytest.mark.parametrize("asked", ["wandb-sync", "wandb-report"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [(401, "does not accept this key"), (500, "error of its own"), ("hang", "does not answer"), ("cut", "failed")],
)
def test_what_is_wrong_with_a_server_is_one_line(
    server: WandbServer, study: Path, asked: str, fault: Fault, said: str
) -> None:
    (study / "wandb").mkdir()
    Maker(study.parent, demo())
    server.fault = lambda what: fault
    begun = time.monotonic()
    done = buddy(asked, "--study", study)
    assert time.monotonic() - begun < 10
    line = only_line(done.err)
    assert (done.status, done.out) == (2, "")
    assert said in line
    assert "are its runs there" not in line
    assert ("WANDB_API_KEY" in line) == (fault == 401)


def test_a_server_without_reports_is_told(server: WandbServer, study: Path) -> None:
    Maker(study.parent, demo())
    server.projects.add("buddy")
    server.without.add("upsertView")
    done = buddy("wandb-report", "--study", study)
    assert done.status == 2
    assert "has no reports" in only_line(done.err)
