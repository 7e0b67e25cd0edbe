"""Gated policies: each block's gate is asked as the pass reaches it, so that the route grows block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from buddy.routing.policy import GatedPolicy
from buddy.routing.profiling import DECISION, mark
from buddy.routing.schedule import Plan, plan
from buddy.routing.step import Step


class ByGate(Step):
    """A prefill of a gated policy, or a pass of its training. Later steps keep the route: they are `BySequence`."""

    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, H) after the last block."""
        assert isinstance(self.routing.policy, GatedPolicy)
        self._policy = self.routing.policy
        self._keep(hidden)
        return self._weighted(hidden) if self.routing.gradient else self._by_gate(hidden)

    def _by_gate(self, hidden: Tensor) -> Tensor:
        """The prefill of a gated policy: what enters a block says which sequences run it.

        The host has to know before it can go on, so it asks the device once per gate. All tokens of a sequence share its
        route, which reads the prompt alone: a pass over prompt and answer routes as prefill and decode steps do, and the
        causal form is this one.
        """
        policy, state = self._policy, self.state
        mask, batch = self._prompt_tokens(hidden), len(hidden)
        everyone = (True,) * batch
        plans: dict[tuple[bool, ...], Plan] = {}  # kept: `_inputs_of` knows rows by their identity
        chosen: list[tuple[bool, ...]] = []
        for index in range(len(self.decoder.layers)):
            with mark(DECISION), torch.no_grad():
                runs = policy.gate(state.policy_state, index, hidden, mask)
            answer = everyone if runs is None else tuple(runs.tolist())
            if answer not in plans:
                plans[answer] = plan([[runs] for runs in answer], 0, hidden.device)
            work = plans[answer]
            hidden = self._keep(self._for_some(index, hidden, work.running[0], work.skipping[0]))
            chosen.append(answer)
        state.route = policy.decide(state.policy_state)
        state.full = all(answer == everyone for answer in chosen)
        state.step += 1
        self._note(torch.tensor(chosen).T)
        if self.cache is not None:
            self.cache.record(state.route, self.new, [all(answer) for answer in chosen])
        return hidden

    def _weighted(self, hidden: Tensor) -> Tensor:
        """Training form of a gated policy: ``h + p * F(h)``, token by token; every block is computed."""
        policy, state = self._policy, self.state
        mask, gates = self._readable(), []
        for index in range(len(self.decoder.layers)):
            weight = policy.weights(state.policy_state, index, hidden, mask)
            out = self.block(index, hidden)
            if weight is not None:
                out = hidden + weight.to(hidden.dtype).unsqueeze(-1) * (out - hidden)
            gates.append(weight)
            hidden = self._keep(out)
        always = torch.ones(hidden.shape[:2], device=hidden.device)
        self.routing.gates = torch.stack([always if weight is None else weight for weight in gates], -1)
        state.route = torch.ones(len(hidden), len(gates), dtype=torch.bool, device=hidden.device)
        state.step += 1
        self._note(state.route)
        return hidden
