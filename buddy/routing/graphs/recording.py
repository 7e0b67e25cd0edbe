"""Recording work on fixed buffers as CUDA graphs, so that a step of decoding is a handful of launches.

A graph replays the kernels of the first time on the same addresses. So work that is to be recorded reads and writes
only buffers that stay where they are, allocates what it needs for itself inside the graph, and never asks the device
for a value.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

Cut = Callable[[], None]


class Piece(NamedTuple):
    """Work to be recorded.

    Attributes:
        run: does it; calls its argument where the recording is to be cut in two, so that other work can start there.
        aside: it will be replayed beside other pieces, on the recorder's second stream.
    """

    run: Callable[[Cut], None]
    aside: bool = False


class Recorder:
    """Records pieces as CUDA graphs, and runs some of them beside the main stream.

    Pieces share their memory, for none leaves anything in it; those that run aside have memory of their own.

    Attributes:
        seconds: time spent recording so far, warm-up included.
        memory_mb: device memory that the graphs took, MB of 2**20 bytes.
        graphs: number of graphs recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.memory_mb = 0.0
        self.graphs = 0
        with torch.cuda.device(device):
            self._main = torch.cuda.Stream()
            # Small kernels must not queue behind the thousands of thread blocks of a matrix product.
            self._aside = torch.cuda.Stream(priority=-1)
            self._done = torch.cuda.Event()
            self._pools = {aside: torch.cuda.graph_pool_handle() for aside in (False, True)}

    def record(self, pieces: Sequence[Piece], undo: Callable[[], None]) -> list[list[torch.cuda.CUDAGraph]]:
        """Record pieces.

        Args:
            pieces: what to record. Each is run once for real before, so that libraries are loaded and have their
                workspaces when recording begins.
            undo: takes back what running them changed.

        Returns:
            For each piece its graphs, one more than it was cut.

        Raises:
            RuntimeError: something in a piece cannot be recorded, or memory ran out.
        """
        started, free = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0]
        with torch.cuda.device(self.device), _no_collection():
            try:
                torch.cuda.synchronize()
                for piece in pieces:
                    with torch.cuda.stream(self._stream(piece)):
                        piece.run(nowhere)
                    torch.cuda.synchronize()
            finally:
                undo()
            torch.cuda.synchronize()
            recorded = [self._recorded(piece) for piece in pieces]
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        self.memory_mb += max(free - torch.cuda.mem_get_info(self.device)[0], 0) / 2**20
        self.graphs += sum(len(parts) for parts in recorded)
        return recorded

    def _recorded(self, piece: Piece) -> list[torch.cuda.CUDAGraph]:
        graphs: list[torch.cuda.CUDAGraph] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            # Other threads (a streamer's reader, a data loader) may go on using the device meanwhile.
            graphs[-1].capture_begin(pool=self._pools[piece.aside], capture_error_mode="thread_local")

        def cut() -> None:
            graphs[-1].capture_end()
            begin()

        with torch.cuda.stream(self._stream(piece)):
            begin()
            try:
                piece.run(cut)
            finally:
                graphs[-1].capture_end()
        return graphs

    def _stream(self, piece: Piece) -> torch.cuda.Stream:
        return self._aside if piece.aside else self._main

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within the context runs after what was launched before it, and beside what comes after it."""
        self._aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._aside):
            yield
            self._done.record()

    def wait(self) -> None:
        """Hold up the host until the last work `beside` is done."""
        self._done.synchronize()

    def join(self) -> None:
        """Hold up the stream, not the host, until the last work `beside` is done."""
        torch.cuda.current_stream(self.device).wait_event(self._done)


def nowhere() -> None:
    """Where nothing is recorded, nothing is cut."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage that holds device memory must not be collected, and so freed, in the middle of a recording."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
