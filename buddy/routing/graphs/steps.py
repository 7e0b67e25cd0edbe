"""What a decode step does on the device, piece by piece, on buffers that stay where they are.

Each piece can be recorded as a CUDA graph: its shapes depend on nothing but the key it goes by, and it asks the device
for nothing. Which pieces make a step, `buddy.routing.graphs.decoder` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from buddy.routing.attention import reading_rows
from buddy.routing.graphs import nest
from buddy.routing.graphs.kernels import lean
from buddy.routing.graphs.recording import Cut, nowhere
from buddy.routing.kv import project
from buddy.routing.policy import Policy
from buddy.routing.shared import Sharing, decide
from buddy.routing.types import CausalLM, Decoder

# cuDNN's attention has had faults under graph capture with masks; the others have not.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

NONE, SOME, ALL = 0, 1, 2
"""How many sequences of the batch run a block."""

Path = tuple[int, ...]
"""For each block NONE, SOME or ALL."""

Key = tuple[Any, ...]
"""Which piece: its kind, the window of the cache that it reads, and what else tells it from its like.

- ``("front", window)``: the blocks up to the source block; cut in two where that block has written its K/V.
- ``("choose", window, sharing)``, ``("observe", 0)``: the policy reads the new token, and chooses, for each sequence or
  for the batch, or not.
- ``("hold", window)``: under ``mask``, what a step without a choice does instead.
- ``("block", window, index)``: a block that any sequence runs.
- ``("project", 0, index)``: under ``project``, what a block leaves that no sequence runs.
- ``("tail", 0)``: the final norm, where the last block does not bring it along.
- ``("path", window, whole, path)``: all of a step along a known path, or what comes after the source block.
"""


class Pieces:
    """The buffers of a batch, and the work on them.

    Args:
        backbone: causal language model.
        policy: chooses the blocks.
        kv: what stands for the K/V of a skipped block.
        batch: number of sequences B.
        capacity: columns C of the cache.

    Attributes:
        storage: per block (2, B, KV heads, C, head size), its keys and values.
        present: boolean (L, B, C) under ``mask``: where a block has K/V.
        hidden: (B, 1, H), the state of the new tokens on its way through the blocks.
        normed: (B, 1, H), the same after the final norm.
        column: (1,) int64, the column of the new tokens.
        seen: boolean (B, C), the columns that hold a token that may be seen.
        route: boolean (B, L), the route in force.
        state: the policy's.
    """

    def __init__(self, backbone: CausalLM, policy: Policy, kv: str, batch: int, capacity: int) -> None:
        self.decoder: Decoder = backbone.get_decoder()
        self.layers = [reading_rows(layer) for layer in self.decoder.layers]
        self.policy = policy
        self.source = policy.source_block
        self.kv = kv
        self.batch = batch
        self.state: Any = None
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(backbone, capacity)

    def _allocate(self, backbone: CausalLM, capacity: int) -> None:
        batch, blocks = self.batch, len(self.layers)
        config, device = backbone.config, backbone.device
        floats: dict[str, Any] = {"dtype": backbone.dtype, "device": device}
        flags: dict[str, Any] = {"dtype": torch.bool, "device": device}
        head, masks = self.layers[0].self_attn.head_dim, self.kv == "mask"
        shape = (2, batch, config.num_key_value_heads, capacity, head)
        self.storage = [torch.zeros(shape, **floats) for _ in range(blocks)]
        self.present = torch.zeros(blocks, batch, capacity, **flags) if masks else None
        self.hidden = torch.zeros(batch, 1, config.hidden_size, **floats)
        self.normed = torch.zeros_like(self.hidden)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.cos, self.sin = (
            torch.zeros_like(part) for part in self.decoder.rotary_emb(self.hidden, position_ids=self.positions)
        )
        self.seen = torch.zeros(batch, capacity, **flags)
        self.shared_bias = torch.zeros(batch, 1, 1, capacity, **floats)
        self.biases = torch.zeros(blocks, batch, 1, 1, capacity, **floats) if masks else None
        # Scalars of the host would be copied to the device at each use, which a capture forbids.
        self.nought, self.barred = torch.zeros((), **floats), torch.full((), -torch.inf, **floats)
        self.route = torch.zeros(batch, blocks, **flags)

    def grow(self, capacity: int) -> None:
        """Move to buffers of that many columns, what is in them included; block by block, so that little of it lies in
        two places at a time."""
        with torch.inference_mode(False), torch.no_grad():
            for index, storage in enumerate(self.storage):
                self.storage[index] = _longer(storage, 3, capacity)
            self.seen = _longer(self.seen, 1, capacity)
            self.shared_bias = _longer(self.shared_bias, 3, capacity)
            if self.present is not None and self.biases is not None:
                self.present = _longer(self.present, 2, capacity)
                self.biases = _longer(self.biases, 4, capacity)

    def clear(self) -> None:
        """Nothing of the last generation is left."""
        for storage in self.storage:
            storage.zero_()
        self.seen.zero_()
        if self.present is not None:
            self.present.zero_()

    def load(self, past: int, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Bring a step's inputs into the buffers."""
        self.hidden.copy_(hidden)
        self.column.fill_(past)
        if position_ids is None:
            self.positions.fill_(past)
        else:
            self.positions.copy_(position_ids)
        if attention_mask is None:
            self.seen[:, : past + 1] = True
        else:
            self.seen[:, : past + 1].copy_(attention_mask)

    def adopt(self, state: Any) -> bool:
        """Take over a policy's state; False if what is recorded has to be recorded again."""
        if nest.copied(state, self.state):
            return True
        with torch.inference_mode(False):
            self.state = nest.cloned(state)
        return False

    def undo(self) -> Callable[[], None]:
        """Takes back what running pieces of a step changes: called between two steps, or before one."""
        small = [self.hidden, self.route, *(leaf for leaf in nest.leaves(self.state) if isinstance(leaf, Tensor))]
        before = [tensor.clone() for tensor in small]

        def undo() -> None:
            for tensor, value in zip(small, before, strict=True):
                tensor.copy_(value)
            for storage in self.storage:
                storage.index_fill_(3, self.column, 0)

        return undo

    def do(self, key: Key, cut: Cut = nowhere) -> None:
        """Do a piece of a step; ``cut`` is called where it may be cut in two."""
        kind, window, *rest = key
        pieces: dict[str, Callable[..., None]] = {
            "front": partial(self._front, cut=cut),
            "choose": self._choose,
            "observe": self._observe,
            "hold": self._hold,
            "block": self._block,
            "project": self._project,
            "tail": self._tail,
            "path": self._path,
        }
        with torch.no_grad(), _capturable(self.decoder):
            pieces[kind](window, *rest)

    def _front(self, window: int, cut: Cut) -> None:
        """Rotary embedding, mask, and the blocks up to the source block; cut where the source block has its K/V."""
        self._prepare(window)
        hidden = self.hidden
        for index in range(self.source):
            last = index == self.source - 1
            hidden = self._ran(index, hidden, window, ALL, cut if last else nowhere)
        self.hidden.copy_(hidden)

    def _observe(self, window: int) -> None:
        """Let the policy read the source block's K/V of the new token."""
        keys, values = self.storage[self.source - 1].index_select(3, self.column)
        self.policy.observe(self.state, keys, values, self.seen.index_select(1, self.column))

    def _choose(self, window: int, sharing: Sharing | None) -> None:
        """Read, and choose the route."""
        self._observe(window)
        self.route.copy_(decide(self.policy, self.state, sharing))
        if self.kv == "mask":
            self._hold(window)

    def _hold(self, window: int) -> None:
        """Under ``mask``: remember which blocks the route leaves out, and make each block's mask.

        A row that never ran a block sees nothing there; what comes out is no number, and is not kept, as it skips it.
        """
        assert self.present is not None
        assert self.biases is not None
        self.present.index_copy_(2, self.column, self.route.T.unsqueeze(-1))
        visible = self.present[:, :, :window] & self.seen[:, :window]
        torch.where(visible[:, :, None, None], self.nought, self.barred, out=self.biases[..., :window])

    def _block(self, window: int, index: int) -> None:
        """A block that any sequence runs; after the last one the norm."""
        if self.batch == 1:
            self.hidden.copy_(self._ran(index, self.hidden, window, ALL))
        else:
            out = self._ran(index, self.hidden, window, SOME)
            torch.where(self._runs(index), out, self.hidden, out=self.hidden)
        if index == len(self.layers) - 1:
            self._tail(window)

    def _project(self, window: int, index: int) -> None:
        """Under ``project``: what a block leaves that no sequence runs."""
        self._leave_projection(index, self.hidden)

    def _tail(self, window: int) -> None:
        self.normed.copy_(self.decoder.norm(self.hidden))

    def _path(self, window: int, whole: bool, path: Path) -> None:
        """A step along a path that is known, or what of it comes after the source block."""
        if whole:
            self._prepare(window)
            if self.kv == "mask":
                self._hold(window)
        hidden = self.hidden
        for index in range(0 if whole else self.source, len(path)):
            if path[index]:
                out = self._ran(index, hidden, window, path[index])
                hidden = out if path[index] == ALL else torch.where(self._runs(index), out, hidden)
            elif self.kv == "project":
                self._leave_projection(index, hidden)
        self.normed.copy_(self.decoder.norm(hidden))

    def _prepare(self, window: int) -> None:
        """What all blocks of a step are given: rotary embedding, and the mask of those that miss nothing."""
        cos, sin = self.decoder.rotary_emb(self.hidden, position_ids=self.positions)
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        seen = self.seen[:, None, None, :window]
        torch.where(seen, self.nought, self.barred, out=self.shared_bias[..., :window])

    def _ran(self, index: int, hidden: Tensor, window: int, rows: int, cut: Cut = nowhere) -> Tensor:
        """One block's output for the whole batch.

        Where only some rows run it, the others leave no K/V under ``zero``; under ``mask`` theirs is never seen, and
        under ``project`` it is what they have to leave.
        """
        bias = self.shared_bias if self.biases is None or index < self.source else self.biases[index]
        written = self._runs(index).unsqueeze(-1) if rows == SOME and self.kv == "zero" else None
        out: Tensor = self.layers[index](
            hidden,
            attention_mask=bias[..., :window],
            position_ids=self.positions,
            past_key_values=_Column(self, index, window, written, cut),
            use_cache=True,
            position_embeddings=(self.cos, self.sin),
        )
        return out

    def _runs(self, index: int) -> Tensor:
        """(B, 1, 1) boolean: the sequences that run this block."""
        return self.route[:, index].view(-1, 1, 1)

    def _leave_projection(self, index: int, hidden: Tensor) -> None:
        layer = self.layers[index]
        states = project(layer.self_attn, layer.input_layernorm(hidden), self.cos, self.sin)
        for buffer, new in zip(self.storage[index], states, strict=True):
            buffer.index_copy_(2, self.column, new)


class _Column:
    """Stands in for the cache of a block: writes one column of the static buffers, and shows a window of them.

    Args:
        owner: has the buffers.
        index: the block.
        window: columns that attention is shown.
        written: (B, 1, 1, 1) boolean, the rows whose K/V are left, the others leaving zeros; None means all.
        cut: called once the column is written.
    """

    def __init__(self, owner: Pieces, index: int, window: int, written: Tensor | None, cut: Cut) -> None:
        self.owner, self.index, self.window, self.written, self.cut = owner, index, window, written, cut

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new token's keys and values, and return what attention reads."""
        shown = []
        for buffer, new in zip(self.owner.storage[self.index], (key_states, value_states), strict=True):
            kept = new if self.written is None else torch.where(self.written, new, self.owner.nought)
            buffer.index_copy_(2, self.owner.column, kept)
            shown.append(buffer[:, :, : self.window])
        self.cut()
        return shown[0], shown[1]


def _longer(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The same with zeros behind it along a dimension."""
    shape = list(tensor.shape)
    shape[dim] = size
    longer = tensor.new_zeros(shape)
    longer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return longer


@contextmanager
def _capturable(decoder: Decoder) -> Iterator[None]:
    """Within the context, the blocks attend in ways that can be captured, and are lean."""
    with sdpa_kernel(BACKENDS), lean(decoder):
        yield
