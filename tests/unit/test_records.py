"""Records: whole or absent, refused when damaged or newer."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from buddy.errors import UserError
from buddy.storage.files import write_json
from buddy.study.records import SCHEMA, Budget, Record, commit, environment, find


def record(**changes):
    return Record(
        **{"kind": "accuracy", "study": "s", "backbone": "b", "method": "buddy", "metrics": {"x": 1.5}, "n": 3}
        | changes
    )


def test_a_record_reads_back_as_written(tmp_path):
    written = record(budget=Budget.of(26, 30), variant={"omega": 0.1}, environment=environment("float32"))
    path = written.write(tmp_path / "records" / "accuracy" / "removed~4.json")
    assert Record.read(path) == written
    assert json.loads(path.read_text())["budget"] == {"fraction": 26 / 30, "executed": 26, "removed": 4}
    assert find(tmp_path) == find(tmp_path / "records" / "accuracy") == [path]
    assert find(tmp_path / "records" / "latency") == []


def test_bad_records_are_refused_by_name(tmp_path):
    path = record().write(tmp_path / "r.json")
    content = json.loads(path.read_text())
    for broken, words in (
        (json.dumps(content)[:30], "not a readable record"),
        (json.dumps([1]), "no schema number"),
        (json.dumps({**content, "schema": SCHEMA + 1}), "newer"),
        (json.dumps({k: v for k, v in content.items() if k != "metrics"}), "not a complete record"),
        (json.dumps({**content, "extra": 1}), "not a complete record"),
        (json.dumps({**content, "kind": "accurracy"}), "did you mean accuracy"),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=words):
            Record.read(path)
    with pytest.raises(UserError, match=r"gone\.json"):
        Record.read(tmp_path / "gone.json")


def test_not_a_number_never_reaches_a_record(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        record(metrics={"x": float("nan")}).write(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def keep_writing(path):
    for round_ in range(100_000):
        write_json(path, {"round": round_, "filler": "x" * 200_000})


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "r.json"
    for delay in (0.05, 0.11, 0.17):
        writer = multiprocessing.get_context("fork").Process(target=keep_writing, args=(path,))
        writer.start()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert len(json.loads(path.read_text())["filler"]) == 200_000


def test_the_commit_is_that_of_the_checkout():
    import subprocess
    from pathlib import Path

    here = Path(__file__).parent
    head = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        assert commit() == ""
    else:
        assert commit().removesuffix("-dirty") == head.stdout.strip()
