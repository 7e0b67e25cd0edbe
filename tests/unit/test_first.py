"""FiRST: gates against hand-written loops over Hugging Face's layers, in training, at inference and in calibration."""

import itertools
import math
import shutil

import pytest
import torch
from models import VOCABULARY, prompts, tiny
from tape import Tape

from buddy import policies, runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.data import materialise
from buddy.data.choices import training_contexts, training_items
from buddy.errors import BudgetError, UserError
from buddy.policies.first import START, FirstPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.graphs.decoders import Decoders
from buddy.routing.kv import RoutedCache
from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced
from buddy.settings import First, Training
from buddy.training import first as two_phases
from buddy.training.job import Job
from buddy.training.threshold import MOST_PASSES, calibrate

KV = ("zero", "mask", "project")


def gates_for(backbone, seed=0, threshold=0.5, removed=3):
    """Gates of all opinions, so that prompts take different routes."""
    policy = FirstPolicy(backbone.config.num_hidden_layers, 32, {removed: threshold})
    torch.manual_seed(seed)
    torch.nn.init.normal_(policy.weight, std=0.4)
    torch.nn.init.normal_(policy.bias, std=0.4)
    return policy


def gated(backbone, kv="zero", seed=0, threshold=0.5):
    return RoutedModel(backbone, gates_for(backbone, seed, threshold), kv).eval()


def distinct(model):
    return len({tuple(row) for step in model.trace.steps for row in step.tolist()})


def inputs_of_blocks(backbone, ids):
    """Hidden states, rotary embedding and mask for a hand-written loop over the layers of one or more full sequences."""
    length = ids.shape[1]
    hidden = backbone.model.embed_tokens(ids)
    rotary = backbone.model.rotary_emb(hidden, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
    return hidden, {"position_embeddings": rotary, "attention_mask": mask}


def probability(policy, index, hidden):
    """The definition of a gate, for one token after the other."""
    weight, bias = policy.weight[index - 1], policy.bias[index - 1]
    return torch.stack([1 / (1 + torch.exp(-(weight @ token + bias))) for token in hidden])


@torch.no_grad()
def by_hand(backbone, policy, ids, threshold, read=None):
    """One sequence (S,) through Hugging Face's layers: logits (S, V) and the blocks it ran."""
    hidden, given = inputs_of_blocks(backbone, ids[None])
    last, ran = backbone.config.num_hidden_layers - 1, []
    for index, layer in enumerate(backbone.model.layers):
        if index not in (0, last) and probability(policy, index, hidden[0, :read]).mean() < threshold:
            continue
        hidden = layer(hidden, **given)
        ran.append(index)
    return backbone.lm_head(backbone.model.norm(hidden))[0], tuple(ran)


@pytest.mark.parametrize("padding", [0, 3])
def test_gradients_of_the_gates_are_finite_differences_of_the_definition(padding):
    backbone = tiny(blocks=5).double().requires_grad_(False)
    policy = gates_for(backbone).double()
    ids = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8 - padding :] = 0

    def nll(logits):
        targets = torch.where(mask.bool(), ids, -100)[:, 1:]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def slow():
        hidden, given = inputs_of_blocks(backbone, ids)  # padded on the right: no real token sees any
        gates = []
        for index, layer in enumerate(backbone.model.layers):
            out = layer(hidden, **given)
            if index in (1, 2, 3):
                p = torch.stack([probability(policy, index, row) for row in hidden])
                gates += [p[row, column] for row, column in mask.nonzero().tolist()]
                out = p.unsqueeze(-1) * out + (1 - p).unsqueeze(-1) * hidden
            hidden = out
        return nll(backbone.lm_head(backbone.model.norm(hidden))) + 0.3 * torch.stack(gates).mean()

    recipe = two_phases.recipe(policy, skip_weight=0.3)
    with routed(backbone, Routing(policy, recipe.budgets(2, 0, 0, 0), gradient=True)) as routing:
        logits = backbone(ids, attention_mask=mask).logits
    loss = nll(logits) + recipe.penalty(routing)
    loss.backward()
    # The model computes its norms and rotary angles in single precision, whatever its weights.
    assert loss.item() == pytest.approx(slow().item(), abs=1e-6)
    generator = torch.Generator().manual_seed(2)
    places = torch.randint(0, 32, (3, 4), generator=generator)
    for block in range(3):
        for tensor, place in [(policy.bias, (block,)), *((policy.weight, (block, int(i))) for i in places[block])]:
            step = 1e-2
            with torch.no_grad():
                tensor[place] += step
                up = slow()
                tensor[place] -= 2 * step
                down = slow()
                tensor[place] += step
            assert tensor.grad[place].item() == pytest.approx((up - down).item() / (2 * step), rel=2e-3, abs=2e-5)
    assert routing.gates.shape == (2, 8, 5)
    assert routing.gates[:, :, [0, 4]].eq(1).all()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_routes_and_logits_are_those_of_a_loop_over_the_layers(backbone, seed):
    model = gated(backbone, seed=seed)
    ids, mask = prompts(batch=6, length=11, seed=seed)
    logits = model(ids, mask).logits
    for row in range(6):
        real = mask[row].bool()
        expected, ran = by_hand(backbone, model.policy, ids[row][real], 0.5)
        assert model.trace.paths(row) == [ran]
        torch.testing.assert_close(logits[row][real], expected, atol=2e-4, rtol=2e-4)
        assert model.policy.begin(None, 1, "cpu").executed.item() == 4
    assert distinct(model) > 1


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_recorded_depth_is_what_hooks_count(backbone, kv):
    """At the prefill and at every decode step, and a block that nobody runs is not called at all."""
    model = gated(backbone, kv, seed=1)
    ids, mask = prompts(batch=4, length=9, seed=1)
    rows = torch.zeros(7, dtype=torch.int64)
    calls = torch.zeros(7, dtype=torch.int64)

    def hook(index):
        def count(_module, inputs, _output):
            rows[index] += len(inputs[0])
            calls[index] += 1

        return count

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(backbone.model.layers)]
    cache, new, idle = model.new_cache(4), ids, 0
    for step in range(5):
        rows.zero_()
        calls.zero_()
        logits = model(new, mask, past_key_values=cache).logits
        route = model.trace.steps[0]
        assert torch.equal(route.sum(0), rows), f"step {step}"
        assert torch.equal(route.any(0), calls > 0)
        idle += int((calls == 0).sum())
        new = logits[:, -1:].argmax(-1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for handle in handles:
        handle.remove()
    assert distinct(model) > 1
    alone = model(ids[:1], past_key_values=model.new_cache())
    assert alone is not None
    assert not model.trace.steps[0].all()


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
def test_a_batch_is_its_sequences_alone(backbone, kv):
    model = gated(backbone, kv, seed=2)
    ids, mask = prompts(batch=4, length=10, seed=3)
    ids[1, 0] = 5  # what stands under the padding does not matter
    generated = model.generate(ids, mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    routes = [model.trace.routes(row) for row in range(4)]
    assert distinct(model) > 1
    for row in range(4):
        real = mask[row].bool()
        alone = model.generate(ids[row][real][None], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(alone[0, -6:], generated[row, -6:])
        assert torch.equal(model.trace.routes(), routes[row])


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("decode", ["recompute", "reuse", 2])
def test_generation_is_that_of_the_backbone_without_the_skipped_blocks(backbone, kv, decode):
    """The prompt's route holds to the end: nothing is missing from the cache, whatever stands for missing K/V."""
    model = gated(backbone, kv, seed=5)
    depths = set()
    for seed in range(3):
        ids = prompts(batch=1, seed=seed)[0]
        generated = model.generate(ids, decode=decode, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert len(set(model.trace.paths())) == 1
        _, ran = by_hand(backbone, model.policy, ids[0], 0.5)
        assert set(model.trace.paths()) == {ran}
        depths.add(len(ran))
        cut = sliced(backbone, list(ran)).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, cut)
    assert min(depths) < 7


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("prompt", [1, 5])
def test_one_pass_has_the_routes_and_logits_of_decoding(backbone, kv, prompt):
    model = gated(backbone, kv, seed=6)
    ids, mask = prompts(batch=4, length=12, seed=7)
    mask[1], ids[1] = 1, ids[0].flip(0)
    cache = model.new_cache(4)
    expected = [model(ids[:, :prompt], mask[:, :prompt], past_key_values=cache).logits[:, -1]]
    routes = [model.trace.steps[0]]
    for end in range(prompt + 1, 13):
        out = model(ids[:, end - 1 : end], mask[:, :end], past_key_values=cache)
        expected.append(out.logits[:, -1])
        routes.append(model.trace.steps[0])
    context = None if prompt == 1 else (torch.arange(12) < prompt).expand(4, 12)
    for given in (mask, None):
        logits = model(ids, given, routing="causal", context_mask=context).logits
        assert torch.equal(torch.stack(model.trace.steps[prompt - 1 :], 1), torch.stack(routes, 1))
        torch.testing.assert_close(logits[:, prompt - 1 :], torch.stack(expected, 1), atol=2e-4, rtol=2e-4)
    assert distinct(model) > 1
    # Cut in two: the second pass finds the route of the first.
    cache = model.new_cache(4)
    first = None if context is None else context[:, :8]
    model(ids[:, :8], mask[:, :8], routing="causal", context_mask=first, past_key_values=cache)
    rest = model(ids[:, 8:], mask, routing="causal", context_mask=context, past_key_values=cache).logits
    assert torch.equal(torch.stack(model.trace.steps, 1), torch.stack(routes[-4:], 1))
    torch.testing.assert_close(rest, torch.stack(expected[-4:], 1), atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["sequence", "causal"])
def test_full_depth_is_the_untouched_model(backbone, routing):
    model = gated(backbone)
    ids, mask = prompts()
    untouched = backbone(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, mask, budget=1.0, routing=routing).logits, untouched)
    assert not torch.equal(model(ids, mask, routing=routing).logits, untouched)
    mixed = model(ids, mask, budget=[1.0, 4 / 7, 1.0]).logits
    torch.testing.assert_close(mixed[0], untouched[0], atol=2e-4, rtol=2e-4)
    assert model.trace.executed()[0].tolist()[::2] == [7, 7]
    assert model.trace.executed()[0, 1] < 7
    generated = model.generate(ids, mask, budget=1.0, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = backbone.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, plain)


@torch.no_grad()
def test_gates_read_the_context_alone():
    backbone = tiny()
    model = gated(backbone, seed=2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (8, 12), generator=generator)
    other = ids.clone()
    other[:, 6:] = torch.randint(1, VOCABULARY, (8, 6), generator=generator)
    context = (torch.arange(12) < 6).expand(8, 12)
    model(ids, context_mask=context)
    routes = model.trace.steps[0]
    for row in range(8):
        assert model.trace.paths(row) == [by_hand(backbone, model.policy, ids[row], 0.5, read=6)[1]]
    model(other, context_mask=context)
    assert torch.equal(model.trace.steps[0], routes)
    model(other)
    assert not torch.equal(model.trace.steps[0], routes), "the answers move no gate: the test shows nothing"
    nothing = torch.zeros_like(context)
    model(ids, context_mask=nothing)
    assert model.trace.steps[0].all()


@torch.no_grad()
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("record", [False, True])
def test_captured_decode_steps_follow_the_prompts_route(kv, record):
    model = gated(tiny(seed=1), kv, seed=3)
    pool = Decoders(lambda _: Tape() if record else None, 8)
    for seed in range(3):  # other prompts, other routes, the same buffers
        ids, mask = prompts(batch=3, length=7, seed=seed)
        tokens = torch.randint(1, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(seed))
        caches = [pool.lease(model, 16, 3), RoutedCache(7, kv)]
        for step in range(7):
            new = ids if step == 0 else tokens[:, step - 1 : step]
            mask = mask if step == 0 else torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            found = []
            for cache in caches:
                logits = model(new, mask, past_key_values=cache, position_ids=positions).logits[:, -1]
                found.append((logits, model.trace.steps[-1]))
            torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
            assert torch.equal(found[0][1], found[1][1])
        assert caches[0].graph is not None
        assert distinct(model) > 1


@torch.no_grad()
def test_a_saved_run_computes_the_same(tmp_path):
    backbone = tiny(blocks=6)
    backbone.resize_token_embeddings(300)
    backbone.save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    policy = gates_for(backbone, threshold=0.1 + 0.2, removed=2)
    info = runs.RunInfo(
        "first", "first", policy.settings(), "tiny", runs.relative(tmp_path / "backbone", tmp_path / "run")
    )
    runs.save(tmp_path / "run", info, policy)
    loaded = runs.load(tmp_path / "run", device="cpu", dtype="float32")
    assert loaded.policy.thresholds == {2: 0.1 + 0.2}
    ids, mask = prompts()
    before = RoutedModel(backbone, policy).eval()
    for budget in (None, 4 / 6, 1.0):
        expected = before(ids, mask, budget=budget).logits
        assert torch.equal(loaded(ids, mask, budget=budget).logits, expected)
        assert torch.equal(loaded.trace.steps[0], before.trace.steps[0])


def test_other_depths_are_refused_and_the_legal_ones_named():
    policy = policies.create("first", blocks=10, width=4, thresholds={"3": 0.4, "5": 0.7})
    state = policy.begin([0.7, 1.0, 0.5], 3, torch.device("cpu"))
    assert state.threshold.tolist() == [0.4, -math.inf, 0.7]
    assert state.executed.tolist() == [7, 10, 5]
    with pytest.raises(
        BudgetError, match=r"0\.8 would run 8 of 10 .* 0\.5 \(5 blocks\), 0\.7 \(7 blocks\), 1 \(10 blocks\)"
    ):
        policy.begin(0.8, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="has 2"):
        policy.begin(None, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="9 removed"):
        FirstPolicy(10, 4, {9: 0.5})
    fresh = FirstPolicy(10, 4, {3: 0.5})
    hidden = torch.randn(2, 5, 4)
    assert (
        fresh.weights(fresh.begin(1.0, 2, torch.device("cpu")), 4, hidden, None).tolist()
        == [[pytest.approx(START)] * 5] * 2
    )
    assert fresh.gate(fresh.begin(1.0, 2, torch.device("cpu")), 9, hidden, None) is None


# ---- threshold -------------------------------------------------------------------------------------------------------


def mean_depths(backbone, policy, sequences):
    """Every reachable mean depth, by a slow walk: between two neighbouring probabilities nothing changes."""
    depths, threshold = [], 0.0
    while threshold < 1:
        executed, above = 0, 1.0
        for ids in sequences:
            hidden, given = inputs_of_blocks(backbone, ids[None])
            for index, layer in enumerate(backbone.model.layers):
                mean = probability(policy, index, hidden[0]).mean().item() if 0 < index < len(policy.bias) + 1 else 1.0
                if mean >= threshold:
                    above = min(above, mean)
                    hidden = layer(hidden, **given)
                    executed += 1
        depths.append(executed / len(sequences))
        threshold = above + 1e-9
    return depths


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_brings_the_mean_depth_nearest_to_the_depth_asked_for(seed):
    backbone = tiny(blocks=6, seed=seed).double()
    policy = gates_for(backbone, seed).double()
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(1, VOCABULARY, (4 + i,), generator=generator) for i in range(5)]
    reachable = mean_depths(backbone, policy, sequences)
    assert max(reachable) == 6
    for removed in (1, 2, 3, 4):
        found = calibrate(backbone, policy, [ids.tolist() for ids in sequences], removed, batch_size=3)
        off = abs(found.executed_mean - (6 - removed))
        crossings = sum((a - 6 + removed) * (b - 6 + removed) < 0 for a, b in itertools.pairwise(reachable))
        if crossings <= 1:
            assert off == pytest.approx(min(abs(mean - 6 + removed) for mean in reachable))
        assert off < 0.5
        model = RoutedModel(backbone, FirstPolicy(6, 32, {removed: found.threshold}).double())
        model.policy.load_state_dict(policy.state_dict())
        executed = []
        for ids in sequences:
            model(ids[None])
            executed.append(model.trace.executed().item())
        assert sum(executed) / 5 == pytest.approx(found.executed_mean)
    assert policy.thresholds == {3: 0.5}


@torch.no_grad()
def test_few_passes_find_a_threshold_among_many_prompts(capfd):
    backbone = tiny(blocks=12)
    policy = gates_for(backbone, 4)
    sequences = torch.randint(1, VOCABULARY, (64, 6), generator=torch.Generator().manual_seed(0)).tolist()
    found = calibrate(backbone, policy, sequences, 5, batch_size=64)
    assert abs(found.executed_mean - 7) < 0.05
    passes = int(capfd.readouterr().err.split("pass [")[-2].split()[-1].removesuffix("pass") or 0)
    assert passes < MOST_PASSES / 2


# ---- training --------------------------------------------------------------------------------------------------------

PAIRS = [(f"question {i}: what follows {i}?", f"{i + 1} follows, of course {'!' * (i % 3)}") for i in range(12)]
SETTINGS = Training(
    epochs=2, batch_size=3, warmup_steps=1, max_length=64, save_steps=2, logging_steps=1, learning_rate=1e-2, lora_rank=2
)  # fmt: skip
FIRST = First(skip_weight=0.5, epochs=1, learning_rate=1e-2, calibration_prompts=8)


def fit(folder, first=FIRST, stop_after=None, lora=True):
    """Fit a tiny model; optionally die at a step. Returns (fitted, policy, backbone, steps logged)."""
    backbone = tiny("llama", blocks=6)
    backbone.resize_token_embeddings(300)
    policy = FirstPolicy(6, 32)
    steps = []

    def log(step, values):
        steps.append(step)
        if stop_after is not None and step >= stop_after:
            raise KeyboardInterrupt

    settings = SETTINGS if lora else SETTINGS.model_copy(update={"lora_rank": 0})
    fitted = two_phases.fit(Job(backbone, byte_tokenizer(), PAIRS, settings, 2, folder, 0, log), policy, first)
    return fitted, policy, backbone, steps


def test_each_phase_trains_its_own_part(tmp_path):
    untouched = tiny("llama", blocks=6)
    untouched.resize_token_embeddings(300)
    gates_only, gates, backbone, _ = fit(tmp_path / "gates", lora=False)
    assert gates_only.adapted is None
    assert gates.weight.ne(0).any(1).all(), "a gate did not learn"
    for (name, before), after in zip(untouched.named_parameters(), backbone.parameters(), strict=True):
        assert torch.equal(before, after), name
    both, policy, _, steps = fit(tmp_path / "both")
    assert torch.equal(policy.weight, gates.weight)
    assert torch.equal(policy.bias, gates.bias)
    assert policy.thresholds == {2: both.threshold}
    assert gates.thresholds == {2: gates_only.threshold}
    moved = [p for n, p in both.adapted.named_parameters() if "lora_B" in n]
    assert any(p.abs().sum() > 0 for p in moved)
    assert gates_only.steps == 4
    assert both.steps == 4 + 8
    assert steps == [point["step"] for point in both.curve] == list(range(1, 13))
    assert gates_only.trainable == 4 * 32 + 4
    assert all(point["executed_fraction"] == 1 for point in both.curve[:4])
    assert all(point["executed_fraction"] < 1 for point in both.curve[4:])
    assert both.curve[3]["gate_probability"] < both.curve[0]["gate_probability"]  # it is paid for


def test_lora_learns_on_the_route_that_inference_takes():
    def nll(logits, ids):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    backbone = tiny("llama", blocks=6, seed=1)
    policy = gates_for(backbone, 3, removed=2).requires_grad_(False)
    ids = torch.randint(1, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    context = (torch.arange(9) < 4)[None]
    with routed(backbone, Routing(policy, None, context_mask=context)) as routing:
        nll(backbone(ids).logits, ids).backward()
    kept = list(routing.trace.paths()[0])
    assert kept == list(by_hand(backbone, policy, ids[0], 0.5, read=4)[1])
    assert len(kept) < 6
    gradients = {name: p.grad for name, p in backbone.named_parameters()}
    backbone.zero_grad(set_to_none=True)
    nll(sliced(backbone, kept)(ids).logits, ids).backward()
    for name, parameter in backbone.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("stop_after", [3, 9])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path, stop_after):
    """In the first phase from its last checkpoint; in the second one without repeating the first."""
    whole, whole_policy, _, _ = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_after=stop_after)
    if stop_after == 9:  # what the first phase has left is enough
        (checkpoints,) = (tmp_path / "cut").glob("**/gates")
        shutil.rmtree(checkpoints)
    resumed, policy, _, steps = fit(tmp_path / "cut")
    assert steps[0] == (3 if stop_after == 3 else 9)
    assert (resumed.steps, resumed.tokens, resumed.trainable) == (whole.steps, whole.tokens, whole.trainable)
    assert (resumed.threshold, resumed.executed_mean) == (whole.threshold, whole.executed_mean)
    assert [point["loss"] for point in resumed.curve] == [point["loss"] for point in whole.curve]
    for name, value in whole_policy.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value)
    for (name, a), (_, b) in zip(whole.adapted.named_parameters(), resumed.adapted.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_other_settings_do_not_go_on_from_what_is_left(tmp_path):
    first, _, _, _ = fit(tmp_path, lora=False)
    other, _, _, steps = fit(tmp_path, FIRST.model_copy(update={"skip_weight": 0.0}), lora=False)
    assert steps == [1, 2, 3, 4]
    assert other.curve != first.curve


def test_a_threshold_may_be_given(tmp_path):
    fitted, policy, backbone, _ = fit(tmp_path, FIRST.model_copy(update={"threshold": 0.88}), lora=False)
    assert policy.thresholds == {2: 0.88}
    tokenizer = byte_tokenizer()
    ran = [
        len(by_hand(backbone, policy, torch.tensor(tokenizer(prompt).input_ids), 0.88)[1]) for prompt, _ in PAIRS[:8]
    ]
    assert fitted.executed_mean == sum(ran) / 8


def ran_by_hooks(backbone, policy, prompts):
    """Blocks that each prompt runs, counted at the layers themselves."""
    calls = []
    handles = [layer.mlp.register_forward_hook(lambda *_: calls.append(1)) for layer in backbone.model.layers]
    found = []
    try:
        for prompt in prompts:
            calls.clear()
            with torch.no_grad(), routed(backbone, Routing(policy, None)):
                backbone(torch.tensor([prompt]))
            found.append(len(calls))
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("lora", [True, False])
def test_the_threshold_is_chosen_on_the_contexts_given_for_the_model_as_it_ends(tmp_path, lora):
    backbone = tiny("llama", blocks=6)
    backbone.resize_token_embeddings(300)
    policy = FirstPolicy(6, 32)
    generator = torch.Generator().manual_seed(4)
    contexts = [torch.randint(1, 90, (5 + place % 7,), generator=generator).tolist() for place in range(10)]
    settings = SETTINGS if lora else SETTINGS.model_copy(update={"lora_rank": 0})
    job = Job(backbone, byte_tokenizer(), PAIRS, settings, 2, tmp_path, 0)
    fitted = two_phases.fit(job, policy, FIRST, contexts)
    backbone.eval()
    assert sum(ran_by_hooks(backbone, policy, contexts)) / 10 == pytest.approx(fitted.executed_mean)
    again = calibrate(backbone, policy, contexts, 2, 3)
    assert (again.threshold, again.executed_mean) == (pytest.approx(fitted.threshold), fitted.executed_mean)


def test_contexts_come_from_the_training_questions_of_the_tasks_in_turn(tmp_path):
    for name in ("piqa", "winogrande"):
        materialise(name, "embedded", tmp_path / name)
    tokenizer = byte_tokenizer()
    found = training_contexts(tmp_path, ["piqa", "winogrande"], tokenizer, 5)
    items = training_items(tmp_path, ["piqa", "winogrande"], tokenizer, 3)
    first, second = ([list(item.shared) for item in items[name]] for name in ("piqa", "winogrande"))
    assert found == [first[0], second[0], first[1], second[1], first[2]]
    assert len(training_contexts(tmp_path, ["piqa"], tokenizer, 1000)) == 24  # all that there are
    (tmp_path / "piqa/train.jsonl").unlink()
    with pytest.raises(UserError, match="piqa"):
        training_contexts(tmp_path, ["piqa"], tokenizer, 5)
