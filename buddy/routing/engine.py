"""One forward pass through the blocks that the policy names.

The Hugging Face model stays as it is: `routed` lends its decoder this module's block loop for the duration of a call
and takes it back afterwards. Embeddings, masks, rotary embedding, blocks, final norm and head are the model's own, so a
route that names every block computes what the untouched model computes, bit for bit.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from buddy.errors import UserError
from buddy.routing.attention import reading_rows
from buddy.routing.budget import Budget
from buddy.routing.kv import RoutedCache, Tap, project
from buddy.routing.policy import Policy
from buddy.routing.profiling import CACHE, DECISION, GATHER, mark
from buddy.routing.schedule import Plan, Rows, plan
from buddy.routing.shared import Sharing, decide, decide_each
from buddy.routing.trace import Trace
from buddy.routing.types import Block, CausalLM, Decoder
from buddy.routing.views import twin
from buddy.settings import MODEL_TYPES

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, each (B, KV heads, S, head size)."""


@dataclass
class Routing:
    """How one call is routed.

    Attributes:
        policy: chooses the blocks.
        budget: fraction of blocks, one or one per sequence; None lets the policy choose.
        every: choose a new path at every n-th decode step; 0 keeps the path of the prefill.
        form: ``sequence``: all tokens of a pass share their sequence's route. ``causal``: each token has the route that
            decoding token by token would give it, the prompt one route.
        kv: K/V of a skipped block where no cache says it, in passes of the causal form.
        context_mask: (B, S), True where the policy may read a token of a pass over a whole sequence; None means every
            token under the attention mask. Answers that are being scored must not choose their own route. In the causal
            form it marks the prompt; None means that the first token alone is the prompt.
        read_mask: (B, S), False where the policy reads nothing of such a pass, whatever the other mask says: a prompt's
            template, which is part of the prompt. None means that it reads every token.
        gradient: training: gates are straight-through and skipped blocks are computed to give them a gradient; those of
            a gated policy are soft.
        grouping: go path by path (True) or block by block (False); None leaves it to `plan.grouping_pays`.
        slack: blocks that a pass may call beyond those of its deepest sequence (`buddy.routing.shared`); None leaves
            every sequence to itself.
        trace: filled with the routes of the call.
        gates: gates of the last pass with their gradient, (B, L) or (B, S, L), in training.
        state: state of the sequences of the last pass, for logging.
        keeps_states: whether the pass under way hands out its hidden states, block by block.
        readers: the blocks as sub-batches run them (`attention.reading_rows`), made once for all passes of the call.
    """

    policy: Policy
    budget: Budget | None
    every: int = 1
    form: str = "sequence"
    kv: str = "zero"
    context_mask: Tensor | None = None
    read_mask: Tensor | None = None
    gradient: bool = False
    grouping: bool | None = None
    slack: int | None = None
    trace: Trace = field(default_factory=Trace)
    gates: Tensor | None = None
    state: RouteState | None = None
    keeps_states: bool = False
    readers: list[Block] = field(default_factory=list)


@dataclass
class RouteState:
    """Routing of the sequences in a cache.

    Attributes:
        policy_state: the policy's own.
        budget: what they were started with.
        route: the current route, boolean (B, L).
        full: whether it names every block for every sequence; on the host.
        step: passes taken, a prefill being the first.
        sharing: how the batch chooses together; None if each sequence does on its own.
    """

    policy_state: Any
    budget: Budget | None = None
    route: Tensor | None = None
    full: bool = True
    step: int = 0
    sharing: Sharing | None = None


def check_supported(backbone: CausalLM) -> None:
    """Refuse a backbone whose block loop this engine does not reproduce.

    Raises:
        UserError: an architecture that is not supported, or sliding-window attention in use.
    """
    config = backbone.config
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"backbone: architecture {config.model_type!r} is not supported; {', '.join(MODEL_TYPES)} are")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError("backbone: sliding-window attention is in use; only full attention is supported")
    if getattr(config, "is_causal", None) is False:
        raise UserError("backbone: its config.json says is_causal=false; only causal attention is routed")


class _Here(threading.local):
    """How the calling thread routes its passes, by the identity of the decoder."""

    def __init__(self) -> None:
        self.routings: dict[int, Routing] = {}


_here = _Here()

_borrowers: Counter[int] = Counter()
"""Threads that route passes through a decoder, by its identity: the last one takes the lent loop back."""

_lending = threading.Lock()


@contextmanager
def routed(backbone: CausalLM, routing: Routing) -> Iterator[Routing]:
    """Within the context, this thread's passes through the backbone follow ``routing``.

    Outside it, and in every other thread, the backbone is untouched.

    Args:
        backbone: a causal language model of a supported architecture (adapters may be injected into its layers).
        routing: how to route.
    """
    decoder = backbone.get_decoder()
    routings = _here.routings
    if id(decoder) in routings:
        raise RuntimeError("this backbone is being routed already")
    with _lending:
        own = vars(decoder).get("forward")  # a copy made while another thread routed the original has a lent one
        if own is not None and getattr(own, "func", None) is not _dispatch:
            raise RuntimeError("this backbone's decoder has a forward pass of its own, which routing would replace")
        decoder.forward = partial(_dispatch, decoder)
        _borrowers[id(decoder)] += 1
    routings[id(decoder)] = routing
    try:
        yield routing
    finally:
        del routings[id(decoder)]
        with _lending:
            _borrowers[id(decoder)] -= 1
            if _borrowers[id(decoder)] == 0:
                del _borrowers[id(decoder)], decoder.forward


def _dispatch(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a decoder while some thread routes it: routed in that thread, its own in all others."""
    routing = _here.routings.get(id(decoder))
    if routing is None:
        return type(decoder).forward(decoder, *args, **kwargs)
    return run_blocks(decoder, routing, *args, **kwargs)


def run_blocks(
    decoder: Decoder,
    routing: Routing,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: RoutedCache | None = None,
    inputs_embeds: Tensor | None = None,
    output_hidden_states: bool | None = None,
    **_: Any,
) -> BaseModelOutputWithPast:
    """The decoder's forward pass with routing; arguments and result as in Hugging Face's.

    Args:
        decoder: the model without its head (``LlamaModel`` and its like).
        routing: how to route.
        input_ids: (B, S) new tokens, or ``inputs_embeds`` (B, S, H).
        attention_mask: (B, past + S), 1 for real tokens.
        past_key_values: the cache; None keeps no K/V (training, scoring).
        output_hidden_states: return the states too: the embeddings, what left each block (a block that a sequence skips
            leaves its state as it was), the last after the norm. What the backbone's configuration says by default.
    """
    hidden = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    batch, new = hidden.shape[:2]
    cache = past_key_values
    if cache is not None and not isinstance(cache, RoutedCache):
        raise TypeError(f"a routed pass needs a RoutedCache, not {type(cache).__name__}")
    past = cache.length if cache is not None else 0
    if output_hidden_states is None:
        output_hidden_states = decoder.config.output_hidden_states
    routing.keeps_states = bool(output_hidden_states)
    if cache is not None:
        if cache.graph is not None:
            stepped = cache.graph.step(cache, routing, hidden, attention_mask, position_ids)
            if stepped is not None:
                return stepped
        cache.reserve(batch, new)
    if position_ids is None:
        position_ids = (torch.arange(new, device=hidden.device) + past).unsqueeze(0)
    causal = create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    routing.state = _state(routing, cache, batch, hidden.device)
    step = Step(
        decoder=decoder,
        routing=routing,
        cache=cache,
        new=new,
        causal=causal,
        attention_mask=attention_mask,
        position_ids=position_ids,
        rotary=decoder.rotary_emb(hidden, position_ids=position_ids),
        state=routing.state,
    )
    if routing.policy.reads_tokens and routing.state.route is None:
        step.read(input_ids, hidden)
    hidden = step.run(hidden)
    if cache is not None:
        cache.commit(new)
    last = decoder.norm(hidden)
    return BaseModelOutputWithPast(
        last_hidden_state=last,
        past_key_values=cache,
        hidden_states=(*step.states[:-1], last) if routing.keeps_states else None,
    )


def _state(routing: Routing, cache: RoutedCache | None, batch: int, device: torch.device) -> RouteState:
    """The routing state of these sequences: from their cache, or fresh."""
    if cache is not None and cache.routing is not None:
        return cache.routing
    sharing = Sharing.of(routing.slack, routing.policy, routing.budget, batch)
    state = RouteState(routing.policy.begin(routing.budget, batch, device), routing.budget, sharing=sharing)
    if cache is not None:
        cache.routing = state
    return state


@dataclass
class Step:
    """One pass over S new tokens of B sequences, block by block."""

    decoder: Decoder
    routing: Routing
    cache: RoutedCache | None
    new: int
    causal: Any
    attention_mask: Tensor | None
    position_ids: Tensor
    rotary: tuple[Tensor, Tensor]
    state: RouteState

    def __post_init__(self) -> None:
        self.past = self.cache.length if self.cache is not None else 0
        self.kv = self.cache.policy if self.cache is not None else self.routing.kv
        self.in_place = False
        self.states: list[Tensor] = []
        self._inputs: dict[int, tuple[Any, ...]] = {}

    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, H) after the last block; those before it are kept in `states` if that is asked for."""
        self._keep(hidden)
        gated = self.routing.policy.gated
        if gated and self.routing.gradient:
            return self._weighted(hidden)
        if gated and self.state.route is None:
            return self._by_gate(hidden)
        if self.routing.form == "causal" and not gated:
            return self._by_token(*self._read(hidden))
        self.in_place = self._needs_rows(len(hidden))
        hidden, written = self._read(hidden)
        self.choose(written)
        assert self.state.route is not None
        route = self.state.route.cpu()  # the one read from the device in a pass
        self._note(route)
        listed = route.tolist()
        source, device = self.routing.policy.source_block, hidden.device
        if self.cache is not None:
            self.cache.record(self.state.route, self.new, [all(column) for column in zip(*listed, strict=True)])
        if self.routing.gradient:
            return self._gated(hidden, plan(listed, source, device))
        grouping = False if self.routing.keeps_states else self.routing.grouping
        work = plan(listed, source, device, self._tokens(listed), grouping)
        self.state.full = all(map(all, listed))
        if self.in_place != self._needs_rows(len(hidden)):
            self.in_place = not self.in_place
            self._inputs.clear()
        return self._by_path(hidden, work) if work.groups else self._by_block(hidden, work)

    def _keep(self, hidden: Tensor) -> Tensor:
        """The same, noted among the `states` if the call asks for them."""
        if self.routing.keeps_states:
            self.states.append(hidden)
        return hidden

    def _read(self, hidden: Tensor) -> tuple[Tensor, KeysValues | None]:
        """Run the blocks up to the source block; without a cache, what that block would have written into it."""
        source, written = self.routing.policy.source_block, None
        for index in range(source):
            if self.cache is None and index == source - 1:
                hidden, keys, values = self._uncached(index, hidden, self._arguments(index), hands_out=True)
                written = keys, values
            else:
                hidden = self.block(index, hidden)
            self._keep(hidden)
        return hidden, written

    def _needs_rows(self, batch: int) -> bool:
        """Whether sub-batches have to attend to a cache of the whole batch.

        Full depth, and a sequence alone, are left to the model's own attention.
        """
        return self.past > 0 and batch > 1 and not self.state.full

    # ---- the choice --------------------------------------------------------------------------------------------------

    def choose(self, written: KeysValues | None) -> None:
        """Let the policy read what the source block has written, and decide; in training also the gates."""
        routing, state = self.routing, self.state
        policy = routing.policy
        with mark(DECISION):
            if policy.source_block and (routing.every or state.route is None):
                keys, values = self._source_states(written)
                policy.observe(state.policy_state, keys, values, self._readable(routing.context_mask))
            if routing.gradient:
                routing.gates = policy.gates(state.policy_state)
                state.route = routing.gates.detach().bool()
            elif state.route is None or (routing.every and state.step % routing.every == 0):
                state.route = decide(policy, state.policy_state, state.sharing)
            state.step += 1

    def read(self, input_ids: Tensor | None, hidden: Tensor) -> None:
        """Show the policy the tokens of the prompt, before any block runs."""
        if input_ids is None:
            raise UserError(f"{type(self.routing.policy).__name__} reads tokens: give input_ids, not inputs_embeds")
        with mark(DECISION):
            self.routing.policy.read(self.state.policy_state, input_ids, self._prompt_of_gates(hidden))

    def _source_states(self, written: KeysValues | None) -> KeysValues:
        """Keys and values of the new tokens in the source block; empty where the policy reads none."""
        source = self.routing.policy.source_block
        if source == 0:
            nothing = self.position_ids.new_zeros(1, 1, self.new, 0, dtype=torch.float32)
            return nothing, nothing
        if self.cache is not None:
            return self.cache.window(source - 1, self.new)
        assert written is not None
        return written

    def _readable(self, context: Tensor | None = None) -> Tensor | None:
        """(B, S) boolean mask of the new tokens that are real and read, and of the context if one is given; None means all."""
        mask = self._real()
        for part in (context, self.routing.read_mask):
            if part is not None and part.shape[1] == self.new:
                mask = part.bool() if mask is None else mask & part.bool()
        return mask

    def _real(self) -> Tensor | None:
        """(B, S) boolean mask of the new tokens that are no padding; None means all."""
        return None if self.attention_mask is None else self.attention_mask[:, -self.new :].bool()

    # ---- one route per sequence --------------------------------------------------------------------------------------

    def _by_block(self, hidden: Tensor, work: Plan) -> Tensor:
        """Gather the rows that run a block, run it, scatter them back (paper sec. 4.3)."""
        for index in range(self.routing.policy.source_block, len(self.decoder.layers)):
            hidden = self._keep(self._for_some(index, hidden, work.running[index], work.skipping[index]))
        return hidden

    def _for_some(self, index: int, hidden: Tensor, running: Rows | None, skipping: Rows | None) -> Tensor:
        """One block for the rows that run it; ``running`` None means all, ``skipping`` None means none."""
        if skipping is not None:
            self.skip(index, hidden, skipping)
        if running is None:
            return self.block(index, hidden)
        if not len(running):
            return hidden
        with mark(GATHER):
            part = hidden[running.index]
        part = self.block(index, part, running)
        with mark(GATHER):
            return hidden.index_copy(0, running.index, part)

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

    def block(
        self,
        index: int,
        hidden: Tensor,
        rows: Rows | None = None,
        columns: slice | None = None,
        written: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Run one block of the backbone on all sequences, or on a sub-batch.

        Args:
            index: the block.
            hidden: (n, S, H).
            rows, columns: which sequences and tokens of the pass these are; None means all.
            written: boolean (B, 1, S, 1), the tokens whose K/V are left, those of the others being zero; None means all.
            present: boolean (B, S), the tokens whose K/V may be seen, where that is not for the cache to know.

        Returns:
            (n, S, H).
        """
        cache, arguments = self.cache, self._arguments(index, rows, columns, present)
        if cache is None:
            return self._uncached(index, hidden, arguments, written)[0]
        cache.rows, cache.offset, cache.written = rows, columns.start if columns is not None else 0, written
        try:
            return self._caching(index)(hidden, past_key_values=cache, use_cache=True, **arguments)
        finally:
            cache.rows, cache.offset, cache.written = None, 0, None

    def _arguments(
        self, index: int, rows: Rows | None = None, columns: slice | None = None, present: Tensor | None = None
    ) -> dict[str, Any]:
        """What a block is called with beside the states and the cache."""
        position_ids, rotary, mask = self._inputs_of(index, rows, columns)
        return {
            "attention_mask": mask if present is None else self._present_mask(present),
            "position_ids": position_ids,
            "position_embeddings": rotary,
            **({"rows": rows} if self.in_place else {}),
        }

    def _caching(self, index: int) -> Block:
        """The block for a pass with a cache, which a block that checkpoints itself would drop."""
        if self.in_place:
            if not self.routing.readers:
                self.routing.readers.extend(map(reading_rows, self.decoder.layers))
            return self.routing.readers[index]
        return _unchecked(self.decoder.layers[index])

    def _uncached(
        self,
        index: int,
        hidden: Tensor,
        arguments: dict[str, Any],
        written: Tensor | None = None,
        hands_out: bool = False,
    ) -> tuple[Tensor, ...]:
        """Run one block without a cache: its output, and if it ``hands_out`` them its keys and values, with gradients.

        A block that checkpoints its forward pass drops its cache argument, and with it what `Tap` has to know. So the
        engine checkpoints block and tap together: what is computed again in the backward pass is the same function.
        """
        layer = self.decoder.layers[index]
        run = partial(_tapped, _unchecked(layer), arguments, written, hands_out)
        if layer.training and layer.gradient_checkpointing and torch.is_grad_enabled():
            outputs: tuple[Tensor, ...] = layer._gradient_checkpointing_func(run, hidden)
            return outputs
        return run(hidden)

    def skip(self, index: int, hidden: Tensor, rows: Rows) -> None:
        """A block that these rows skip: the state passes by; under ``project`` it leaves its K/V."""
        if self.cache is not None and self.kv == "project":
            with mark(GATHER):
                part = hidden[rows.index]
            self._project(index, part, rows)

    def _project(self, index: int, hidden: Tensor, rows: Rows | None, columns: slice | None = None) -> None:
        """Write the K/V of a skipped block for the states (n, S, H) of these rows (policy ``project`` only)."""
        cache = self.cache
        if cache is None or self.kv != "project":
            return
        _, rotary, _ = self._inputs_of(index, rows, columns)
        layer = self.decoder.layers[index]
        with mark(CACHE):  # keys and values for later steps are all that this pass gets out of the block
            keys, values = project(layer.self_attn, layer.input_layernorm(hidden), *rotary)
        cache.rows, cache.offset = rows, columns.start if columns is not None else 0
        cache.blocks[index].update(keys, values)
        cache.rows, cache.offset = None, 0

    # ---- what a block is given ---------------------------------------------------------------------------------------

    def _inputs_of(self, index: int, rows: Rows | None, columns: slice | None) -> tuple[Any, Any, Any]:
        """Positions, rotary embedding and attention mask of a sub-batch; cut out once for all blocks that share it."""
        key = id(rows)
        if key not in self._inputs:
            cut = partial(_take, rows=rows, columns=columns)
            self._inputs[key] = (
                cut(self.position_ids),
                (cut(self.rotary[0]), cut(self.rotary[1])),
                self._shared_mask(rows, columns),
            )
        position_ids, rotary, mask = self._inputs[key]
        if self._leaves_out(index):
            assert self.cache is not None
            assert self.cache.present is not None
            mask = self._present_mask(self.cache.present[index, :, : self.past + self.new])
        return position_ids, rotary, mask

    def _shared_mask(self, rows: Rows | None, columns: slice | None) -> Any:
        """The attention mask of blocks that miss nothing: what `attend_rows` or Hugging Face's attention expects."""
        if self.in_place:
            return self._allowed
        if rows is None or self.causal is None:
            return self.causal
        mask = self.causal if self.causal.shape[0] == 1 else self.causal[rows.index]
        if columns is None or columns == slice(0, self.new):
            return mask
        if len(rows) == 1 and self.decoder.config._attn_implementation == "sdpa":
            return None  # one prompt cut to its own tokens has no padding: attention takes its causal shortcut
        return mask[:, :, columns, columns]

    def _leaves_out(self, index: int) -> bool:
        """Whether attention in this block must leave positions out (policy ``mask`` only)."""
        cache = self.cache
        return cache is not None and self.past > 0 and not cache.complete[index] and self.kv == "mask"

    @cached_property
    def _allowed(self) -> Tensor | None:
        """Boolean (B or 1, 1, S, T): what each new token may see, were nothing missing; None means everything."""
        total = self.past + self.new
        allowed = None
        if self.new > 1:
            square = torch.ones(self.new, total, dtype=torch.bool, device=self.position_ids.device)
            allowed = square.tril(self.past)[None, None]
        if self.attention_mask is not None:
            real = self.attention_mask[:, None, None, :total].bool()
            allowed = real if allowed is None else allowed & real
        return allowed

    def _present_mask(self, present: Tensor) -> Tensor:
        """`_allowed` without the positions whose K/V a block lacks; in the form that the attention in use expects.

        Args:
            present: boolean (B, T), the positions whose K/V it has.
        """
        mask = present[:, None, None]
        mask = (mask if self._allowed is None else mask & self._allowed).expand(-1, -1, self.new, -1).clone()
        # A padding token may have nothing to see; letting it see itself keeps its (unused) output finite.
        own = torch.arange(self.new, device=mask.device)
        mask[:, :, own, self.past + own] = True
        implementation = self.decoder.config._attn_implementation
        if self.in_place or implementation == "sdpa":
            return mask
        if implementation == "eager":
            return torch.zeros_like(mask, dtype=self.rotary[0].dtype).masked_fill(
                ~mask, torch.finfo(self.rotary[0].dtype).min
            )
        raise UserError(f"kv: policy mask needs attention sdpa or eager, not {implementation}")

    # ---- gated policies: the route grows block by block --------------------------------------------------------------

    def _by_gate(self, hidden: Tensor) -> Tensor:
        """The prefill of a gated policy: what enters a block says which sequences run it.

        The host has to know before it can go on, so it asks the device once per gate. All tokens of a sequence share its
        route, which reads the prompt alone: a pass over prompt and answer routes as prefill and decode steps do, and the
        causal form is this one.
        """
        policy, state = self.routing.policy, self.state
        mask, batch = self._prompt_of_gates(hidden), len(hidden)
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

    def _prompt_of_gates(self, hidden: Tensor) -> Tensor | None:
        """(B, S) boolean: the tokens that gates read; None means all."""
        mask = self._readable(self.routing.context_mask)
        if self.routing.form == "sequence":
            return mask
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return mask & self._prompt(mask)

    def _note(self, route: Tensor) -> None:
        """Add the route (B, L) of a pass to the trace; the causal form notes it for every token."""
        if self.routing.form == "causal":
            self.routing.trace.add_each(route.unsqueeze(1).expand(-1, self.new, -1))
        else:
            self.routing.trace.add(route, self.new)

    def _weighted(self, hidden: Tensor) -> Tensor:
        """Training form of a gated policy: ``h + p * F(h)``, token by token; every block is computed."""
        policy, state = self.routing.policy, self.state
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

    # ---- training ----------------------------------------------------------------------------------------------------

    def _gated(self, hidden: Tensor, work: Plan) -> Tensor:
        """Training form of ``h + M * F(h)``: exact forward pass, a gradient for every gate (paper sec. 4.2.3).

        Sequences that run the block get its output; the others keep their state, and the block is still evaluated for
        them, without a graph, because ``dL/dM = <dL/dh, F(h)>`` needs F. What the gate multiplies is detached: with M
        equal to 0 or 1 the backbone's own gradient is that of the hard path.
        """
        gates = self.routing.gates
        assert gates is not None
        for index in range(self.routing.policy.source_block, len(self.decoder.layers)):
            running, skipping = work.running[index], work.skipping[index]
            gate = _slope(gates[:, index].view(-1, 1, 1), hidden)
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

    # ---- one route per token -----------------------------------------------------------------------------------------

    def _by_token(self, hidden: Tensor, written: KeysValues | None) -> Tensor:
        """The parallel form of decoding: each token has its own route, chosen from what came before it.

        A block that any token runs is computed for all of them and kept where it runs; its keys and values are those of
        the tokens that ran it, and for the others what the K/V policy says. One pass gives what as many decode steps
        would have given, at the price of computing what most of them skip.
        """
        routing = self.routing
        route, gates = self._routes_of_tokens(written, len(hidden)), routing.gates
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
                kept = kept + _slope(gates[:, :, index].unsqueeze(-1), hidden) * (out - hidden).detach()
            hidden = self._keep(kept)
        return hidden

    def _token_block(self, index: int, hidden: Tensor, runs: Tensor) -> Tensor:
        """One block for all tokens, of which those in ``runs`` (B, S) leave their keys and values."""
        written = runs[:, None, :, None] if self.kv == "zero" else None
        present = runs if self.kv == "mask" and self.past == 0 else None
        return self.block(index, hidden, written=written, present=present)

    def _routes_of_tokens(self, written: KeysValues | None, batch: int) -> Tensor:
        """The routes (B, S, L); in training also the gates."""
        routing, state = self.routing, self.state
        keys, values = self._source_states(written)
        mask = self._readable()
        if mask is None:
            mask = torch.ones(batch, self.new, dtype=torch.bool, device=keys.device)
        prompt = self._prompt(mask)
        with mark(DECISION):
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

    def _prompt(self, mask: Tensor) -> Tensor:
        """(B, S) boolean: the leading tokens that a prefill would have taken in together."""
        context = self.routing.context_mask
        if self.past:
            return torch.zeros_like(mask)
        if context is not None:
            return context.bool()
        return mask & (mask.cumsum(1) == 1)


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


def _slope(gate: Tensor, like: Tensor) -> Tensor:
    """A factor that is exactly zero and has the gate's gradient."""
    gate = gate.to(like.dtype)
    return gate - gate.detach()


def _unchecked(layer: Block) -> Block:
    """The block, or where it checkpoints its forward pass a twin that leaves that to its caller."""
    checkpoints = layer.training and layer.gradient_checkpointing
    return twin(layer, gradient_checkpointing=False) if checkpoints else layer


def _tapped(
    layer: Block, arguments: dict[str, Any], written: Tensor | None, hands_out: bool, hidden: Tensor
) -> tuple[Tensor, ...]:
    """A block's output without a cache, and if it ``hands_out`` them its keys and values."""
    tap = Tap(written)
    out = layer(hidden, past_key_values=tap, use_cache=False, **arguments)
    if not hands_out:
        return (out,)
    if tap.keys is None or tap.values is None:
        raise RuntimeError("the source block wrote no keys and values")
    return out, tap.keys, tap.values


def _take(tensor: Tensor, rows: Rows | None, columns: slice | None) -> Tensor:
    """Rows and columns of (B or 1, S, ...), where a first dimension of 1 is shared by all rows."""
    if rows is not None and tensor.shape[0] > 1:
        tensor = tensor[rows.index]
    return tensor if columns is None else tensor[:, columns]
