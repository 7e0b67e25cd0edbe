"""Jobs of one machine start from a process that has imported what they all need.

Importing PyTorch and Transformers takes seconds of every job, of which a small study has a hundred. Snakemake therefore
starts ``python -m buddy.warm SOCKET`` beside itself where jobs run on its own machine, and ``python -m buddy ...``, told by
``BUDDY_WARM``, hands its words, folder, environment and streams to it. What works then is a fork: nothing is shared but
what is imported, and its end is the end of the command. Where there is no such process, the command does its work itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

VARIABLE = "BUDDY_WARM"
"""The socket's path, in the environment of jobs."""
LIGHT = ("report", "config", "check", "preflight", "status", "summary", "runs", "wandb-sync", "wandb-report")
"""Commands that need neither PyTorch nor Transformers: they are as fast alone."""
TIMED = ("latency", "breakdown")
"""Commands whose own time is what they measure: nothing of another process shall be in it."""
READ_ON_IMPORT = ("CUDA_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "PYTHON", "LD_", "NVIDIA_", "KMP_")
"""Beginnings of variables that libraries read when they are imported: a job that has others does its work itself."""


# ---- the side of a job -----------------------------------------------------------------------------------------------


def run(arguments: list[str]) -> int | None:
    """Let the waiting process run a command, as if it ran here.

    Returns:
        Its exit status; None where there is no such process, or the command is better off alone.
    """
    path = os.environ.get(VARIABLE)
    if not path or not arguments or arguments[0] in (*LIGHT, *TIMED):
        return None
    order = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    content = json.dumps(order).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, connection.makefile("r") as answers:
        try:
            connection.connect(path)
            socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(content)
            accepted = answers.readline().split()
        except OSError:
            return None
        return _watched(int(accepted[1]), answers) if accepted[:1] == ["pid"] else None


def _watched(pid: int, answers: TextIO) -> int:
    """Wait for a command's end; signals that are meant for it are passed on."""

    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    try:
        ended = answers.readline().split()
    except OSError:
        ended = []
    return int(ended[1]) if ended else 1


# ---- who starts it ---------------------------------------------------------------------------------------------------


def start() -> None:
    """Start the process that waits, for the jobs that inherit this process's environment; it ends when this one does.

    ``BUDDY_WARM=no`` in the environment leaves every job to itself.
    """
    if os.environ.get(VARIABLE):
        return
    path = Path(tempfile.mkdtemp(prefix="buddy-")) / "warm"
    # In a session of its own: a Ctrl-C is passed on to the commands by those who asked for them, once.
    subprocess.Popen([sys.executable, "-m", __name__, str(path)], stdin=subprocess.DEVNULL, start_new_session=True)
    os.environ[VARIABLE] = str(path)


# ---- the side that waits ---------------------------------------------------------------------------------------------


@dataclass
class Server:
    """Forks a process for every command that it is told.

    Args:
        path: of its socket.
        parent: process for which it is there: once that has ended, no command is accepted, and the server ends when the
            last one has.
    """

    path: Path
    parent: int
    connections: dict[int, socket.socket] = field(default_factory=dict)

    def serve(self) -> list[str] | None:
        """Serve until the parent is gone. In each fork this returns the words of its command; in the server None."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(self.path))
            listening.listen(64)
            import_all()
            with selectors.DefaultSelector() as selector:
                selector.register(listening, selectors.EVENT_READ)
                while self.connections or os.getppid() == self.parent:
                    if selector.select(timeout=0.05 if self.connections else 0.5):
                        connection, _ = listening.accept()
                        words = self._forked(connection)
                        if words is not None:
                            return words
                    self._reap()
        shutil.rmtree(self.path.parent, ignore_errors=True)
        return None

    def _forked(self, connection: socket.socket) -> list[str] | None:
        """Fork for one command; its words in the fork. Whoever asks for another environment, or has left, is let go."""
        streams: list[int] = []
        try:
            head, streams, _, _ = socket.recv_fds(connection, 8, 3)
            order = json.loads(_exactly(connection, int.from_bytes(head, "big")))
        except (OSError, ValueError):  # it was killed while it asked
            order = None
        pid = os.fork() if order and fits(order["environment"]) else None
        if pid == 0:
            for each in (*self.connections.values(), connection):
                each.close()
            become(order, streams)
            return order["arguments"]
        _close(streams)
        if pid is None:
            connection.close()
            return None
        self.connections[pid] = connection
        with contextlib.suppress(OSError):  # it has left: its command is ended soon
            connection.sendall(f"pid {pid}\n".encode())
        return None

    def _reap(self) -> None:
        """Tell of commands that have ended, and end those whose askers have gone."""
        while self.connections:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            connection = self.connections.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                connection.sendall(f"end {code if code >= 0 else 128 - code}\n".encode())
            connection.close()
        for pid, connection in self.connections.items():
            if _gone(connection):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def fits(environment: dict[str, str]) -> bool:
    """Whether what was read on import is what a command would read."""
    return all(
        environment.get(name) == os.environ.get(name)
        for name in {*environment, *os.environ}
        if name.startswith(READ_ON_IMPORT)
    )


def become(order: dict[str, Any], streams: list[int]) -> None:
    """Take on a command's folder, environment and streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    _close([stream for stream in streams if stream > 2])
    # What Python knows of a stream, such as whether it can seek, it learnt of the server's.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        import torch

        torch.set_num_threads(int(threads))


def import_all() -> None:
    """What most jobs import: models, LoRA and this package's own rooms."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import (  # noqa: F401
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
    )

    from buddy import runs  # noqa: F401
    from buddy.routing import model  # noqa: F401


def _exactly(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        part = connection.recv(count - len(content))
        if not part:
            raise ConnectionError("an order was cut short")
        content += part
    return content


def _gone(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _close(streams: list[int]) -> None:
    for stream in streams:
        os.close(stream)


if __name__ == "__main__":
    words = Server(Path(sys.argv[1]), os.getppid()).serve()
    if words is not None:
        from buddy.cli import main

        sys.argv = ["buddy", *words]
        main(words)
