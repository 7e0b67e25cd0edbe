"""One line for a whole study: jobs done, time gone and left, and what is at work now.

Snakemake tells its log handlers of events; this one needs no more of Snakemake than their names.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN = 30.0
"""Between two lines where nobody watches: a log has no line to write over."""

COUNTED = ("job_finished", "progress", "resources_info")
"""Events that the line counts, for which Snakemake has lines of its own."""
COUNTING = re.compile(r"Select jobs to execute|Execute \d+ jobs")


def is_no_progress(record: logging.LogRecord) -> bool:
    """Whether a message says something that the line does not: a filter for those who show the others."""
    return str(vars(record).get("event")) not in COUNTED and not COUNTING.match(str(record.msg))


class ProgressLine(logging.Handler):
    """Draws the line on a terminal, and writes one now and then into a log.

    Args:
        title: what the line begins with, the study's name.
        stream: standard error by default.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        super().__init__()
        self._title = title
        self._stream = stream or sys.stderr
        self._bar: tqdm[Any] | None = None
        self._rules: dict[int, str] = {}
        self._at_work: set[int] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Take one event of Snakemake's, as its attributes have it; what is none is left to others."""
        told = vars(record)
        match str(told.get("event")):
            case "job_info":
                self._rules[told["jobid"]] = told["rule_name"]
            case "job_started":
                self._at_work.update(_numbers(told["jobs"]))
                self._draw()
            case "job_finished":
                self._at_work.discard(told["job_id"])
            case "job_error":
                self._at_work.discard(told["jobid"])
            case "progress":
                self._draw(done=told["done"], total=told["total"])

    def _draw(self, done: int | None = None, total: int | None = None) -> None:
        if self._bar is None:
            if total is None:
                return
            between = 0.2 if self._stream.isatty() else SECONDS_BETWEEN
            self._bar = tqdm(
                total=total,
                desc=self._title,
                unit="job",
                file=self._stream,
                mininterval=between,
                smoothing=0,
                leave=True,
            )
        names = Counter(self._rules.get(number, "") for number in self._at_work)
        told = (f"{name} ×{count}" if count > 1 else name for name, count in sorted(names.items()) if name)
        self._bar.set_postfix_str(", ".join(told), refresh=False)
        if done is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done == total:
                self._end()
        elif self._stream.isatty():
            self._bar.refresh()

    def close(self) -> None:
        """End the line."""
        self._end()
        super().close()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _numbers(jobs: Any) -> list[int]:
    return [int(job) for job in (jobs if isinstance(jobs, (list, tuple, set)) else [jobs])]
