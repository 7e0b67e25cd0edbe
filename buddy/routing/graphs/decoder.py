"""Decode steps as captured CUDA graphs over a static cache, rerouted at every step.

A step that is launched kernel by kernel leaves a GPU waiting for the host. Here each block is a graph of its own, and a
step replays those that the route names. One small copy brings the route to the host, and the host waits for that copy
alone:

    main stream   [ inputs ][ blocks before the source, its K/V ][ rest of the source block ][ blocks of the route ]
    beside it                                                   [ observe, decide, copy ]
    host                                                                               waits ┘ launches the blocks

So the decision runs, and the host reads it, while the device still works on the source block. Where the path cannot
change, or has long been the same, all of it is one graph.

What is captured is Hugging Face's own layers, with the attention of `buddy.routing.attention`, over a window of the
cache: a power of two of columns that covers its length, of which a mask shows those that are filled. When the buffers
are full, they double, and the graphs that read the old ones are captured again as they are needed: the longest window
would have to be captured at that point anyway.

In a batch, a block that some sequences run is computed for all and kept for those that run it: decoding is bound by
reading weights, so the others cost next to nothing. Results are those of the route; the saving is per block.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from buddy.routing.engine import RouteState, Routing
from buddy.routing.graphs.recording import Piece
from buddy.routing.graphs.steps import ALL, NONE, SOME, Key, Path, Pieces
from buddy.routing.kv import RoutedCache
from buddy.routing.policy import Policy
from buddy.routing.shared import Sharing
from buddy.routing.types import CausalLM

log = logging.getLogger(__name__)

FIRST_WINDOW = 256
"""Columns of the smallest window; every further one is twice as long."""

KEPT_PATHS = 8
"""Paths that a decoder keeps as one graph each."""

PATH_STEPS = 512
"""Steps after which a path that may change gets a graph of its own.

Capturing it takes tens of milliseconds, and spares two or three microseconds per block and step. An estimate: it decides
when something is a little faster, never what is computed.
"""


class GraphCache(RoutedCache):
    """A routed cache whose buffers are a decoder's, and stay where they are until they are full.

    It works as any other: a pass over several tokens is an eager one, and writes into the same buffers. What the
    decoder cannot do, it does without it: then steps are eager.
    """

    def __init__(self, decoder: GraphDecoder) -> None:
        super().__init__(len(decoder.pieces.layers), decoder.pieces.kv, decoder.capacity)
        self.graph = decoder
        self._share()

    def _share(self) -> None:
        """Take the decoder's buffers for this cache's."""
        pieces = self.graph.pieces
        for block, storage in zip(self.blocks, pieces.storage, strict=True):
            # Detached: what an eager pass with gradients writes must not tie them to the next generation.
            block.keys, block.values = (part.detach() for part in storage)
            block.is_initialized = True
        self.present = pieces.present

    def reserve(self, batch: int, new: int) -> None:
        """Make room for ``new`` columns of ``batch`` sequences; another batch than it was made for costs the graphs."""
        if self.graph is not None and batch != self.graph.batch and self.length == 0:
            self.leave(f"the cache was made for {self.graph.batch} sequences, the input has {batch}")
        elif self.graph is not None and self.length + new > self.capacity:
            self.graph.grow(self.length + new)
            self.capacity = self.graph.capacity
            self._share()
        super().reserve(batch, new)

    def leave(self, reason: str) -> None:
        """Go on without graphs; the buffers stay with this cache if anything is in them."""
        log.warning("decoding goes on without CUDA graphs: %s", reason)
        decoder, self.graph = self.graph, None
        if self.length:
            decoder.retire()
            return
        decoder.end()
        self.present = None
        for block in self.blocks:
            block.keys = block.values = None
            block.is_initialized = False


class GraphDecoder:
    """The graphs of a batch's decode steps, and the cache that they work on.

    Args:
        backbone: causal language model.
        policy: chooses the blocks; it must be capturable.
        kv: what stands for the K/V of a skipped block.
        batch: number of sequences B.
        capacity: columns C of the cache, a power of two.
        recorder: records graphs (`buddy.routing.graphs.recording`); None does the work anew at every step, as a machine without
            GPU has to.
        first_window: columns of the smallest window.

    Attributes:
        retired: it serves no further generation.
        failure: why capturing went wrong, if it did.
    """

    def __init__(
        self,
        backbone: CausalLM,
        policy: Policy,
        kv: str,
        batch: int,
        capacity: int,
        recorder: Any,
        first_window: int = FIRST_WINDOW,
    ) -> None:
        self.pieces = Pieces(backbone, policy, kv, batch, capacity)
        self.policy = policy
        self.batch = batch
        self.capacity = capacity
        self.retired = False
        self.failure: str | None = None
        self._masks = kv == "mask"
        self._projects = kv == "project"
        self._recorder = recorder
        self._first_window = first_window
        self._graphs: dict[Key, list[Any]] = {}
        self._paths: OrderedDict[Key, None] = OrderedDict()
        self._walked: Counter[Path] = Counter()
        self._due: list[Key] = []
        self._sharing: Sharing | None = None
        self._holder: Callable[[], GraphCache | None] = _nobody
        pinned = backbone.device.type == "cuda"
        self._route = torch.zeros(batch, policy.blocks, dtype=torch.bool, pin_memory=pinned)
        self._route_is_known = False

    # ---- whose it is, and what it cost -------------------------------------------------------------------------------

    @property
    def capture_seconds(self) -> float:
        """Time spent capturing, warm-up included."""
        return self._recorder.seconds if self._recorder is not None else 0.0

    @property
    def memory_mb(self) -> float:
        """Device memory that the graphs took, MB of 2**20 bytes; the cache is not among it."""
        return self._recorder.memory_mb if self._recorder is not None else 0.0

    @property
    def graphs(self) -> int:
        """Number of graphs captured so far."""
        return self._recorder.graphs if self._recorder is not None else 0

    @property
    def free(self) -> bool:
        """Whether no cache uses it."""
        return self._holder() is None

    def begin(self) -> GraphCache:
        """The cache of a new generation; nothing of the last one is left in it."""
        self.pieces.clear()
        self._route_is_known = False
        cache = GraphCache(self)
        self._holder = weakref.ref(cache)
        return cache

    def end(self) -> None:
        """Its cache does without it; the next one may have it."""
        self._holder = _nobody

    def retire(self) -> None:
        """Its cache does without it, and keeps the buffers: no other can have it."""
        self.retired = True
        self._graphs.clear()
        self._paths.clear()
        self.pieces.storage = []

    def grow(self, columns: int) -> None:
        """Move to buffers of at least that many columns, a power of two; what was captured reads the old ones."""
        self.capacity = 1 << (columns - 1).bit_length()
        self._graphs.clear()
        self._paths.clear()
        self.pieces.grow(self.capacity)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(
        self,
        cache: GraphCache,
        routing: Routing,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> BaseModelOutputWithPast | None:
        """One decode step, in place of the engine's own.

        Args:
            cache: the cache that has this decoder.
            routing: how the call is routed.
            hidden: (B, S, H), embeddings of the new tokens.
            attention_mask: (B, past + S), 1 for real tokens; None if all are.
            position_ids: (B or 1, S); None counts from the cache's length.

        Returns:
            As the engine's, without a gradient; the hidden states are overwritten by the next step. None for a pass that
            is no plain decode step: the engine has to run it.
        """
        if not self._takes(cache, routing, hidden, attention_mask):
            self._hand_over(cache)
            return None
        with torch.no_grad():
            cache.reserve(self.batch, 1)
            self.pieces.load(cache.length, hidden, attention_mask, position_ids)
            self._adopt(cache.routing)
            path = self._advance(cache, routing)
            if path is None:
                return None
        state = routing.state = cache.routing
        state.step += 1
        state.full = all(runs == ALL for runs in path)
        if self._masks:
            cache.complete = [before and runs == ALL for before, runs in zip(cache.complete, path, strict=True)]
        routing.trace.add(self._route.clone(), 1)
        cache.commit(1)
        return BaseModelOutputWithPast(last_hidden_state=self.pieces.normed, past_key_values=cache)

    def _takes(self, cache: GraphCache, routing: Routing, hidden: Tensor, attention_mask: Tensor | None) -> bool:
        batch, new = hidden.shape[:2]
        total = cache.length + 1
        context = routing.context_mask
        return (
            new == 1
            and total > 1
            and batch == self.batch
            and hidden.dtype == self.pieces.hidden.dtype
            and routing.policy is self.policy
            and routing.form == "sequence"
            and not routing.gradient
            and not routing.keeps_states
            and (context is None or context.shape[1] != 1)
            and (attention_mask is None or attention_mask.shape == (batch, total))
            and cache.routing is not None
            and cache.routing.route is not None
        )

    def _hand_over(self, cache: GraphCache) -> None:
        """Before an eager pass: the route in force must not be changed by later steps where somebody kept it."""
        if cache.routing is not None and cache.routing.route is self.pieces.route:
            cache.routing.route = self.pieces.route.clone()

    def _adopt(self, state: RouteState) -> None:
        """Go on from the routing state of an eager pass; from then on it lives in the static buffers."""
        if state.policy_state is not self.pieces.state:
            if not self.pieces.adopt(state.policy_state):
                self._graphs.clear()
                self._paths.clear()
            state.policy_state = self.pieces.state
        self._sharing = state.sharing
        if state.route is not self.pieces.route:
            assert state.route is not None
            self.pieces.route.copy_(state.route)
            state.route = self.pieces.route
            self._route_is_known = False

    def _advance(self, cache: GraphCache, routing: Routing) -> Path | None:
        """Run the blocks, and say which; None if the graphs for it could not be had, and nothing was done."""
        window = self._window(cache.length + 1)
        observes = bool(self.policy.source_block and routing.every)
        chooses = observes and cache.routing.step % routing.every == 0
        path = None if chooses else self._known_path()
        if not self._captured(cache, self._needed(window, observes and not chooses, path)):
            return None
        if path is None or observes or not self._replayed(("path", window, True, path)):
            path = self._front(window, observes, path)
            if not self._replayed(("path", window, False, path)):
                self._by_block(window, path)
        self._walk(window, not observes, path)
        return path

    def _front(self, window: int, observes: bool, path: Path | None) -> Path:
        """The blocks up to the source block, and beside the last of them the decision: the path to follow."""
        self._replay(("front", window))
        if observes:
            with self._recorder.beside() if self._recorder is not None else nullcontext():
                self._replay(self._choice(window) if path is None else ("observe", 0))
                if path is None:
                    self._route.copy_(self.pieces.route, non_blocking=True)
        self._replay(("front", window), part=1)
        if path is None:
            if self._recorder is not None:
                self._recorder.wait()  # the one time in a step that the host waits for the device
            self._route_is_known = True
            return self._known_path()
        if observes and self._recorder is not None:
            self._recorder.join()
        if self._masks:
            self._replay(("hold", window))
        return path

    def _by_block(self, window: int, path: Path) -> None:
        for index in range(self.policy.source_block, len(path)):
            if path[index]:
                self._replay(("block", window, index))
            elif self._projects:
                self._replay(("project", 0, index))
        if not path[-1]:
            self._replay(("tail", 0))

    def _known_path(self) -> Path:
        """How many sequences run each block; asks the device only if no step has brought the route over."""
        if not self._route_is_known:
            self._route.copy_(self.pieces.route)
            self._route_is_known = True
        columns = zip(*self._route.tolist(), strict=True)
        return tuple(ALL if all(column) else SOME if any(column) else NONE for column in columns)

    def _window(self, length: int) -> int:
        return min(max(self._first_window, 1 << (length - 1).bit_length()), self.capacity)

    def _choice(self, window: int) -> Key:
        """Under ``mask`` a choice makes the masks of the blocks; otherwise it is the same for all windows."""
        return "choose", window if self._masks else 0, self._sharing

    def _walk(self, window: int, whole: bool, path: Path) -> None:
        """Count the steps on a path; one that has been walked for long gets a graph of its own at the next step."""
        if len(self._walked) > 8 * KEPT_PATHS:
            self._walked.clear()
        self._walked[path] += 1
        self._due = [("path", window, whole, path)] if self._walked[path] >= PATH_STEPS else []

    # ---- replaying and capturing -------------------------------------------------------------------------------------

    def _replay(self, key: Key, part: int = 0) -> None:
        """Do a piece of a step; the front is cut in two, part 0 and 1."""
        if self._recorder is not None:
            self._graphs[key][part].replay()
        elif part == 0:
            self.pieces.do(key)

    def _replayed(self, key: Key) -> bool:
        """The same for a path, if it has a graph of its own."""
        if key not in self._graphs:
            return False
        self._paths.move_to_end(key)
        self._replay(key)
        return True

    def _needed(self, window: int, only_observes: bool, path: Path | None) -> Iterator[Key]:
        """What a step may replay; all blocks at once, so that no later step, or generation, has to stop for one."""
        if self.policy.source_block == 0:  # the path is the same for ever
            yield "path", window, True, path
            return
        yield "front", window
        yield self._choice(window)
        if only_observes:
            yield "observe", 0
        if self._masks:
            yield "hold", window
        for index in range(self.policy.source_block, len(self.pieces.layers)):
            yield "block", window, index
            if self._projects:
                yield "project", 0, index
        yield "tail", 0
        yield from (key for key in self._due if key[1] == window)

    def _captured(self, cache: GraphCache, needed: Iterator[Key]) -> bool:
        """Capture what is not there yet; False if that fails, and the cache has left this decoder."""
        if self._recorder is None:
            return True
        keys = [key for key in needed if key not in self._graphs]
        if not keys:
            return True
        work = [Piece(partial(self.pieces.do, key), aside=key[0] in ("choose", "observe")) for key in keys]
        try:
            recorded = self._recorder.record(work, self.pieces.undo())
        except RuntimeError as error:  # out of memory, or an operation of a policy or layer that no graph can hold
            self.failure = f"capturing failed ({str(error).strip().splitlines()[0]})"
            self._hand_over(cache)
            cache.leave(self.failure)
            return False
        self._graphs.update(zip(keys, recorded, strict=True))
        self._paths.update((key, None) for key in keys if key[0] == "path")
        while len(self._paths) > KEPT_PATHS:
            del self._graphs[self._paths.popitem(last=False)[0]]
        log.info(
            "captured %d graphs for a batch of %d; all in all %d in %.1f s, %.0f MB",
            *(sum(map(len, recorded)), self.batch, self.graphs, self.capture_seconds, self.memory_mb),
        )
        return True


def _nobody() -> None:
    """No cache."""
