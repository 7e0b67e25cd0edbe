"""The command line: ``buddy STAGE --flags``, the same command by hand, under test and in a Snakemake job."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import warnings
from typing import Any

import typer

from buddy.errors import UserError

COMMANDS = (
    "backbone",
    "data",
    "importance",
    "calibrate",
    "encoder",
    "pool",
    "train",
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
    "runs",
    "report",
    "summary",
    "check",
    "preflight",
    "wandb_sync",
    "wandb_report",
    "config",
)

# Typer carries its own copy of click in newer versions; the base of all usage errors is reached through a public subclass.
_WRONG_USAGE: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_EPILOG = "The order of a study: backbone, data, importance, calibrate, pool, train, adapt, predictor, evaluate, budget-eval, solve, trace, rouge, score, latency, breakdown, report. `buddy COMMAND --help` shows examples."


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
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2.

    Args:
        arguments: the words after ``buddy``; those of the process by default.
    """
    logging.basicConfig(level=os.environ.get("BUDDY_LOG", "INFO"), format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpx2", "urllib3", "filelock", "fsspec", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # PEFT 0.21 asks a model by a name that Transformers 5.23 calls deprecated: nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets `finally` blocks tidy up when Slurm cancels
    arguments = sys.argv[1:] if arguments is None else arguments
    command = typer.main.get_command(build())
    try:
        status = command.main(args=arguments or ["--help"], prog_name="buddy", standalone_mode=False)
    except UserError as error:
        _stop(" ".join(str(error).split()), 2)
    except (typer.Abort, KeyboardInterrupt):
        _stop("interrupted", 130)
    except _WRONG_USAGE as error:
        context = getattr(error, "ctx", None)
        usage = f" (try: {context.command_path} --help)" if context else ""
        _stop(" ".join(error.format_message().split()) + usage, error.exit_code)
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str, status: int) -> None:
    print(f"buddy: {message}", file=sys.stderr)
    sys.exit(status)
