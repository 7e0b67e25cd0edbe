"""The one line of a whole study, from the events that Snakemake tells its log handlers."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from buddy.study.progress_line import ProgressLine, is_no_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def log(terminal: Terminal) -> Iterator[logging.Logger]:
    logger = logging.Logger("workflow")
    line = ProgressLine("demo", terminal)
    logger.addHandler(line)
    yield logger
    line.close()


def tell(log: logging.Logger, event: str, **told: Any) -> None:
    log.info(None, extra={"event": event, **told})


def last(terminal: Terminal) -> str:
    return [part for part in terminal.getvalue().split("\r") if part.strip()][-1]


def test_the_line_says_what_is_done_and_what_is_at_work(log: logging.Logger, terminal: Terminal) -> None:
    for number, rule in enumerate(["train", "evaluate", "evaluate"]):
        tell(log, "job_info", jobid=number, rule_name=rule)
    tell(log, "job_started", jobs=[0])
    assert terminal.getvalue() == ""  # of how many is not known yet
    tell(log, "job_finished", job_id=0)
    tell(log, "progress", done=1, total=3)
    tell(log, "job_started", jobs=[1, 2])
    assert last(terminal).startswith("demo:  33%")
    assert "1/3" in last(terminal)
    assert "evaluate ×2" in last(terminal)
    assert "train" not in last(terminal)
    tell(log, "job_error", jobid=1)
    tell(log, "job_started", jobs=[])
    assert "evaluate]" in last(terminal)
    tell(log, "job_finished", job_id=2)
    tell(log, "progress", done=3, total=3)
    assert "3/3" in last(terminal)
    assert terminal.getvalue().endswith("\n")


def test_a_log_gets_few_lines() -> None:
    stream = io.StringIO()
    line = ProgressLine("demo", stream)
    logger = logging.Logger("workflow")
    logger.addHandler(line)
    for done in range(1, 100):
        tell(logger, "job_started", jobs=[done])
        tell(logger, "progress", done=done, total=99)
    assert stream.getvalue().count("\r") < 5
    assert "99/99" in stream.getvalue()


def test_what_the_line_counts_is_not_said_twice() -> None:
    def record(message: str | None, **told: Any) -> logging.LogRecord:
        return logging.makeLogRecord({"msg": message, **told})

    assert not is_no_progress(record(None, event="progress", done=1, total=2))
    assert not is_no_progress(record("Execute 2 jobs..."))
    assert not is_no_progress(record("Select jobs to execute..."))
    assert is_no_progress(record("buddy: study.backbones: unknown"))
    assert is_no_progress(record(None, event="job_error"))
