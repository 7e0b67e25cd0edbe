"""The command line in this process: an import of torch is paid once, and not with every command."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from dataclasses import dataclass

from buddy.cli import main


@dataclass(frozen=True)
class Said:
    """What a command answered: exit status, standard output, standard error."""

    status: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The line about a user's mistake; fails the test where the answer is anything else than that line."""
        lines = [line for line in self.err.splitlines() if line.startswith("buddy: ")]
        assert self.status == 2, (self.status, self.out, self.err)
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def buddy(*words: object, stdin: str | bytes = "") -> Said:
    """Run ``buddy WORDS``."""
    out, err = io.StringIO(), io.StringIO()
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    before = sys.stdin, logging.root.handlers[:], logging.root.level
    sys.stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(word) for word in words])
                status = 0
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.stdin, logging.root.handlers[:], logging.root.level = before
    return Said(status, out.getvalue(), err.getvalue())
