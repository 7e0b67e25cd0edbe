"""The command line: ``buddy STAGE --flags``, the same command by hand, under test and in a Snakemake job."""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import typer
from pydantic import ValidationError

from buddy.errors import UserError, lacking, short, unknown

log = logging.getLogger(__name__)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
"""What BUDDY_LOG may say."""

LONGEST = 2000
"""Characters of an error's line: what a library or a file puts into it has no bound of its own."""

COMMANDS = (
    "backbone",
    "data",
    "importance",
    "calibrate",
    "encoder",
    "pool",
    "train",
    "gates",
    "adapt",
    "predictor",
    "evaluate",
    "budget_eval",
    "solve",
    "trace",
    "rouge",
    "score",
    "latency",
    "breakdown",
    "generate",
    "export",
    "card",
    "curve",
    "runs",
    "report",
    "status",
    "check",
    "plan",
    "preflight",
    "wandb_sync",
    "wandb_report",
    "config",
)

FORMER = {"status": "summary"}
"""What a command was called before; scripts may still call it so."""

# Typer carries its own copy of click in newer versions; the base of all usage errors is reached through a public subclass.
_WRONG_USAGE: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_EPILOG = "The order of a study: backbone, data, importance, calibrate, pool, train, gates, adapt, predictor, evaluate, budget-eval, solve, trace, rouge, score, latency, breakdown, report. `buddy COMMAND --help` shows examples."


def build() -> typer.Typer:
    """Assemble the application from ``buddy.commands``: file NAME.py holds the function of command NAME, its ``_`` a ``-``."""
    app = typer.Typer(
        name="buddy",
        help="Budget-driven dynamic depth routing for LLM inference (BUDDY, arXiv 2606.09514).",
        epilog=_EPILOG,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name in COMMANDS:
        module = importlib.import_module(f"buddy.commands.{name}")
        app.command(name.replace("_", "-"))(getattr(module, name))
        if name in FORMER:
            app.command(FORMER[name], hidden=True)(getattr(module, name))
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what goes wrong is one line on stderr, and the exit status says whose it is to mend.

    2: a mistake in what was given (an option, a file, a full disk), which running again does not mend. 1: anything else:
    memory that did not suffice, a network that failed, a bug of ours; with BUDDY_LOG=DEBUG the traceback is shown, too.
    130 and 143: interrupted, ended. 141: whoever read the output has left.

    Args:
        arguments: the words after ``buddy``; those of the process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no sign for a block shows another one
            stream.reconfigure(errors="replace")
    level = os.environ.get("BUDDY_LOG", "INFO").upper()
    if level not in LEVELS:
        _stop(str(unknown("BUDDY_LOG", level, LEVELS)), 2)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpx2", "urllib3", "filelock", "fsspec", "datasets", "gguf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # PEFT 0.21 asks a model by a name that Transformers 5.23 calls deprecated: nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets `finally` blocks tidy up when Slurm cancels
    arguments = sys.argv[1:] if arguments is None else arguments
    command = typer.main.get_command(build())
    try:
        status = command.main(args=arguments or ["--help"], prog_name="buddy", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        _traceback()
        _stop(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop("interrupted", 130)
    except _WRONG_USAGE as error:
        context = getattr(error, "ctx", None)
        usage = f" (try: {context.command_path} --help)" if context else ""
        _stop(error.format_message() + _found(error) + usage, error.exit_code)
    except BrokenPipeError:  # buddy ... | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Exception as error:
        _traceback()
        _stop(*_told(error))
    sys.exit(status if isinstance(status, int) else 0)


_USERS = (
    "ENOENT",
    "ENOTDIR",
    "EISDIR",
    "EEXIST",
    "EACCES",
    "EPERM",
    "EROFS",
    "ENOSPC",
    "EDQUOT",
    "EFBIG",
    "ENAMETOOLONG",
)
"""What the system says of a file or a disk that only the user can mend."""


def _told(error: Exception) -> tuple[str, int]:
    """One line and an exit status for what no part of this package has foreseen.

    Bugs are not dressed up as a user's mistake: a file or disk of the user's is told by what the system says of it, and
    everything else by its own name, with the way to its traceback. A package that is not installed names its extra.
    """
    if isinstance(error, ModuleNotFoundError) and (extra := lacking(str(error.name).partition(".")[0])):
        return str(extra), 2
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = "" if _debugging() else "; run it again with BUDDY_LOG=DEBUG for the traceback"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _USERS:
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{files or 'writing'}: {str(error.strerror).lower()}{'' if files else hint}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return f"out of memory ({what}); a smaller --batch-size, shorter texts or a larger machine help{hint}", 1
    return f"unexpected error: {what}{hint}", 1


def _found(error: Exception) -> str:
    """The value that an option's range refused, which Typer leaves out."""
    cause = error.__cause__
    return f", found {short(cause.errors()[0]['input'])}" if isinstance(cause, ValidationError) else ""


def _debugging() -> bool:
    return logging.root.isEnabledFor(logging.DEBUG)


def _traceback() -> None:
    """Show where the error at hand comes from, if that was asked for."""
    log.debug("traceback", exc_info=True)


def _stop(message: str, status: int) -> NoReturn:
    text = " ".join(message.split())
    print(f"buddy: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}", file=sys.stderr)
    sys.exit(status)
