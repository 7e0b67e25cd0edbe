"""Who has which graph decoder: generations that follow each other share a cache and its captured graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from buddy.routing.graphs.decoder import FIRST_WINDOW, GraphCache, GraphDecoder
from buddy.routing.graphs.recording import Recorder
from buddy.routing.quantised import stored

KEPT = 2
"""Decoders that a model keeps for generations to come, besides those in use; each has a cache and its graphs."""

CHANGING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the length, which the host decides."""


def obstacle(model: Any) -> str | None:
    """Why decode steps of this `RoutedModel` cannot be captured; None if they can."""
    decoder = model.backbone.get_decoder()
    if model.device.type != "cuda":
        return "the model is not on a GPU"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    if model.backbone.training:
        return "the backbone is in training mode"
    if not model.policy.capturable:
        return f"{type(model.policy).__name__} decides in a way that cannot be captured"
    rope = getattr(decoder.rotary_emb, "rope_type", "default")
    if rope in CHANGING_ROPES:
        return f"the rotary embedding {rope!r} changes with the length"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    decoders = _decoders(model)
    decoders.settle()
    return decoders.failure


def lease(model: Any, capacity: int, batch: int) -> GraphCache:
    """An empty cache whose decode steps are captured graphs.

    Decoders are shared: a cache that is no longer referred to leaves its own, with all graphs, to the next one.

    Args:
        model: a `RoutedModel` that has no `obstacle`.
        capacity: tokens it must have room for.
        batch: number of sequences B.
    """
    return _decoders(model).lease(model, capacity, batch)


class Decoders:
    """The decoders of one model: those that live caches use, and the last few that none does.

    Args:
        recorder: makes what records graphs on a device; what it makes may be None, and nothing is recorded then.
        first_window: columns of the smallest window.

    Attributes:
        failure: why a capture went wrong, if one did; it would again.
    """

    def __init__(self, recorder: Callable[[torch.device], Any] = Recorder, first_window: int = FIRST_WINDOW) -> None:
        self._recorder = recorder
        self._first_window = first_window
        self._all: list[tuple[Any, GraphDecoder]] = []
        self.failure: str | None = None

    def lease(self, model: Any, capacity: int, batch: int) -> GraphCache:
        """See `lease`."""
        self.settle()
        built_in = _fingerprint(model)
        self._all = [(known, decoder) for known, decoder in self._all if known == built_in]
        fitting = [d for _, d in self._all if d.free and d.batch == batch and d.capacity >= capacity]
        decoder = min(reversed(fitting), key=lambda found: found.capacity, default=None)
        if decoder is None:
            self._forget(KEPT - 1)
            decoder = self._new(model, capacity, batch)
        self._all = [pair for pair in self._all if pair[1] is not decoder]
        self._all.append((built_in, decoder))
        return decoder.begin()

    def settle(self) -> None:
        """Let go of decoders that are retired, and remember why a capture failed."""
        for _, decoder in self._all:
            self.failure = decoder.failure or self.failure
        self._all = [pair for pair in self._all if not pair[1].retired]

    def _new(self, model: Any, capacity: int, batch: int) -> GraphDecoder:
        columns = max(self._first_window, 1 << (capacity - 1).bit_length())
        return GraphDecoder(
            model.backbone,
            model.policy,
            model.kv,
            batch,
            columns,
            self._recorder(model.device),
            self._first_window,
        )

    def _forget(self, kept: int) -> None:
        """Drop the decoders that no cache uses, the last used ones excepted."""
        free = [decoder for _, decoder in self._all if decoder.free]
        dropped = free[: max(len(free) - kept, 0)]
        self._all = [pair for pair in self._all if pair[1] not in dropped]


_OF_MODEL: weakref.WeakKeyDictionary[Any, Decoders] = weakref.WeakKeyDictionary()


def _decoders(model: Any) -> Decoders:
    if model not in _OF_MODEL:
        _OF_MODEL[model] = Decoders()
    return _OF_MODEL[model]


def _fingerprint(model: Any) -> tuple[Any, ...]:
    """What graphs have built in: where the weights are, and which adapters are in the way of a pass."""
    decoder = model.backbone.get_decoder()
    tensors = [*decoder.parameters(), *decoder.buffers(), *model.policy.parameters(), *model.policy.buffers()]
    adapters = [
        (module.merged, module.disable_adapters, tuple(module.active_adapters))
        for module in decoder.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "merged")
    ]
    addresses = tuple(part.data_ptr() for tensor in tensors for part in stored(tensor))
    return model.kv, id(model.policy), addresses, tuple(adapters)
