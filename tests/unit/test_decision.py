"""The Decision Module's parts against slow, independent versions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy.policies.buddy import BuddyPolicy
from buddy.policies.decision import DecisionModule, RunningMean, source_feature, straight_through
from buddy.policies.priors import normalise, standardise
from buddy.routing.ranking import first_places, keep_top


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 12))
def test_keep_top_keeps_the_highest_of_each_row(seed, batch, candidates):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (batch, candidates), generator=generator).float()  # ties are common
    keep = torch.randint(0, candidates + 1, (batch,), generator=generator)
    mask = keep_top(scores, first_places(keep, candidates))
    for row in range(batch):
        by_hand = sorted(range(candidates), key=lambda i: (-scores[row, i].item(), i))[: keep[row]]
        assert mask[row].nonzero().flatten().tolist() == sorted(by_hand)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_the_running_mean_equals_pooling_the_whole_prefix(seed, pieces):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, sum(pieces), 6, generator=generator)
    mask = torch.rand(3, sum(pieces), generator=generator) > 0.3
    running, seen = RunningMean.empty(3, 6, scores.device), 0
    for piece in pieces:
        running.add(scores[:, seen : seen + piece], mask[:, seen : seen + piece])
        seen += piece
        for row in range(3):
            kept = scores[row, :seen][mask[row, :seen]]
            expected = kept.mean(0) if len(kept) else torch.zeros(6)
            torch.testing.assert_close(running.mean()[row], expected.double(), atol=1e-5, rtol=1e-5)


def test_the_module_is_linear_silu_linear_token_by_token():
    module = DecisionModule(8, 5, rank=3)
    features = torch.randn(2, 4, 8)
    scores = module(features)
    assert scores.shape == (2, 4, 5)
    x = features[1, 2] @ module.down.weight.T + module.down.bias
    x = (x * torch.sigmoid(x)) @ module.up.weight.T + module.up.bias
    torch.testing.assert_close(scores[1, 2], x)
    assert module(features.bfloat16()).dtype == torch.float32


def test_features_flatten_the_heads_of_a_token():
    keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    assert torch.equal(source_feature(keys, values, "key")[1, 2], torch.cat([keys[1, h, 2] for h in range(3)]))
    assert torch.equal(source_feature(keys, values, "value")[0, 4], torch.cat([values[0, h, 4] for h in range(3)]))
    both = source_feature(keys, values, "key+value")
    assert torch.equal(both, source_feature(keys, values, "key") + source_feature(keys, values, "value"))


def test_gates_are_hard_forward_and_softmax_backward():
    scores = torch.randn(2, 6, requires_grad=True)
    mask = keep_top(scores, first_places(torch.tensor([2, 4]), scores.shape[1]))
    gates = straight_through(mask, scores)
    assert torch.equal(gates, mask.float())  # exactly, not nearly
    upstream = torch.randn(2, 6)
    (gates * upstream).sum().backward()
    soft = scores.detach().softmax(-1)
    by_hand = soft * (upstream - (soft * upstream).sum(-1, keepdim=True))  # the softmax Jacobian, by hand
    torch.testing.assert_close(scores.grad, by_hand)


@pytest.mark.parametrize("indicator", ["delta_ppl", "taylor", "cosine"])
def test_normalisation_ranks_into_the_open_unit_interval(indicator):
    importance = torch.tensor([5.0, -1.0, 300.0, 0.2, 5.0])
    prior = normalise(importance, indicator, clip=None)
    # ranks 0 .. 4 with the tie at 2.5: (1 + rank) / 6
    assert prior.tolist() == pytest.approx([3.5 / 6, 1 / 6, 5 / 6, 2 / 6, 3.5 / 6])


def test_clipping_ties_the_outliers():
    importance = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1e6, 1e9])
    assert normalise(importance, "cosine", clip=3.0)[-1] == normalise(importance, "cosine", clip=3.0)[-2]
    assert normalise(importance, "cosine", clip=None)[-1] > normalise(importance, "cosine", clip=None)[-2]


def test_standardised_priors_have_mean_zero_and_deviation_one():
    p = standardise(torch.tensor([0.1, 0.5, 0.7, 0.9]))
    assert p.mean().abs() < 1e-12
    assert p.pow(2).mean().sqrt() == pytest.approx(1, abs=1e-6)
    assert standardise(torch.ones(4)).tolist() == [0.0] * 4


def test_the_first_routes_are_the_priors():
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 9, 4, generator=random)
    for seed in range(5):
        torch.manual_seed(seed)
        prior = torch.randperm(6, generator=random).float()
        policy = BuddyPolicy(8, 8, omega=0.1, prior=(prior - prior.mean()) / prior.std(correction=0))
        state = policy.begin(4 / 8, 3, torch.device("cpu"))
        policy.observe(state, keys, values, None)
        kept = policy.decide(state)[:, policy.candidates]
        assert torch.equal(kept, (prior >= 4).expand(3, 6))  # blocks 1 and 8, and the two of most importance
