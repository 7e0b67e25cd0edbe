"""One route per token: the parallel form of decoding (`Routing.form` ``causal``)."""

from __future__ import annotations

import torch
from torch import Tensor

from buddy.routing.profiling import DECISION, mark
from buddy.routing.shared import decide_each
from buddy.routing.step import KeysValues, Step, slope


class ByToken(Step):
    """Each token has its own route, chosen from what came before it.

    A block that any token runs is computed for all of them and kept where it runs; its keys and values are those of the
    tokens that ran it, and for the others what the K/V policy says. One pass gives what as many decode steps would have
    given, at the price of computing what most of them skip.
    """

    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, H) after the last block."""
        self._keep(hidden)
        hidden, written = self._read(hidden)
        routing = self.routing
        route, gates = self._routes_of_tokens(written, hidden), routing.gates
        anywhere = route.any(0).any(0).tolist()
        if self.cache is not None:
            self.cache.record(route, self.new, route.all(0).all(0).tolist())
        for index in range(routing.policy.source_block, len(self.decoder.layers)):
            runs = route[:, :, index]
            if not anywhere[index] and gates is None:
                self._project(index, hidden, None)
                self._keep(hidden)
                continue
            out = self._token_block(index, hidden, runs)
            kept = torch.where(runs.unsqueeze(-1), out, hidden)
            if gates is not None:
                kept = kept + slope(gates[:, :, index].unsqueeze(-1), hidden) * (out - hidden).detach()
            hidden = self._keep(kept)
        return hidden

    def _token_block(self, index: int, hidden: Tensor, runs: Tensor) -> Tensor:
        """One block for all tokens, of which those in ``runs`` (B, S) leave their keys and values."""
        written = runs[:, None, :, None] if self.kv == "zero" else None
        present = runs if self.kv == "mask" and self.past == 0 else None
        return self.block(index, hidden, written=written, present=present)

    def _routes_of_tokens(self, written: KeysValues | None, hidden: Tensor) -> Tensor:
        """The routes (B, S, L), from what the source block has written and from the states (B, S, H) that left it; in
        training also the gates."""
        routing, state = self.routing, self.state
        keys, values = self._source_states(written)
        mask = self._readable()
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=keys.device)
        prompt = self._prompt(mask)
        with mark(DECISION):
            if routing.policy.reads_states and state.route is None:
                routing.policy.see(state.policy_state, hidden, mask & prompt)
            if routing.gradient:
                routing.gates = routing.policy.gates_each(state.policy_state, keys, values, mask, prompt)
                route = routing.gates.detach().bool()
            else:
                route = decide_each(routing.policy, state.policy_state, keys, values, mask, prompt, state.sharing)
                steps = state.step + (mask & ~prompt).cumsum(1) - (1 if state.step else 0)
                route = _held(route, steps, routing.every, state.route)
                state.step = int(steps.max()) + 1
            state.route = route[:, -1]
        routing.trace.add_each(route.cpu())
        return route


def _held(route: Tensor, steps: Tensor, every: int, before: Tensor | None) -> Tensor:
    """Routes (B, S, L) if a new path is chosen at every n-th step only.

    Args:
        route: what each token would choose.
        steps: (B, S), number of the decode step that takes in the token; 0 for a prompt.
        every: n; 0 keeps the prompt's.
        before: (B, L), the route in force before these tokens, if there were any.
    """
    if every == 1:
        return route
    chooses = steps == 0 if every == 0 else steps % every == 0
    places = torch.arange(route.shape[1], device=route.device).expand_as(steps)
    latest = torch.where(chooses, places, -1).cummax(1).values
    held = route.gather(1, latest.clamp(min=0).unsqueeze(-1).expand_as(route))
    if before is None:
        return held
    return torch.where((latest < 0).unsqueeze(-1), before.unsqueeze(1), held)
