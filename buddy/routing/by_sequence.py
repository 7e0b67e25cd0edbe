"""One route per sequence: all tokens of a pass share it. The form of prefill and decoding, and of training."""

from __future__ import annotations

import torch
from torch import Tensor

from buddy.routing.profiling import DECISION, GATHER, mark
from buddy.routing.schedule import Plan, plan
from buddy.routing.shared import decide
from buddy.routing.step import KeysValues, Step, slope


class BySequence(Step):
    """The policy chooses after the source block; then sequences go block by block, or path by path."""

    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, H) after the last block."""
        self._keep(hidden)
        self.in_place = self._needs_rows(len(hidden))
        hidden, written = self._read(hidden)
        self.choose(written, hidden)
        assert self.state.route is not None
        route = self.state.route.cpu()  # the one read from the device in a pass
        self._note(route)
        listed = route.tolist()
        source, device = self.routing.policy.source_block, hidden.device
        if self.cache is not None:
            self.cache.record(self.state.route, self.new, [all(column) for column in zip(*listed, strict=True)])
        if self.routing.gradient:
            return self._with_gates(hidden, plan(listed, source, device))
        grouping = False if self.routing.keeps_states else self.routing.grouping
        work = plan(listed, source, device, self._tokens(listed), grouping)
        self.state.full = all(map(all, listed))
        if self.in_place != self._needs_rows(len(hidden)):
            self.in_place = not self.in_place
            self._inputs.clear()
        return self._by_path(hidden, work) if work.groups else self._by_block(hidden, work)

    def _needs_rows(self, batch: int) -> bool:
        """Whether sub-batches have to attend to a cache of the whole batch.

        Full depth, and a sequence alone, are left to the model's own attention.
        """
        return self.past > 0 and batch > 1 and not self.state.full

    # ---- the choice --------------------------------------------------------------------------------------------------

    def choose(self, written: KeysValues | None, hidden: Tensor) -> None:
        """Let the policy read what the source block has written, and decide; in training also the gates.

        Args:
            written: keys and values of the new tokens, where no cache has them.
            hidden: (B, S, H), what left the source block.
        """
        routing, state = self.routing, self.state
        policy = routing.policy
        with mark(DECISION):
            if policy.reads_states and state.route is None:
                policy.see(state.policy_state, hidden, self._readable(routing.context_mask))
            if policy.source_block and (routing.every or state.route is None):
                keys, values = self._source_states(written)
                policy.observe(state.policy_state, keys, values, self._readable(routing.context_mask))
            if routing.gradient:
                routing.gates = policy.gates(state.policy_state)
                state.route = routing.gates.detach().bool()
            elif state.route is None or (routing.every and state.step % routing.every == 0):
                state.route = decide(policy, state.policy_state, state.sharing)
            state.step += 1

    def _by_block(self, hidden: Tensor, work: Plan) -> Tensor:
        """Gather the rows that run a block, run it, scatter them back (paper sec. 4.3)."""
        for index in range(self.routing.policy.source_block, len(self.decoder.layers)):
            hidden = self._keep(self._for_some(index, hidden, work.running[index], work.skipping[index]))
        return hidden

    def _by_path(self, hidden: Tensor, work: Plan) -> Tensor:
        """Take sequences of one path through all their blocks together, without the padding they do not need."""
        result = hidden.clone()
        everything = slice(0, self.new)
        for group in work.groups or ():
            columns = group.columns if self.past == 0 and self._trims() else everything
            with mark(GATHER):
                part = hidden[group.rows.index, columns]
            for index in range(self.routing.policy.source_block, len(self.decoder.layers)):
                if index in group.path:
                    part = self.block(index, part, group.rows, columns)
                else:
                    self._project(index, part, group.rows, columns)
            with mark(GATHER):
                result[group.rows.index, columns] = part
        return result

    def _tokens(self, route: list[list[bool]]) -> list[tuple[int, int]]:
        """Per sequence the range of its real tokens in the pass; asks the device only for prompts that differ."""
        everything = (0, self.new)
        mask = self._real()
        if mask is None or self.past or len({tuple(row) for row in route}) == 1:
            return [everything] * len(route)
        first = mask.int().argmax(1)
        last = self.new - mask.flip(1).int().argmax(1)
        return list(zip(first.tolist(), last.tolist(), strict=True))

    def _trims(self) -> bool:
        """Whether the shared attention mask can be cut to a group's columns."""
        return self.decoder.config._attn_implementation in ("sdpa", "eager")

    def _with_gates(self, hidden: Tensor, work: Plan) -> Tensor:
        """Training form of ``h + M * F(h)``: exact forward pass, a gradient for every gate (paper sec. 4.2.3).

        Sequences that run the block get its output; the others keep their state, and the block is still evaluated for
        them, without a graph, because ``dL/dM = <dL/dh, F(h)>`` needs F. What the gate multiplies is detached: with M
        equal to 0 or 1 the backbone's own gradient is that of the hard path.
        """
        gates = self.routing.gates
        assert gates is not None
        for index in range(self.routing.policy.source_block, len(self.decoder.layers)):
            running, skipping = work.running[index], work.skipping[index]
            gate = slope(gates[:, index].view(-1, 1, 1), hidden)
            if skipping is None:
                out = self.block(index, hidden)
                hidden = self._keep(out + gate * (out - hidden).detach())
                continue
            with torch.no_grad():
                residual = torch.zeros_like(hidden)
                part = hidden[skipping.index]
                residual[skipping.index] = self.block(index, part, skipping) - part
            out = hidden
            if running is not None and len(running):
                part = hidden[running.index]
                ran = self.block(index, part, running)
                out = hidden.index_copy(0, running.index, ran)
                residual[running.index] = (ran - part).detach()
            hidden = self._keep(out + gate * residual)
        return hidden
