"""Training: gradients against the definition, resuming against an uninterrupted run, routing takes part."""

import json

import pytest
import torch
from models import VOCABULARY, tiny

from buddy.policies.buddy import BuddyPolicy
from buddy.routing.engine import Routing, routed
from buddy.settings import Training
from buddy.training import recipe, sft
from buddy.training.examples import IGNORED, Collator, encode


class Letters:
    """A tokenizer of one token per character, enough for training."""

    eos_token_id, pad_token_id = 2, 0

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + ord(letter) % (VOCABULARY - 3) for letter in text]
        return type("Encoding", (), {"input_ids": ([1] if add_special_tokens else []) + ids})


PAIRS = [(f"question {i}: what follows {i}?", f"{i + 1} follows, of course {'!' * (i % 3)}") for i in range(12)]
SETTINGS = Training(
    epochs=2, batch_size=3, warmup_steps=1, max_length=64, save_steps=2, logging_steps=1, learning_rate=1e-2,
    lora_rank=2, router_rank=4,
)  # fmt: skip

RECIPE = recipe.Recipe(recipe.drawn(3, 6), trains_policy=True)


def policy_for(backbone, seed=0):
    torch.manual_seed(seed)
    return BuddyPolicy(backbone.config.num_hidden_layers, 16, rank=4)


def tokenizer(tmp_path):
    """A real tokenizer (TRL insists on one), one token per byte."""
    from buddy.backbones.untrained import byte_tokenizer

    return byte_tokenizer()


def run(folder, settings=SETTINGS, seed=0, stop_after=None):
    """Train a tiny model; optionally die after a number of steps. Returns (trained, policy)."""
    backbone = tiny("llama", blocks=6)
    backbone.resize_token_embeddings(300)
    policy = policy_for(backbone)

    def die(step, _values):
        if stop_after is not None and step >= stop_after:
            raise KeyboardInterrupt

    trained = sft.train(backbone, tokenizer(folder), policy, PAIRS, settings, RECIPE, folder, seed, on_log=die)
    return trained, policy


def nll(logits, ids):
    """Mean next-token loss, of the labelled tokens."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("full", [False, True])
def test_gate_gradients_are_those_of_the_definition(full):
    backbone = tiny("llama", blocks=5).double()
    policy = policy_for(backbone).double()
    ids = torch.randint(1, VOCABULARY, (2, 7))
    with routed(backbone, routing := Routing(policy, budget=1.0 if full else 3 / 5, gradient=True)):
        logits = backbone(ids).logits
    routing.gates.retain_grad()
    loss = nll(logits, ids)
    loss.backward()

    # The definition, every block computed for every sequence: H = H + M * F(H), differentiated by autograd.
    gates = routing.gates.detach().clone().requires_grad_()
    hidden = backbone.model.embed_tokens(ids)
    rotary = backbone.model.rotary_emb(hidden, torch.arange(7)[None])
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for index, layer in enumerate(backbone.model.layers):
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        hidden = hidden + gates[:, index].view(-1, 1, 1) * (out - hidden)
    expected = nll(backbone.lm_head(backbone.model.norm(hidden)), ids)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(routing.gates.grad[:, 1:4], gates.grad[:, 1:4], atol=1e-6, rtol=1e-4)


def test_the_backbones_gradient_is_that_of_the_hard_path():
    """Executed blocks get the gradient of the sliced model, skipped ones none (the router reaches only the first)."""
    from buddy.routing.sliced import sliced

    backbone = tiny("llama", blocks=6)
    policy = policy_for(backbone)
    ids = torch.randint(1, VOCABULARY, (1, 7))
    routing = Routing(policy, budget=4 / 6, gradient=True)
    with routed(backbone, routing):
        nll(backbone(ids).logits, ids).backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in backbone.named_parameters()}
    backbone.zero_grad(set_to_none=True)
    kept = list(routing.trace.paths()[0])
    nll(sliced(backbone, kept)(ids).logits, ids).backward()
    for name, parameter in backbone.named_parameters():
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if block is not None and block not in kept:
            assert gradients[name] is None
        elif block != 0 and "embed" not in name:
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_training_moves_router_and_lora_and_nothing_else(tmp_path):
    backbone = tiny("llama", blocks=6)
    backbone.resize_token_embeddings(300)
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    policy = policy_for(backbone)
    router = {name: p.clone() for name, p in policy.named_parameters()}
    trained = sft.train(backbone, tokenizer(tmp_path), policy, PAIRS, SETTINGS, RECIPE, tmp_path, seed=0)
    for name, parameter in policy.named_parameters():
        assert not torch.equal(parameter, router[name]), f"{name} did not move: routing took no part"
    after = dict(trained.adapted.named_parameters())
    for name, parameter in before.items():
        stem = name.removesuffix(".weight")
        matches = [p for n, p in after.items() if n.endswith((f"{stem}.weight", f"{stem}.base_layer.weight"))]
        assert len(matches) == 1
        assert torch.equal(matches[0], parameter)
    moved = [p for n, p in after.items() if "lora_B" in n]
    assert len(moved) == 6 * 7  # every linear module of every block
    assert all(p.abs().sum() > 0 for p in moved), "a block was never trained"
    assert {"step", "loss", "executed_fraction", "score_entropy", "tok_s"} <= set(trained.curve[0])
    assert all(0.5 <= point["executed_fraction"] <= 1 for point in trained.curve)


def test_a_killed_training_resumes_to_the_same_weights(tmp_path):
    whole, whole_policy = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=5)
    assert (tmp_path / "cut" / sft.CHECKPOINTS / "checkpoint-4" / "trainer_state.json").exists()
    resumed, resumed_policy = run(tmp_path / "cut")
    assert resumed.steps == whole.steps == 8
    assert resumed.tokens == whole.tokens
    for name, value in whole_policy.state_dict().items():
        torch.testing.assert_close(resumed_policy.state_dict()[name], value, atol=0, rtol=0)
    for (name, a), (_, b) in zip(whole.adapted.named_parameters(), resumed.adapted.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    losses = [[point["loss"] for point in trained.curve] for trained in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_checkpoint_cut_off_while_written_is_passed_over(tmp_path):
    for step, complete in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").write_text("{}")
    assert sft._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sft._last_checkpoint(tmp_path / "absent") is None


def test_depths_cover_the_range_full_depth_included():
    drawn = [k for step in range(200) for k in recipe.draw_depths(4, 5, 8, seed=1, step=step, part=0)]
    counts = {k: drawn.count(k) for k in set(drawn)}
    assert set(counts) == {5, 6, 7, 8}
    assert min(counts.values()) > 150  # 200 expected of each
    assert recipe.draw_depths(4, 5, 8, 1, 7, 0) == recipe.draw_depths(4, 5, 8, 1, 7, 0)
    assert recipe.draw_depths(8, 2, 30, 1, 7, 0) != recipe.draw_depths(8, 2, 30, 1, 7, 1)


def test_batches_mark_prompt_response_and_padding():
    rows = encode(Letters(), [("ab", "cde"), ("abcd", "e")], max_length=64)
    assert [row["prompt_length"] for row in rows] == [3, 5]
    batch = Collator(pad=0)(rows)
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 7]
    assert batch["context_mask"].tolist() == [[1] * 3 + [0] * 4, [1] * 5 + [0] * 2]
    assert (batch["labels"] != IGNORED).tolist() == [[False] * 3 + [True] * 4, [False] * 5 + [True] * 2]
    assert batch["labels"][0, -1] == Letters.eos_token_id
    everything = Collator(pad=0, loss_on="all", pool_over="all")(rows)
    assert torch.equal(everything["labels"], everything["input_ids"])
    assert torch.equal(everything["context_mask"], everything["attention_mask"])


def test_the_router_does_not_see_the_response():
    """Two examples with one prompt and different responses take one route in training."""
    backbone = tiny("llama", blocks=8)
    policy = policy_for(backbone)
    batch = Collator(pad=0)(encode(Letters(), [("same prompt", "one answer"), ("same prompt", "another")], 64))
    with routed(backbone, routing := Routing(policy, 0.5, context_mask=batch["context_mask"], gradient=True)):
        backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert routing.trace.paths(0) == routing.trace.paths(1)
    torch.testing.assert_close(*policy.scores(routing.state.policy_state))


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain, plain_policy = run(tmp_path / "plain", SETTINGS.model_copy(update={"epochs": 1}))
    saving, saving_policy = run(
        tmp_path / "saving", SETTINGS.model_copy(update={"epochs": 1, "gradient_checkpointing": True})
    )
    for name, value in plain_policy.state_dict().items():
        torch.testing.assert_close(saving_policy.state_dict()[name], value)
    assert json.dumps(plain.steps) == json.dumps(saving.steps)


def test_causal_routing_trains_the_paths_that_decoding_takes(tmp_path):
    """The loss of a causal pass is the loss of decoding the response token by token."""
    from buddy.routing.model import RoutedModel

    backbone = tiny("llama", blocks=6)
    policy = policy_for(backbone)
    torch.nn.init.normal_(policy.decision.up.weight, std=30.0)
    rows = encode(Letters(), [("what is it?", "it is that")], 64)
    batch = Collator(0, "response", "prompt")(rows)
    ids, context = batch["input_ids"], batch["context_mask"]
    with torch.no_grad():
        model = RoutedModel(backbone, policy, "mask")
        cache, losses = model.new_cache(), []
        prompt = int(context.sum())
        logits = model(ids[:, :prompt], budget=4 / 6, past_key_values=cache).logits[:, -1]
        for token in ids[0, prompt:]:
            losses.append(torch.nn.functional.cross_entropy(logits, token[None]))
            logits = model(token[None, None], budget=4 / 6, past_key_values=cache).logits[:, -1]
    routing = Routing(policy, 4 / 6, form="causal", kv="mask", context_mask=context, gradient=True)
    with routed(backbone, routing):
        loss = nll(backbone(ids).logits, batch["labels"])
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
    causal = SETTINGS.model_copy(update={"routing": "causal", "kv": "mask", "epochs": 1})
    sequence = SETTINGS.model_copy(update={"epochs": 1})
    norms = [run(tmp_path / form.routing, form)[0].curve[0]["grad_norm"] for form in (causal, sequence)]
    assert norms[0] != norms[1]  # the first loss is one of routers that have learnt nothing yet; their gradients differ


def test_causal_routing_needs_a_prompt():
    with pytest.raises(ValueError, match="pool_over"):
        Training(routing="causal", pool_over="all")
