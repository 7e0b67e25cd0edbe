"""Training: gradients against the definition, resuming against an uninterrupted run, routing takes part."""

import json

import pytest
import torch
from models import VOCABULARY, tiny

from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy
from buddy.routing.engine import Routing, routed
from buddy.settings import Training
from buddy.training import divergence, recipe, sft
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

RECIPE = recipe.Recipe(recipe.drawn(3, 6), trains_policy=True, constants={"most_removed": 3})


def policy_for(backbone, seed=0):
    torch.manual_seed(seed)
    return BuddyPolicy(backbone.config.num_hidden_layers, 16, rank=4)


def tokenizer(tmp_path):
    """A real tokenizer (TRL insists on one), one token per byte."""
    from buddy.backbones.untrained import byte_tokenizer

    return byte_tokenizer()


def backbone_of(seed=0):
    torch.manual_seed(seed)  # of the rows that its embedding gets
    backbone = tiny("llama", blocks=6, seed=seed)
    backbone.resize_token_embeddings(300)
    return backbone


def run(folder, settings=SETTINGS, seed=0, stop_after=None, pairs=PAIRS, recipe=RECIPE, weights=0, router=0, seen=None):
    """Train a tiny model; optionally die after a number of steps. Returns (trained, policy)."""
    backbone = backbone_of(weights)
    policy = policy_for(backbone, router)

    def die(step, _values):
        if seen is not None:
            seen.append(step)
        if stop_after is not None and step >= stop_after:
            raise KeyboardInterrupt

    trained = sft.train(backbone, tokenizer(folder), policy, pairs, settings, recipe, folder, seed, on_log=die)
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def cut(tmp_path):
    """The folder of one that was killed at step 5 of 8: checkpoints at steps 2 and 4."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after=5)
    assert {path.name for path in (tmp_path / sft.CHECKPOINTS).iterdir()} == {"checkpoint-2", "checkpoint-4"}
    return tmp_path


def assert_same(one, other):
    (trained, policy), (again, policy_again) = one, other
    assert again.steps == trained.steps == 8
    assert again.tokens == trained.tokens
    for name, value in policy.state_dict().items():
        assert torch.equal(policy_again.state_dict()[name], value), name
    for (name, a), (_, b) in zip(trained.adapted.named_parameters(), again.adapted.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [point["loss"] for point in trained.curve] == [point["loss"] for point in again.curve]


def test_a_killed_training_resumes_to_the_same_weights(whole, cut):
    seen = []
    assert_same(whole, run(cut, seen=seen))
    assert seen == [5, 6, 7, 8]


OTHERS = {
    "settings.learning_rate is 0.01, here 0.02": {"settings": SETTINGS.model_copy(update={"learning_rate": 2e-2})},
    "settings.epochs is 2.0, here 3.0": {"settings": SETTINGS.model_copy(update={"epochs": 3.0})},
    "seed is 0, here 1": {"seed": 1},
    "examples is": {"pairs": [*PAIRS[:-1], ("another", "example")]},
    "policy.state is": {"router": 1},
    "backbone is": {"weights": 1},
    "recipe.most_removed is 3, here 2": {
        "recipe": recipe.Recipe(recipe.drawn(2, 6), trains_policy=True, constants={"most_removed": 2})
    },
}


@pytest.mark.parametrize("said", OTHERS)
def test_no_training_goes_on_from_another_ones_checkpoint(cut, caplog, said):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(cut, seen=seen, stop_after=1, **OTHERS[said])
    assert seen == [1]
    lines = [message for message in caplog.messages if "set aside as" in message]
    assert len(lines) == 2  # both checkpoints
    assert all(f"({said}" in line for line in lines)
    assert {path.name for path in (cut / sft.CHECKPOINTS).glob("aside-*/*")} == {"checkpoint-2", "checkpoint-4"}


def test_how_often_it_is_kept_makes_no_other_training(cut):
    seen = []
    run(cut, SETTINGS.model_copy(update={"save_steps": 3}), seen=seen)
    assert seen == [5, 6, 7, 8]


DAMAGE = {
    "optimizer.pt": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "router.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "adapter_model.safetensors": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "trainer_state.json": lambda path: path.unlink(),
    "seal.json": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole, cut, caplog, file):
    last = cut / sft.CHECKPOINTS / "checkpoint-4"
    DAMAGE[file](last / file)
    seen = []
    assert_same(whole, run(cut, seen=seen))
    assert seen == [3, 4, 5, 6, 7, 8]
    (line,) = [message for message in caplog.messages if "passed over" in message]
    assert line.startswith(f"{last}: ")
    assert file in line


def test_depths_cover_the_range_full_depth_included():
    drawn = [k for step in range(200) for k in recipe.draw_depths(4, 5, 8, seed=1, step=step, part=0)]
    counts = {k: drawn.count(k) for k in set(drawn)}
    assert set(counts) == {5, 6, 7, 8}
    assert min(counts.values()) > 150  # 200 expected of each
    assert recipe.draw_depths(4, 5, 8, 1, 7, 0) == recipe.draw_depths(4, 5, 8, 1, 7, 0)
    # A share of them at the depths that are measured, the others where they would be.
    plain, often = recipe.drawn(12, 16), recipe.drawn(12, 16, [4, 8], share=0.75)
    pairs = [pair for step in range(500) for pair in zip(plain(4, 1, step, 0), often(4, 1, step, 0), strict=True)]
    moved = [new for old, new in pairs if new != old]
    assert set(moved) == {12 / 16, 8 / 16}
    elsewhere = sum(1 for _, new in pairs if new not in (12 / 16, 8 / 16)) / len(pairs)
    assert abs(elsewhere - 0.25 * 11 / 13) < 0.03
    assert recipe.drawn(12, 16, [4, 8], share=0.0)(4, 1, 7, 0) == plain(4, 1, 7, 0)
    assert often(4, 1, 7, 0) == often(4, 1, 7, 0)
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


FORMS = [("sequence", "zero"), ("causal", "zero"), ("causal", "mask"), ("causal", "project")]


@pytest.mark.parametrize(("form", "kv"), FORMS)
def test_an_update_is_the_same_however_it_is_computed(tmp_path, form, kv):
    """Loss and gradient of one update over six examples, accumulated or not, checkpointed or not."""
    one_depth = recipe.Recipe(lambda batch, *_: [4 / 6] * batch, trains_policy=True)
    settings = SETTINGS.model_copy(update={"routing": form, "kv": kv, "epochs": 1, "lora_dropout": 0.0})
    found = []
    for parts in (1, 3):
        for checkpointed in (False, True):
            how = {"batch_size": 6 // parts, "gradient_accumulation": parts, "gradient_checkpointing": checkpointed}
            folder = tmp_path / f"{parts}{checkpointed}"
            found.append(run(folder, settings.model_copy(update=how), pairs=PAIRS[:6], recipe=one_depth)[0])
    for trained in found:
        assert trained.steps == 1
        for name in ("loss", "grad_norm"):
            assert trained.curve[0][name] == pytest.approx(found[0].curve[0][name], rel=1e-4)


def test_a_diverged_training_stops_says_where_and_keeps_its_checkpoints(tmp_path):
    settings = SETTINGS.model_copy(update={"save_steps": 1, "warmup_steps": 0, "learning_rate": 1e30})
    with pytest.raises(UserError, match=r"diverged at step 2 \(.*\); lower the learning rate; checkpoints are kept"):
        run(tmp_path, settings)
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-1"]


def test_a_gradient_that_is_no_number_changes_nothing():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    divergence.watch(optimizer, lambda: 7)
    for bad in (float("nan"), float("inf")):
        for broken in weights:
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            broken.grad[1] = bad
            with pytest.raises(UserError, match="diverged at step 7"):
                optimizer.step()
    assert all((weight == 1).all() for weight in weights)
    counted = torch.optim.AdamW(weights, lr=0.1)
    divergence.watch(counted)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    counted.step()
    assert all((weight != 1).all() for weight in weights)
    weights[0].grad[0] = float("nan")
    with pytest.raises(UserError, match="diverged at step 2"):
        counted.step()
