"""Gradient checkpointing computes the same function: every form, every K/V policy, against the pass that keeps everything."""

import pytest
import torch
from models import VOCABULARY, prompts, tiny, with_router

from buddy.policies.buddy import BuddyPolicy
from buddy.policies.first import FirstPolicy
from buddy.routing.engine import Routing, routed

KV = ("zero", "mask", "project")


def checkpointed(backbone, reentrant=False):
    """The backbone in training mode with gradient checkpointing, its embeddings requiring a gradient as LoRA has it."""
    backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
    backbone.enable_input_require_grads()
    return backbone.train()


def strong_router(blocks, source=1, seed=3):
    torch.manual_seed(seed)
    policy = BuddyPolicy(blocks, 16, rank=4, source_block=source)
    for name, parameter in policy.named_parameters():
        torch.nn.init.normal_(parameter, std=5.0 if name.endswith("weight") else 0.1)
    return policy


def learnt(backbone, policy, form, kv, budget=5 / 7):
    """Logits of a training pass, and the gradient of every parameter of backbone and policy that has one."""
    ids, mask = prompts(batch=3, length=10, seed=4)
    context = torch.zeros_like(ids, dtype=torch.bool)
    context[:, :6] = True
    context &= mask.bool()
    for parameter in [*backbone.parameters(), *policy.parameters()]:
        parameter.grad = None
    torch.manual_seed(9)
    with routed(backbone, routing := Routing(policy, budget, form=form, kv=kv, context_mask=context, gradient=True)):
        logits = backbone(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    named = {**dict(backbone.named_parameters()), **{f"policy.{n}": p for n, p in policy.named_parameters()}}
    return logits.detach(), {name: p.grad.clone() for name, p in named.items() if p.grad is not None}, routing


@pytest.mark.parametrize("source", [1, 3])
@pytest.mark.parametrize("form", ["sequence", "causal"])
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_pass_has_the_logits_and_gradients_of_a_plain_one(form, kv, source, reentrant):
    policy = strong_router(7, source)
    plain = learnt(tiny().train(), policy, form, kv)
    saving = learnt(checkpointed(tiny(), reentrant), policy, form, kv)
    assert torch.equal(plain[0], saving[0])
    assert plain[1].keys() == saving[1].keys()
    assert any(name.startswith("policy.") for name in plain[1])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(
            saving[1][name], gradient, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_kv_policies_differ_where_they_are_compared():
    """Else the test above would pass for a checkpointed block that forgets what tokens leave behind."""
    policy = strong_router(7)
    logits = {kv: learnt(checkpointed(tiny()), policy, "causal", kv)[0] for kv in KV}
    assert all((logits["zero"] - logits[kv]).abs().max() > 0.1 for kv in ("mask", "project"))


def test_dropout_is_drawn_once_for_both_passes():
    backbones = [tiny().train(), checkpointed(tiny())]
    for backbone in backbones:
        for layer in backbone.model.layers:
            layer.self_attn.attention_dropout = 0.2
    policy = strong_router(7)
    plain, saving = (learnt(backbone, policy, "causal", "zero") for backbone in backbones)
    assert torch.equal(plain[0], saving[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(saving[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_soft_gates_of_every_token_are_the_same_checkpointed():
    torch.manual_seed(0)
    policy = FirstPolicy(7, 32)
    plain = learnt(tiny().train(), policy, "sequence", "zero", 1.0)
    saving = learnt(checkpointed(tiny()), policy, "sequence", "zero", 1.0)
    assert torch.equal(plain[0], saving[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(saving[1][name], gradient, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_a_cache_is_kept_in_training_mode_too(kv):
    """A block that checkpoints itself would drop it, and later tokens would find nothing."""
    model = with_router(tiny(), kv=kv)
    ids, mask = prompts()
    expected = model.generate(ids, mask, budget=4 / 7, max_new_tokens=5, do_sample=False)
    checkpointed(model.backbone)
    assert torch.equal(model.generate(ids, mask, budget=4 / 7, max_new_tokens=5, do_sample=False), expected)


def test_memory_is_saved():
    """What a checkpointed pass keeps for its backward pass does not hold the blocks' inner states."""

    def kept(backbone):
        ids = torch.randint(1, VOCABULARY, (2, 32))
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        policy = strong_router(7)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            routed(backbone, Routing(policy, 5 / 7, form="causal", gradient=True)),
        ):
            backbone(input_ids=ids, use_cache=False).logits.sum()
        return sum(sizes)

    assert kept(checkpointed(tiny())) < 0.5 * kept(tiny().train())
