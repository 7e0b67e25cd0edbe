"""The tuned recipe: measured losses of routes, the search for orders, the choice among them, and what is kept."""

import copy
import itertools
import json
import math

import pytest
import torch
from models import tiny
from torch.nn.functional import cross_entropy

from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.decision import DecisionModule
from buddy.routing import kv
from buddy.settings import Router, Training
from buddy.training import choosing, router
from buddy.training.orders import Search, route
from buddy.training.routes import Bundle, measure

BLOCKS = 7


@pytest.fixture
def frozen(backbone):
    return backbone.requires_grad_(False).eval()


def examples(count, seed=0, longest=9):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        prompt, response = (int(torch.randint(2, longest, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(1, 60, (prompt + response,), generator=generator).tolist()
        rows.append({"input_ids": ids, "prompt_length": prompt})
    return rows


def sliced(backbone, kept):
    """The Hugging Face model with these blocks alone."""
    small = copy.deepcopy(backbone)
    small.model.layers = torch.nn.ModuleList(small.model.layers[index] for index in kept)
    small.config.num_hidden_layers = len(kept)
    for index, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = index
    return small


def naive(backbone, row, kept, loss):
    """Loss of one response by the sliced model, alone in its batch."""
    ids, prompt = torch.tensor([row["input_ids"]]), row["prompt_length"]
    with torch.no_grad():
        logits = sliced(backbone, kept)(ids, use_cache=False).logits[0, prompt - 1 : -1]
        if loss == "ce":
            return cross_entropy(logits, ids[0, prompt:]).item()
        told = backbone(ids, use_cache=False).logits[0, prompt - 1 : -1].log_softmax(-1)
    return (told.exp() * (told - logits.log_softmax(-1))).sum(-1).mean().item()


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_losses_of_routes_are_those_of_sliced_models(frozen, loss):
    rows, generator = examples(5), torch.Generator().manual_seed(1)
    routes = torch.rand(5, 6, BLOCKS, generator=generator) > 0.4
    found = measure(frozen, rows, routes, loss, batch_size=3)
    for example, one in itertools.product(range(5), range(6)):
        kept = routes[example, one].nonzero().squeeze(1).tolist() or [0]
        if not routes[example, one].any():
            continue
        assert found[example, one] == pytest.approx(naive(frozen, rows[example], kept, loss), abs=2e-5)


def test_features_are_the_values_of_the_prompts_tokens(frozen):
    rows = examples(3)
    found = Bundle(frozen, rows).features(1, "value").split([row["prompt_length"] for row in rows])
    layer = frozen.model.layers[0]
    for row, tokens in zip(rows, found, strict=True):
        ids = torch.tensor(row["input_ids"][: row["prompt_length"]])
        expected = layer.self_attn.v_proj(layer.input_layernorm(frozen.model.embed_tokens(ids)))
        torch.testing.assert_close(tokens, expected)


def searched(backbone, rows):
    return Search(backbone, rows, range(1, BLOCKS - 1), "ce", 4)


def test_costs_are_means_over_examples_and_measured_once(frozen):
    rows = examples(5)
    search = searched(frozen, rows)
    (found,) = search.costs([{2, 4}])
    assert found == pytest.approx(sum(naive(frozen, row, [0, 1, 3, 5, 6], "ce") for row in rows) / 5, abs=2e-5)
    search._bundles = []
    assert search.costs([{4, 2}]) == [found]


@pytest.mark.parametrize("seed", range(3))
def test_a_climb_ends_where_no_exchange_helps(seed):
    backbone = tiny("llama", seed=seed).requires_grad_(False).eval()
    search = searched(backbone, examples(6, seed))
    pairs = [frozenset(pair) for pair in itertools.combinations(range(1, BLOCKS - 1), 2)]
    cost = dict(zip(pairs, search.costs(pairs), strict=True))
    for start in pairs:
        end = search.climb(start)
        assert cost[end] <= cost[start]
        # With five candidates every exchange is among those that are measured.
        assert all(cost[end] <= cost[pair] for pair in pairs if len(pair & end) == 1)


@pytest.mark.parametrize("seed", range(4))
def test_the_lazy_order_is_greedy_where_costs_only_rise(seed):
    search = Search.__new__(Search)
    generator = torch.Generator().manual_seed(seed)
    value = torch.rand(8, generator=generator).tolist()
    together = torch.rand(8, 8, generator=generator)
    asked = []

    def costs(sets):
        asked.extend(sets)
        return [
            sum(value[block] for block in each)
            + sum(together[i, j].item() for i, j in itertools.combinations(sorted(each), 2))
            for each in sets
        ]

    search.costs = costs
    greedy = []
    while len(greedy) < 8:
        left = [block for block in range(8) if block not in greedy]
        greedy.append(min(left, key=lambda block: costs([[*greedy, block]])[0]))
    asked.clear()
    assert search.order(range(8)) == greedy
    assert len(asked) <= 8 * 9 / 2 + 1


def test_what_is_predicted_tells_inputs_apart():
    generator = torch.Generator().manual_seed(0)
    tokens = [
        torch.randn(int(length), 6, generator=generator) for length in torch.randint(4, 12, (240,), generator=generator)
    ]
    kind = torch.arange(240) % 2
    for one, each in zip(kind, tokens, strict=True):
        each[0, 0] += 20.0 * one  # one token tells
    costs = torch.stack([kind.double(), 1.0 - kind, torch.full((240,), 0.6)], 1)
    costs = costs + 0.3 * torch.randn(240, 3, generator=generator)
    found = choosing.predicted(tokens, costs, 8, generator).argmin(1)
    assert (found == kind).double().mean() > 0.9


def test_noise_is_not_taken_for_a_choice():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(8, 16, generator=generator) for _ in range(60)]
    costs = torch.randn(60, 4, generator=generator) + torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert (choosing.predicted(tokens, costs.double(), 8, generator).argmin(1) == 0).double().mean() > 0.9


def test_folding_is_standardising():
    torch.manual_seed(0)
    module = DecisionModule(6, 4, 8)
    features = 0.01 * torch.randn(3, 5, 6) + 0.3
    mean, deviation = features.mean((0, 1)), features.std((0, 1))
    expected = module((features - mean) / deviation)
    module.fold(mean, deviation)
    torch.testing.assert_close(module(features), expected, atol=1e-5, rtol=1e-4)


def test_a_route_leaves_out_the_beginning_of_an_order():
    assert route([4, 1, 3], 2, 6).tolist() == [True, False, True, True, False, True]


# ---- the whole fit ------------------------------------------------------------------------------------------------------


def pairs(count):
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [(letters[n % 26] * 3 + letters[n % 7], letters[(n + 5) % 26] * 4) for n in range(count)]


def fitted(tmp_path=None, seed=0, **changed):
    backbone = tiny("llama")
    backbone.resize_token_embeddings(300)
    backbone.requires_grad_(False)
    torch.manual_seed(seed)
    policy = BuddyPolicy(BLOCKS, kv.width(backbone), prior=torch.linspace(-1, 1, 5))
    settings = Router(**{"examples": 40, "held_out": 12, "orders": 2, "search_examples": 6, "rounds": 2, **changed})
    found = router.fit(
        backbone, byte_tokenizer(), policy, pairs(60), settings, Training(max_length=32), [1, 3], tmp_path, seed
    )
    return backbone, policy, found


def test_the_state_that_is_kept_is_the_best_on_held_out_examples():
    _, _, found = fitted()
    assert {"start", "fixed prior", "fixed all"} < set(found.held_out)
    assert found.held_out[found.kept]["loss"] == min(each["loss"] for each in found.held_out.values())
    assert found.oracle >= found.gain
    assert all(sorted(set(order)) == sorted(order) and len(order) == 3 for order in found.orders.values())


def test_a_fixed_state_takes_the_orders_route_at_every_depth():
    backbone, _, found = fitted()
    for name, order in found.orders.items():
        expected = torch.stack([route(order, depth, BLOCKS) for depth in (1, 3)])
        rows = router.encode(byte_tokenizer(), pairs(60), 32)
        chosen = [rows[i] for i in torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()[:12]]
        losses = measure(backbone, chosen, expected.expand(12, -1, -1), "kl")
        assert found.held_out[f"fixed {name}"]["loss"] == pytest.approx(losses.mean().item(), abs=1e-6)
        assert found.held_out[f"fixed {name}"]["paths"] == 1


def test_the_same_seed_fits_the_same_and_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    _, first, facts = fitted(tmp_path)
    monkeypatch.setattr(router, "measure", lambda *_: math.nan)
    monkeypatch.setattr(router._Fitting, "_held_out", lambda self, *_: {"loss": 0.0, "paths": 1.0})
    monkeypatch.setattr(Search, "climb", lambda *_: pytest.fail("searched again"))
    _, _, again = fitted(tmp_path)
    assert again.orders == facts.orders
    assert again.table == facts.table
    monkeypatch.undo()
    _, second, _ = fitted()
    torch.testing.assert_close(first.state_dict(), second.state_dict())


def test_too_few_examples_are_refused():
    with pytest.raises(UserError, match="router: 60 training examples are too few for 50 held out"):
        fitted(held_out=50)


def test_orders_of_a_record_are_measured_and_none_is_searched(tmp_path, monkeypatch):
    record = tmp_path / "record.json"

    def written(**orders):
        record.write_text(json.dumps({"metrics": {"router": {"orders": orders}}}))
        return {"known": str(record)}

    monkeypatch.setattr(Search, "climb", lambda *_: pytest.fail("searched"))
    orders = {"prior": [1, 2, 3, 4], "all": [3, 1, 2, 4], "1.1": [4, 2, 3, 1], "2.1": [3, 2, 1, 5]}
    _, _, found = fitted(**written(**orders))
    assert {name: found.orders[name] for name in ("all", "1.1")} == {"all": [3, 1, 2], "1.1": [4, 2, 3]}
    assert "2.1" not in found.orders  # the same routes as "all" at the depths that are measured
    assert found.held_out[found.kept]["loss"] == min(each["loss"] for each in found.held_out.values())
    for wrong, said in (({}, "no removal orders"), ({"all": [1, 2]}, "order all"), ({"all": [0, 1, 2]}, "1 to 5")):
        with pytest.raises(UserError, match=said):
            fitted(**written(**wrong))
