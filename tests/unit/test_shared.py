"""Routes chosen for a batch: against every possible choice on small cases, by hooks in the engine, and in captured steps."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, prompts, tiny, with_router
from tape import Tape, check
from torch.utils._python_dispatch import TorchDispatchMode

from buddy.errors import UserError
from buddy.policies.first import FirstPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.graphs.decoders import Decoders
from buddy.routing.kv import RoutedCache
from buddy.routing.model import RoutedModel
from buddy.routing.policy import Choices
from buddy.routing.ranking import first_places, keep_top
from buddy.routing.shared import Sharing, nested, pooled

KV = ("zero", "mask", "project")
FIXTURES = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def choices(keep, candidates, seed=0, agreement=0.0, ties=False):
    """Random scores of as many sequences as ``keep`` has, which agree as far as they are told to."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(keep), candidates)
    scores = torch.randn(*shape, generator=generator, dtype=torch.float64)
    scores = scores + agreement * torch.randn(1, candidates, generator=generator, dtype=torch.float64)
    if ties:
        scores = scores.round()
    return Choices(scores, first_places(torch.tensor(keep), candidates), 1, 1)


def alone(found):
    return keep_top(found.scores, found.first)


def worth(found, route):
    return float(found.scores[route].sum())


def floor(found):
    """What the sequences would have if each ran its worst blocks."""
    return worth(found, alone(found._replace(scores=-found.scores)))


def share(found, route, best):
    """How much of what there was to choose is there, in [0, 1]."""
    room = best - floor(found)
    return 1.0 if room < 1e-9 else (worth(found, route) - floor(found)) / room


def best_pool(found, size):
    """By trying all pools."""
    blocks = range(found.scores.shape[1])
    pools = (torch.tensor([block in pool for block in blocks]) for pool in combinations(blocks, size))
    return max(worth(found, alone(found._replace(scores=found.scores.masked_fill(~pool, -99)))) for pool in pools)


def best_family(found, keep):
    """By trying all chains of sets, one per budget."""
    sums = {level: found.scores[[k == level for k in keep]].sum(0) for level in sorted(set(keep))}

    def best(levels, taken):
        if not levels:
            return 0.0
        rest = [block for block in range(found.scores.shape[1]) if block not in taken]
        sets = ({*taken, *more} for more in combinations(rest, levels[0] - len(taken)))
        return max(float(sums[levels[0]][sorted(chosen)].sum()) + best(levels[1:], chosen) for chosen in sets)

    return best(list(sums), set())


# ---- the choice ------------------------------------------------------------------------------------------------------

budgets_of = st.lists(st.integers(0, 6), min_size=2, max_size=4)
scores_of = {"seed": st.integers(0, 9999), "agreement": st.sampled_from((0.0, 1.0, 3.0)), "ties": st.booleans()}


@settings(deadline=None, max_examples=60)
@given(keep=st.integers(0, 6), batch=st.integers(2, 5), **scores_of)
def test_one_set_for_equal_budgets_is_the_best_there_is(keep, batch, seed, agreement, ties):
    found = choices([keep] * batch, 6, seed, agreement, ties)
    route = nested(found, 1)
    assert len(route.unique(dim=0)) == 1
    assert route.sum(1).tolist() == [keep] * batch
    assert worth(found, route) == pytest.approx(best_family(found, [keep] * batch))


@settings(deadline=None, max_examples=60)
@given(keep=budgets_of, more_rounds=st.integers(0, 2), **scores_of)
def test_a_family_of_sets_is_nested_and_of_exact_sizes(keep, more_rounds, seed, agreement, ties):
    found = choices(keep, 6, seed, agreement, ties)
    route = nested(found, len(set(keep)) + more_rounds)
    assert route.sum(1).tolist() == keep
    for one in range(len(keep)):
        for other in range(len(keep)):
            if keep[one] <= keep[other]:
                assert not (route[one] & ~route[other]).any()
    assert share(found, route, best_family(found, keep)) > 0.7


@settings(deadline=None, max_examples=60)
@given(keep=budgets_of, slack=st.integers(1, 4), more_rounds=st.integers(0, 2), **scores_of)
def test_a_pool_keeps_the_bound_and_each_sequence_takes_its_best_of_it(keep, slack, more_rounds, seed, agreement, ties):
    found = choices(keep, 7, seed, agreement, ties)
    route = pooled(found, slack, max(keep) + slack - min(keep) + more_rounds)
    called = route.any(0)
    assert route.sum(1).tolist() == keep
    assert called.sum() <= max(keep) + slack
    within = found._replace(scores=found.scores.masked_fill(~called, -99))
    assert worth(found, route) == pytest.approx(worth(found, alone(within)))
    best = best_pool(found, min(max(keep) + slack, 7))
    assert share(found, route, best) > 0.9
    if alone(found).any(0).sum() <= max(keep) + slack:  # the bound forbids nothing
        assert torch.equal(route, alone(found))


def test_on_average_hardly_anything_is_lost():
    """What the tests above bound from below, over many cases; both searches are far better than their guarantees."""
    families, pools = [], []
    for seed in range(150):
        found = choices([1, 2, 4, 4], 7, seed, agreement=seed % 3)
        families.append(share(found, nested(found, 3), best_family(found, [1, 2, 4, 4])))
        found = choices([3] * 6, 8, seed, agreement=seed % 3)
        pools.append(share(found, pooled(found, 2, 2), best_pool(found, 5)))
    assert sum(families) / 150 > 0.985
    assert sum(pools) / 150 > 0.998


@settings(deadline=None, max_examples=40)
@given(keep=st.integers(1, 6), batch=st.integers(2, 6), **scores_of)
def test_more_slack_is_never_worse(keep, batch, seed, agreement, ties):
    found = choices([keep] * batch, 9, seed, agreement, ties)
    routes = [nested(found, 1), *(pooled(found, slack, slack) for slack in range(1, 9 - keep + 1)), alone(found)]
    values = [worth(found, route) for route in routes]
    assert all(low <= high + 1e-9 for low, high in pairwise(values))
    assert values[-2] == pytest.approx(values[-1])


def test_what_is_lost_by_a_greedy_step_is_not_lost_twice():
    """Both sequences like block 0 second best; alone each takes another. One set takes the compromise, two do not."""
    found = Choices(torch.tensor([[9.0, 10.0, 0.0], [9.0, 0.0, 10.0]]), first_places(torch.tensor([1, 1]), 3), 1, 1)
    assert nested(found, 1).tolist() == [[True, False, False]] * 2
    assert pooled(found, 1, 1).tolist() == [[False, True, False], [False, False, True]]
    # The deeper sequence gets block 0 anyway: it does not take the only place of the shallower one.
    scores = torch.tensor([[0.0, 9.0, 0.0], [10.0, 0.0, 0.0]])
    found = Choices(scores, first_places(torch.tensor([1, 2]), 3), 1, 1)
    assert nested(found, 2).tolist() == [[False, True, False], [True, True, False]]


def test_what_a_slack_means():
    policy = with_router(tiny()).policy
    assert Sharing.of(None, policy, 0.5, 4) is None
    assert Sharing.of(0, policy, 4 / 7, 1) is None
    assert Sharing.of(2, policy, [4 / 7, 5 / 7], 2) is None  # seven blocks may be called: nothing is forbidden
    assert Sharing.of(0, policy, [4 / 7, 1.0], 2) == Sharing(0, 2)
    assert Sharing.of(1, policy, [3 / 7, 5 / 7], 2) == Sharing(1, 3)
    assert Sharing.of(0, policy, "auto", 3) == Sharing(0, 3)
    assert Sharing.of(2, policy, None, 3) == Sharing(2, 5)
    assert Sharing.of(0, StaticPolicy(7, [2, 4]), 5 / 7, 3) is None
    for slack in (-1, 1.5, True, "all"):
        with pytest.raises(UserError, match=f"slack: {slack!r}"):
            Sharing.of(slack, policy, 0.5, 4)
    with pytest.raises(UserError, match="FirstPolicy does not score single blocks"):
        Sharing.of(0, FirstPolicy(7, 32, {2: 0.5}), 5 / 7, 3)


# ---- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def called(deep_backbone):
    """Blocks called and rows run since it was cleared, by hooks on the backbone's own modules."""
    rows = []
    for index, layer in enumerate(deep_backbone.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, index=index: rows.append((index, len(inputs[0]))))
    return rows


BATCH = {"max_new_tokens": 8, "do_sample": False}


def blocks_per_step(rows, steps):
    """(blocks called, rows run) at each step: every step begins with block 0."""
    found = []
    for index, count in rows:
        if index == 0:
            found.append((set(), []))
        found[-1][0].add(index)
        found[-1][1].append(count)
    assert len(found) == steps
    return [(len(blocks), sum(counts)) for blocks, counts in found]


@pytest.mark.parametrize("slack", [0, 1, 2, None])
@pytest.mark.parametrize("executed", [(6, 6, 6, 6), (4, 6, 6, 8)])
def test_hooks_count_no_more_blocks_than_the_bound_and_exactly_each_budget(deep_backbone, called, slack, executed):
    model = with_router(deep_backbone)
    blocks = model.blocks
    ids, mask = prompts(batch=4)
    called.clear()
    model.generate(ids, mask, budget=[count / blocks for count in executed], slack=slack, **BATCH)
    counted = blocks_per_step(called, 8)
    assert [run for _, run in counted] == [sum(executed)] * 8
    assert model.trace.executed().tolist() == [list(executed)] * 8
    assert model.trace.called().tolist() == [blocks for blocks, _ in counted]
    bound = max(executed) + slack if slack is not None else blocks
    assert max(blocks for blocks, _ in counted) <= bound
    if slack is None and len(set(executed)) == 1:
        assert max(blocks for blocks, _ in counted) > max(executed) + 1, "they agree by themselves: nothing is shown"
    if slack == 0:
        assert model.trace.paths_at_once().tolist() == [len(set(executed))] * 8
        for step in model.trace.steps:
            for one in range(4):
                assert not any(
                    (step[one] & ~step[other]).any() for other in range(4) if executed[one] <= executed[other]
                )


@pytest.mark.parametrize("slack", [0, 2])
def test_alone_a_sequence_runs_what_it_runs_without(deep_backbone, slack):
    model = with_router(deep_backbone)
    ids, _ = prompts(batch=1)
    free = model.generate(ids, budget=0.5, **BATCH)
    routes = model.trace.steps
    assert torch.equal(model.generate(ids, budget=0.5, slack=slack, **BATCH), free)
    assert all(torch.equal(*pair) for pair in zip(model.trace.steps, routes, strict=True))


def test_routes_are_chosen_anew_at_every_step_by_the_scores_of_all(deep_backbone):
    """Step by step the same as choosing from the scores of the sequences alone in their own caches."""
    model = with_router(deep_backbone)
    ids = prompts(batch=1)[0].expand(3, -1)  # the router is balanced on it: what follows tips it
    caches, batch = [model.new_cache() for _ in range(3)], model.new_cache()
    paths = set()
    for step in range(10):
        new = ids if step == 0 else torch.tensor([[1], [12], [23]]) + 7 * step
        with torch.no_grad():
            model(new, budget=0.5, slack=0, past_key_values=batch)
            route = model.trace.steps[-1]
            for row, cache in enumerate(caches):  # the source block is the first: what it writes depends on no route
                model(new[row : row + 1], budget=0.5, past_key_values=cache)
        total = sum(model.policy.scores(cache.routing.policy_state)[0] for cache in caches)
        best = total.topk(model.blocks // 2 - 2).indices + 1
        assert sorted(best.tolist()) == route[0, 1:-1].nonzero().flatten().add(1).tolist()
        assert (route == route[0]).all()
        paths.add(tuple(route[0].tolist()))
    assert len(paths) > 2


@torch.no_grad()
@pytest.mark.parametrize("slack", [0, 1])
def test_one_pass_over_whole_sequences_takes_the_routes_of_decoding(deep_backbone, slack):
    model = with_router(deep_backbone, balanced=1)  # an exact tie would be broken by rounding
    ids, _ = prompts(batch=3, length=15)
    budgets, prompt = [0.5, 0.5, 0.75], torch.arange(15).expand(3, -1) < 6
    whole = model(ids, budget=budgets, slack=slack, routing="causal", context_mask=prompt).logits
    routes = torch.stack(model.trace.steps)
    cache = model.new_cache()
    for step, end in enumerate(range(6, 16)):
        new = ids[:, 0 if step == 0 else end - 1 : end]
        logits = model(new, budget=budgets, slack=slack, past_key_values=cache).logits
        assert torch.equal(model.trace.steps[-1], routes[end - 1])
        torch.testing.assert_close(logits[:, -1], whole[:, end - 1], atol=1e-4, rtol=1e-4)
    # A sequence that has ended has no say: the others choose as if it had never been there.
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    model(ids, mask, budget=0.5, slack=slack, routing="causal", context_mask=prompt)
    late = torch.stack(model.trace.steps)[9:, [0, 2]]
    model(ids[[0, 2]], budget=0.5, slack=slack, routing="causal", context_mask=prompt[[0, 2]])
    assert torch.equal(late, torch.stack(model.trace.steps)[9:])


def test_reuse_keeps_what_the_batch_chose_at_its_prompts(deep_backbone):
    model = with_router(deep_backbone)
    ids, mask = prompts()
    model.generate(ids, mask, budget=[0.5, 0.75, 0.5], slack=0, decode="reuse", **BATCH)
    assert len({step.numpy().tobytes() for step in model.trace.steps}) == 1
    model.generate(ids, mask, budget=[0.5, 0.75, 0.5], slack=0, decode=4, **BATCH)
    assert len({step.numpy().tobytes() for step in model.trace.steps}) == 2


def test_a_cache_keeps_the_slack_that_it_was_started_with(deep_backbone):
    model = with_router(deep_backbone)
    ids, mask = prompts()
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, mask, budget=0.5, slack=0, past_key_values=cache)
        model(ids[:, :1], torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)
    assert model.trace.paths_at_once().tolist() == [1]


def test_wrong_requests_are_refused_before_anything_runs(backbone):
    model = with_router(backbone)
    ids, mask = prompts()
    with pytest.raises(UserError, match="slack: -2"):
        model.generate(ids, mask, budget=0.6, slack=-2)
    static = RoutedModel(backbone, StaticPolicy(7, [2, 4])).eval()
    free = static.generate(ids, mask, budget=5 / 7, **BATCH)
    assert torch.equal(static.generate(ids, mask, budget=5 / 7, slack=0, **BATCH), free)


# ---- in captured steps -----------------------------------------------------------------------------------------------


@torch.no_grad()
@settings(max_examples=12, **FIXTURES)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    kv=st.sampled_from(KV),
    slack=st.sampled_from((0, 1, 2)),
    how=st.sampled_from(("recompute", 3)),
    executed=st.lists(st.integers(3, 7), min_size=2, max_size=4),
    late=st.booleans(),
    seed=st.integers(0, 99),
)
def test_captured_steps_take_the_routes_of_the_eager_engine(architecture, kv, slack, how, executed, late, seed):
    model = with_router(tiny(architecture, blocks=9, seed=seed % 3), kv=kv, seed=seed)
    ids = torch.randint(1, VOCABULARY, (len(executed), 7), generator=torch.Generator().manual_seed(seed))
    budgets, pool = [count / 9 for count in executed], Decoders(lambda _: Tape(late), 8)
    for bound in (slack, None, slack):  # one decoder, whose graphs know both ways to choose
        captured, eager = pool.lease(model, 32, len(executed)), RoutedCache(9, kv)
        for step in range(12):
            new = ids if step == 0 else torch.full((len(executed), 1), (5 * step + seed) % VOCABULARY)
            call = {"budget": budgets, "slack": bound, "decode": how}
            logits, routes = [], []
            for cache in (captured, eager):
                logits.append(model(new, past_key_values=cache, **call).logits[:, -1])
                routes.append(model.trace.steps[-1])
            assert torch.equal(*routes)
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
        graphs = captured.graph.graphs
        assert captured.graph is not None
        del captured
    assert graphs == pool._all[0][1].graphs


@torch.no_grad()
def test_a_step_waits_for_the_device_once():
    model = with_router(tiny())
    cache = Decoders(lambda _: Tape(), 8).lease(model, 32, 3)
    ids, _ = prompts()
    for step in range(13):
        model(ids if step == 0 else ids[:, :1], budget=[4 / 7, 5 / 7, 4 / 7], slack=0, past_key_values=cache)
    assert cache.graph._recorder.waits == 12


class OnlyCapturable(TorchDispatchMode):
    """Fails on what a CUDA graph cannot hold, and counts kernels."""

    kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        check(func, args)
        self.kernels += not any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        return func(*args, **(kwargs or {}))


def test_the_choice_asks_the_device_for_nothing_and_takes_few_kernels():
    """On tensors that have no values."""
    with torch.device("meta"):
        found = Choices(torch.zeros(16, 30), torch.zeros(16, 30, dtype=torch.bool), 1, 1)
    for choose, most in (
        (lambda: nested(found, 1), 35),
        (lambda: nested(found, 4), 90),
        (lambda: pooled(found, 4, 4), 130),
    ):
        with OnlyCapturable() as counted:
            choose()
        assert most // 2 < counted.kernels <= most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("kv", KV)
def test_on_a_gpu_captured_steps_take_the_routes_of_the_eager_engine(kv, slack):
    model = with_router(tiny(blocks=12), kv=kv).to("cuda")
    ids, mask = (tensor.cuda() for tensor in prompts())
    call = {"budget": [0.5, 0.5, 0.75], "slack": slack, "max_new_tokens": 48, "do_sample": False}
    eager = model.generate(ids, mask, engine="eager", **call)
    routes = model.trace.steps
    assert torch.equal(model.generate(ids, mask, engine="graph", **call), eager)
    assert all(torch.equal(*pair) for pair in zip(model.trace.steps, routes, strict=True))
    cache = model.new_cache(64, engine="graph", batch=3)
    for new in (ids, ids[:, :1], ids[:, :1]):
        model(new, budget=0.5, slack=slack, past_key_values=cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # the host waits for one event, and for no operation
    try:
        for _ in range(6):
            model(ids[:, :1], budget=0.5, slack=slack, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.graph is not None
