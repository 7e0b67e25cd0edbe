"""One pass in which every token has its own route, against decoding token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, tiny, with_router
from transformers.modeling_outputs import CausalLMOutputWithPast

from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.model import RoutedModel
from buddy.routing.policy import Policy

KV = ("zero", "mask", "project")


def token_by_token(model, ids, mask, prompt, budget, decode) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, S - prompt + 1, V) from the end of the prompt on, and the routes of prompt and tokens, by decoding."""
    cache = model.new_cache(4)
    options = {"budget": budget, "decode": decode, "past_key_values": cache}
    logits = [model(ids[:, :prompt], mask[:, :prompt], **options).logits[:, -1]]
    routes = [model.trace.steps[0]]
    for end in range(prompt + 1, ids.shape[1] + 1):
        logits.append(model(ids[:, end - 1 : end], mask[:, :end], **options).logits[:, -1])
        routes.append(model.trace.steps[0])
    return torch.stack(logits, 1), torch.stack(routes, 1)


@torch.no_grad()
@settings(deadline=None, max_examples=60)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    kv=st.sampled_from(KV),
    feature=st.sampled_from(("key", "value", "key+value")),
    source=st.integers(1, 3),
    executed=st.lists(st.integers(5, 9), min_size=3, max_size=3),
    padding=st.integers(0, 3),
    prompt=st.integers(4, 6),
    decode=st.sampled_from(("recompute", "reuse", 2, 3)),
    attention=st.sampled_from(("sdpa", "eager")),
    seed=st.integers(0, 10_000),
)
def test_one_pass_has_the_logits_and_routes_of_decoding_step_by_step(
    architecture, kv, feature, source, executed, padding, prompt, decode, attention, seed
):
    backbone = tiny(architecture, blocks=9, seed=seed % 5)
    backbone.config._attn_implementation = attention
    model = with_router(backbone, feature, source, kv, seed)
    # Other tokens than those the router is balanced on: exact ties would be broken by rounding.
    ids = torch.randint(1, VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(seed + 1))
    mask = torch.ones_like(ids)
    ids[1, :padding], mask[1, :padding] = 0, 0
    budget = [k / 9 for k in executed]
    expected, routes = token_by_token(model, ids, mask, prompt, budget, decode)
    context = torch.zeros_like(ids, dtype=torch.bool)
    context[:, :prompt] = True
    options = {"budget": budget, "decode": decode, "routing": "causal", "context_mask": context}
    logits = model(ids, mask, **options).logits
    found = torch.stack(model.trace.steps, 1)
    real = mask[:, prompt - 1 :].bool()
    assert torch.equal(found[:, prompt - 1 :][real], routes[real])
    assert (found.sum(-1)[mask.bool()] == torch.tensor(executed)[:, None].expand_as(mask)[mask.bool()]).all()
    torch.testing.assert_close(logits[:, prompt - 1 :], expected, atol=2e-4, rtol=2e-4)
    # With a cache the same pass can be cut in two, and decoding goes on from it.
    cache = model.new_cache(4)
    options["past_key_values"] = cache
    first = model(ids[:, :10], mask[:, :10], **{**options, "context_mask": context[:, :10]}).logits
    second = model(ids[:, 10:13], mask[:, :13], **options).logits
    third = model(ids[:, 13:], mask, budget=budget, decode=decode, past_key_values=cache).logits
    pieces = torch.cat([first, second, third], 1)
    torch.testing.assert_close(pieces[:, prompt - 1 :], expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_the_first_token_is_the_prompt_unless_told(backbone, kv):
    model = with_router(backbone, kv=kv)
    ids = torch.randint(1, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(3))
    expected, routes = token_by_token(model, ids, torch.ones_like(ids), 1, 4 / 7, "recompute")
    logits = model(ids, budget=4 / 7, routing="causal").logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    assert torch.equal(torch.stack(model.trace.steps, 1), routes)
    assert len(set(model.trace.paths())) > 1, "one path only: the test shows nothing"


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), prompt=st.integers(0, 5), past=st.booleans())
def test_the_sums_of_all_tokens_at_once_are_the_policys_definition(seed, prompt, past):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    policy = BuddyPolicy(8, 6, prior=torch.randn(6))
    torch.nn.init.normal_(policy.decision.up.weight, std=5.0)
    keys, values = torch.randn(2, 3, 2, 7, 3, generator=generator).unbind(0)
    mask = torch.rand(3, 7, generator=generator) > 0.2
    context = torch.arange(7).expand(3, 7) < prompt
    states = [policy.begin([0.5, 0.75, 0.9], 3, torch.device("cpu")) for _ in range(2)]
    if past:
        for state in states:
            policy.observe(state, keys[:, :, :2], values[:, :, :2], None)
    with torch.no_grad():  # scores are of order 10, computed in float32
        fast = policy.decide_each(states[0], keys, values, mask, context)
        slow = Policy.decide_each(policy, states[1], keys, values, mask, context)
    assert torch.equal(fast, slow)
    torch.testing.assert_close(states[0].pooled.total, states[1].pooled.total, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(states[0].pooled.count, states[1].pooled.count)


@torch.no_grad()
def test_a_static_route_is_the_same_in_both_forms(backbone):
    model = RoutedModel(backbone, StaticPolicy(7, [2, 5]))
    ids = torch.randint(1, VOCABULARY, (2, 8))
    torch.testing.assert_close(model(ids, routing="causal").logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_full_depth_is_the_untouched_model(backbone):
    model = with_router(backbone)
    ids = torch.randint(1, VOCABULARY, (2, 8))
    assert torch.equal(model(ids, budget=1.0, routing="causal").logits, backbone(ids).logits)
    with pytest.raises(UserError, match=r"routing: 'both'"):
        model(ids, budget=1.0, routing="both")


def test_gradients_of_every_tokens_gate_are_those_of_the_definition():
    """dL/dM for H = H + M * F(H), the keys and values of skipped tokens being zero; by autograd over continuous gates."""
    backbone = tiny("llama", blocks=5).double()
    torch.manual_seed(1)
    policy = BuddyPolicy(5, 16, rank=4).double()
    torch.nn.init.normal_(policy.decision.up.weight, std=30.0)
    ids = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2))
    context = torch.arange(8).expand(2, 8) < 3
    routing = Routing(policy, budget=3 / 5, form="causal", context_mask=context, gradient=True)
    with routed(backbone, routing):
        output: CausalLMOutputWithPast = backbone(ids)
    assert routing.gates is not None
    routing.gates.retain_grad()
    nll(output.logits, ids).backward()
    hard = routing.gates.detach().double()
    assert len({tuple(row) for row in hard.flatten(0, 1).tolist()}) > 1

    gates = hard.clone().requires_grad_()
    hidden = backbone.model.embed_tokens(ids)
    rotary = backbone.model.rotary_emb(hidden, torch.arange(8)[None])
    mask = torch.full((8, 8), -torch.inf, dtype=torch.float64).triu(1)[None, None]

    class Zeroing:
        def __init__(self, runs):
            self.runs = runs[:, None, :, None]

        def update(self, keys, values, *_):
            return keys * self.runs, values * self.runs

    for index, layer in enumerate(backbone.model.layers):
        cache = Zeroing(hard[:, :, index])
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        hidden = hidden + gates[:, :, index].unsqueeze(-1) * (out - hidden)
    expected = nll(backbone.lm_head(backbone.model.norm(hidden)), ids)
    expected.backward()
    torch.testing.assert_close(routing.gates.grad[:, :, 1:4].double(), gates.grad[:, :, 1:4], atol=1e-6, rtol=1e-4)


def nll(logits, ids):
    """Mean next-token loss."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
