"""CUDA graphs played on a CPU: operations are recorded with their tensors, and replayed on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "is_nonzero",
    "repeat_interleave.Tensor",
)
"""Operations that make the host wait for the device, or whose result has a shape that only the device knows."""


def check(func: Any, args: Any) -> None:
    """Refuse an operation that no CUDA graph can hold."""
    name = str(func).removeprefix("aten.")
    assert not any(name.startswith(word) for word in ASKING), f"{func} asks the device"
    if name.startswith("index") and isinstance(args[1], list | tuple):
        assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{func} by a boolean mask"
    devices = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    assert len(devices) <= 1, f"{func} brings a tensor from {devices}"


class Graph(TorchDispatchMode):
    """One recorded graph.

    As on a GPU, recording it changes nothing, and what it allocates for itself is anybody's once it has run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}
        self.sibling: Graph | None = None
        self.ahead = False
        self.begins: Callable[[Graph], None] = lambda _: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check(func, args)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def _keep(self, argument: Any, value: Any) -> None:
        if isinstance(value, Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
            storage = value.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def rewind(self) -> None:
        """Take back what recording changed."""
        for storage, content in self.before.values():
            storage.copy_(content)
        self.before.clear()

    def replay(self) -> None:
        if self.ahead:
            self.ahead = False
            return
        self.begins(self)
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for place, value in self._own(func, out, new):
                place.copy_(value)
        if self.sibling is None:
            self.forget()

    def forget(self) -> None:
        """Nobody may rely on what is left in the graph's own memory."""
        for func, _, _, out in self.calls:
            for place, _ in self._own(func, out, out):
                place.fill_(float("nan") if place.is_floating_point() else 77 if place.dtype != torch.bool else True)

    def _own(self, func: Any, out: Any, new: Any) -> Iterator[tuple[Tensor, Tensor]]:
        if not any(result.alias_info for result in func._schema.returns):
            pairs = zip(tree_leaves(out), tree_leaves(new), strict=True)
            yield from ((place, value) for place, value in pairs if isinstance(place, Tensor))


class Tape:
    """Stands in for `buddy.routing.graphs.recording.Recorder`.

    Args:
        late: work that runs beside the main stream runs as late as it may, not as early.

    Attributes:
        seconds, memory_mb, graphs: as the recorder's.
        replays: graphs replayed so far.
        waits: how often the host waited for the device.
        failing: the next recording fails.
    """

    def __init__(self, late: bool = False) -> None:
        self.late = late
        self.seconds, self.memory_mb, self.graphs = 0.0, 0.0, 0
        self.waits = 0
        self.failing = False
        self._front: Graph | None = None

    def record(self, pieces: Sequence[Any], undo: Callable[[], None]) -> list[list[Graph]]:
        for piece in pieces:
            piece.run(lambda: None)
        undo()
        if self.failing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")
        return [self._recorded(piece) for piece in pieces]

    def _recorded(self, piece: Any) -> list[Graph]:
        graphs = [Graph()]
        graphs[0].__enter__()

        def cut() -> None:
            graphs[-1].__exit__(None, None, None)
            graphs.append(Graph())
            graphs[0].sibling = graphs[1]
            graphs[1].__enter__()
            graphs[0].begins = self._began

        piece.run(cut)
        graphs[-1].__exit__(None, None, None)
        for graph in reversed(graphs):
            graph.rewind()
        self.graphs += len(graphs)
        return graphs

    @contextmanager
    def beside(self) -> Iterator[None]:
        if self.late:  # the main stream is through with what follows before the work beside it begins
            self._rest_of_front().replay()
            self._rest_of_front().ahead = True
        yield

    def _began(self, front: Graph) -> None:
        self._front = front

    def _rest_of_front(self) -> Graph:
        assert self._front is not None
        assert self._front.sibling is not None
        return self._front.sibling

    def wait(self) -> None:
        self.waits += 1

    def join(self) -> None:
        pass
