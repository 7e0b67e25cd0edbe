"""Batches of different budgets and routes: each sequence as if alone, in both executions, without copies of the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, tiny, with_router
from torch.utils._python_dispatch import TorchDispatchMode

from buddy.policies.static import StaticPolicy
from buddy.routing.attention import attend_rows
from buddy.routing.engine import Routing, routed
from buddy.routing.schedule import Rows, grouping_pays, plan

KV = ("zero", "mask", "project")
CPU = torch.device("cpu")


def batch_of(lengths, seed):
    """Prompts of these lengths, padded left to the longest."""
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(seed + 1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : longest - length], mask[row, : longest - length] = 0, 0
    return ids, mask


@torch.no_grad()
@settings(deadline=None, max_examples=40)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    kv=st.sampled_from(KV),
    source=st.integers(1, 2),
    sequences=st.lists(st.tuples(st.integers(1, 12), st.integers(4, 10)), min_size=2, max_size=5),
    decode=st.sampled_from(("recompute", "reuse", 3)),
    seed=st.integers(0, 10_000),
)
def test_every_sequence_of_a_batch_is_as_if_alone(architecture, kv, source, sequences, decode, seed):
    backbone = tiny(architecture, blocks=10, seed=seed % 7)
    model = with_router(backbone, source_block=source, kv=kv, seed=seed)
    lengths, executed = zip(*sequences, strict=True)
    ids, mask = batch_of(lengths, seed)
    budgets = [k / 10 for k in executed]
    options = {"max_new_tokens": 6, "do_sample": False, "decode": decode, "output_logits": True}
    options["return_dict_in_generate"] = True
    together = model.generate(ids, mask, budget=budgets, **options)
    paths = [model.trace.paths(row) for row in range(len(lengths))]
    assert model.trace.executed().tolist() == [list(executed)] * 6
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], budget=budgets[row], **options)
        assert model.trace.paths(0) == paths[row]
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], atol=2e-4, rtol=2e-4)
        assert torch.equal(alone.sequences[0, length:], together.sequences[row, ids.shape[1] :])


@torch.no_grad()
@settings(deadline=None, max_examples=40)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    kv=st.sampled_from(KV),
    attention=st.sampled_from(("sdpa", "eager")),
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    side=st.sampled_from(("left", "right")),
    seed=st.integers(0, 10_000),
)
def test_by_path_and_by_block_compute_the_same(architecture, kv, attention, lengths, side, seed):
    backbone = tiny(architecture, blocks=9, seed=seed % 7)
    backbone.config._attn_implementation = attention
    model = with_router(backbone, kv=kv, seed=seed)
    ids, mask = batch_of(lengths, seed)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    generator = torch.Generator().manual_seed(seed)
    budgets = (torch.randint(3, 10, (len(lengths),), generator=generator) / 9).tolist()
    found = []
    for grouping in (True, False):
        cache = model.new_cache(3)
        logits = []
        with routed(backbone, Routing(model.policy, budgets, grouping=grouping)):
            logits.append(backbone(ids, mask, past_key_values=cache, use_cache=True).logits[mask.bool()])
            token, longer = ids[:, -1:], mask
            for _ in range(3 if side == "left" else 0):
                longer = torch.cat([longer, torch.ones_like(token)], 1)
                logits.append(backbone(token, longer, past_key_values=cache, use_cache=True).logits.flatten(0, 1))
                token = (token * 7 + 1) % VOCABULARY
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=6), st.booleans())
def test_a_plan_holds_every_row_of_every_block_once(route, grouping):
    batch = len(route)
    work = plan(route, 0, CPU, [(0, 3)] * batch, grouping)

    def listed(rows: Rows | None, everything: list[int]) -> list[int]:
        if rows is None:
            return everything
        spread = [row for first, end in rows.runs for row in range(first, end)]
        assert rows.index.tolist() == spread
        return spread

    for block in range(6):
        assert listed(work.running[block], list(range(batch))) == [r for r in range(batch) if route[r][block]]
        assert listed(work.skipping[block], []) == [r for r in range(batch) if not route[r][block]]
    if work.groups is not None:
        seen = [(row, group.path) for group in work.groups for row in listed(group.rows, [])]
        assert sorted(seen) == [(r, tuple(b for b in range(6) if route[r][b])) for r in range(batch)]
    assert (work.groups is not None) == (grouping and len({tuple(row) for row in route}) > 1)


def test_grouping_pays_for_prompts_of_many_lengths_and_not_for_decoding():
    paths = {(1, 2, 3, 5): [0, 2], (1, 4, 5): [1, 3]}
    assert not grouping_pays(paths, [(0, 1)] * 4, "cpu")
    assert grouping_pays(paths, [(300, 400), (0, 400), (350, 400), (0, 400)], "cpu")


@settings(deadline=None, max_examples=60)
@given(
    chosen=st.sets(st.integers(0, 7), min_size=1),
    new=st.integers(1, 3),
    groups=st.sampled_from((1, 2, 4)),
    length=st.sampled_from((5, 400)),
    masked=st.sampled_from(("none", "shared", "own")),
    seed=st.integers(0, 999),
)
def test_attention_of_some_rows_is_softmax_attention(chosen, new, groups, length, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    index = sorted(chosen)
    rows = plan([[row in chosen] for row in range(8)], 0, CPU).running[0]
    queries = torch.randn(len(index), 2 * groups, new, 4, generator=generator)
    keys, values = torch.randn(2, 8, 2, length, 4, generator=generator).unbind(0)
    mask = None
    if masked != "none":
        mask = torch.rand(1 if masked == "shared" else 8, 1, new, length, generator=generator) > 0.5
        mask[..., 0] = True
    found = attend_rows(queries, keys, values, mask, 0.7, rows)
    own_keys, own_values = (x[index].repeat_interleave(groups, 1) for x in (keys, values))
    weights = 0.7 * queries @ own_keys.transpose(-1, -2)
    if mask is not None:
        weights = weights.masked_fill(~mask.expand(8, -1, -1, -1)[index], -torch.inf)
    torch.testing.assert_close(found, weights.softmax(-1) @ own_values, atol=1e-5, rtol=1e-4)


class LargestResult(TorchDispatchMode):
    """Remembers the most elements that any operation freshly allocated."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        inputs = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.most = max(self.most, tensor.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("routes", ["scattered", "uniform"])
def test_a_decode_step_copies_no_cache(kv, routes):
    """No result of a step is as large as one sequence's keys in one block."""
    backbone = tiny("llama", blocks=8)
    model = with_router(backbone, kv=kv)
    if routes == "uniform":
        model.policy = StaticPolicy(8, [2, 4])
    ids, mask = batch_of([200] * 6, 0)
    budget = 6 / 8 if routes == "uniform" else [4 / 8, 5 / 8, 1.0, 6 / 8, 4 / 8, 7 / 8]
    cache = model.new_cache(300)
    model(ids, mask, budget=budget, past_key_values=cache)
    if routes == "scattered":
        assert len({tuple(path) for row in range(6) for path in model.trace.paths(row)}) > 2
    longer = torch.cat([mask, mask[:, :1]], 1)
    longer[:, :3] = 0  # padding, so that attention needs a mask
    with LargestResult() as watch:
        model(ids[:, :1], longer, budget=budget, past_key_values=cache)
    keys = cache.blocks[0].keys
    assert keys.shape[2] == 300
    assert watch.most < keys[0, :, :201].numel()


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_a_long_generation_neither_drifts_nor_moves_its_buffers(kv):
    backbone = tiny("llama", blocks=5)
    backbone.config.max_position_embeddings = 4096
    model = with_router(backbone, kv=kv)
    ids, _ = batch_of([9], 3)
    cache = model.new_cache(1200)
    model(ids, budget=3 / 5, past_key_values=cache)
    buffers = [block.keys.data_ptr() if block.is_initialized else None for block in cache.blocks]
    token = ids[:, -1:]
    for step in range(1100):
        model(token, budget=3 / 5, past_key_values=cache)
        token = (token * 5 + step) % VOCABULARY
    for block, before in zip(cache.blocks, buffers, strict=True):
        assert before is None or before == block.keys.data_ptr()
    states = cache.blocks[0]
    everything = states.values[:, :, : cache.length].transpose(1, 2).flatten(2).double()
    decision = model.policy.decision.double()
    scores = decision.up(torch.nn.functional.silu(decision.down(everything))).mean(1)
    running = cache.routing.policy_state.pooled.mean().float()
    assert cache.length == 1109
    torch.testing.assert_close(running, scores.float(), atol=1e-3, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_decoding_with_a_full_route_is_one_pass_without_a_cache(backbone, kv):
    model = with_router(backbone, kv=kv)
    ids, mask = batch_of([9, 5], 1)
    cache = model.new_cache(2)
    pieces = [model(ids[:, :4], mask[:, :4], budget=1.0, past_key_values=cache).logits]
    for end in range(5, 10):
        pieces.append(model(ids[:, end - 1 : end], mask[:, :end], budget=1.0, past_key_values=cache).logits)
    expected = backbone(ids, mask).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], expected[real], atol=1e-4, rtol=1e-4)
