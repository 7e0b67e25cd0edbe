"""The budget predictor: gradients against finite differences, losses against whole passes, choices against the truth."""

import json
import math
from itertools import product
from statistics import fmean

import numpy as np
import pytest
import torch
from models import VOCABULARY, prompts, tiny, with_router
from tape import Tape
from test_engine import CountBlocks
from torch.nn.functional import cross_entropy

import buddy
from buddy import data, runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.cli import main
from buddy.errors import BudgetError, UserError
from buddy.evaluation import budgets
from buddy.evaluation.breakdown import COMPONENTS, breakdown
from buddy.evaluation.harness import BuddyLM
from buddy.frontiers import Table, area, hull, interval, rank_correlation
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.predictor import BudgetPredictor, mean_feature
from buddy.policies.static import StaticPolicy
from buddy.routing.budget import price_of
from buddy.routing.graphs.decoders import Decoders
from buddy.routing.kv import RoutedCache
from buddy.routing.model import RoutedModel
from buddy.routing.profiling import PREDICTOR
from buddy.settings import Breakdown, Predictor
from buddy.study.records import Record
from buddy.training import depth_losses, grpo, predictor, predictor_examples, tuned_predictor
from buddy.training.depth_losses import Rollouts, loss_table
from buddy.training.rise_predictor import PENALTIES

PAPER = {"depths": [3, 4, 5, 6, 7], "preset": "paper"}
TUNED = {"depths": [3, 5, 7], "preset": "tuned", "hidden": 8, "price": 0.4}


def rows(count=6, seed=0):
    """Random examples: prompts of 3 to 9 tokens, responses of 1 to 6."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(*span, (), generator=generator)) for span in ((3, 10), (1, 7)))
        ids = torch.randint(1, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        found.append({"input_ids": ids, "prompt_length": prompt})
    return found


def decided(settings=TUNED, **options):
    """A routed model with a predictor of large random weights, so that prompts differ in what they get."""
    model = with_router(tiny(), **options)
    torch.manual_seed(1)
    model.policy.predictor = BudgetPredictor(model.policy.width, **settings)
    for parameter in (*model.policy.predictor.down.parameters(), *model.policy.predictor.up.parameters()):
        torch.nn.init.normal_(parameter, std=3.0)
    return model


@torch.no_grad()
def expected_depths(model, ids, mask, price=None):
    """What the predictor says of prompts, each read alone from a run of the first block."""
    found = []
    for row, real in zip(ids, mask.bool(), strict=True):
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        model.backbone(row[real][None], past_key_values=cache, use_cache=True)
        context = mean_feature(cache.layers[0].keys, cache.layers[0].values, model.policy.feature, None)
        choice = model.policy.predictor(context, 0.4 if price is None else price).argmax().item()
        found.append(model.policy.predictor.depths[choice].item())
    return found


# ---- what responses cost -------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_loss(model, row, depth):
    """One example, one depth, one whole pass, routed by its prompt."""
    ids, first = torch.tensor([row["input_ids"]]), row["prompt_length"]
    context = torch.arange(ids.shape[1])[None] < first
    logits = model(ids, budget=depth / model.blocks, context_mask=context).logits[0]
    return cross_entropy(logits[first - 1 : -1].double(), ids[0, first:]).item()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("source", "feature"), [(1, "value"), (2, "key")])
def test_the_table_has_the_losses_of_whole_passes(architecture, source, feature, monkeypatch):
    monkeypatch.setattr(depth_losses, "HEAD_TOKENS", 2)
    model = with_router(tiny(architecture), feature, source)
    examples, depths = rows(), [3, 4, 6, 7]
    contexts, losses = loss_table(model.backbone, model.policy, examples, depths, batch_size=4)
    slow = torch.tensor([[one_loss(model, row, depth) for depth in depths] for row in examples])
    torch.testing.assert_close(losses, slow.double(), rtol=1e-4, atol=1e-5)
    assert (slow[:, :-1] - slow[:, -1:]).abs().min() > 1e-4  # the depths matter
    alone = torch.cat([Rollouts(model.backbone, model.policy, [row]).contexts for row in examples])
    torch.testing.assert_close(contexts, alone)


def test_of_a_question_what_its_options_share_is_read_and_the_answer_scored():
    model = with_router(tiny())
    whole, short = rows(6), []
    for row in whole:
        read = row["prompt_length"] - 2
        short.append({**row, "read_length": read})
    contexts, losses = loss_table(model.backbone, model.policy, short, [3, 5, 7], batch_size=4)
    beginnings = [{**row, "prompt_length": row["read_length"]} for row in short]
    torch.testing.assert_close(contexts, Rollouts(model.backbone, model.policy, beginnings).contexts)
    for found, row in zip(losses, short, strict=True):
        model(torch.tensor([row["input_ids"][: row["read_length"]]]), budget=3 / 7)
        path = model.trace.paths()[0]
        policy = StaticPolicy(7, [block for block in range(7) if block not in path])
        fixed = RoutedModel(model.backbone, policy)
        assert found[0].item() == pytest.approx(one_loss(fixed, row, 3), rel=1e-4)
    assert (losses - loss_table(model.backbone, model.policy, whole, [3, 5, 7])[1]).abs().max() > 1e-4


def test_depths_may_differ_by_example_and_repeat():
    model = with_router(tiny())
    examples = rows(2)
    found = Rollouts(model.backbone, model.policy, examples).losses([[7, 3, 3], [5, 5, 4]])
    assert found[0, 1] == found[0, 2]
    pairs = zip(examples, [[7, 3, 3], [5, 5, 4]], strict=True)
    slow = [[one_loss(model, row, depth) for depth in wanted] for row, wanted in pairs]
    torch.testing.assert_close(found, torch.tensor(slow).double(), rtol=1e-4, atol=1e-5)


def test_what_depths_have_in_common_is_run_once():
    model = with_router(tiny())
    examples = rows(3)
    counter = CountBlocks(model.backbone)
    batch = Rollouts(model.backbone, model.policy, examples)
    batch.losses([[3, 5, 7]] * 3)
    counter.close()
    naive = 3 * (3 + 5 + 7)
    assert counter.total() < naive
    # The last block has as many states as there are routes, the first one as many as there are examples.
    by_block = [sum(rows for index, rows in counter.rows if index == block) for block in range(7)]
    assert (by_block[0], by_block[-1]) == (3, 9)
    for block in range(1, 6):  # a block that a depth runs is run for each different past, at most once per depth
        assert by_block[block] <= 9


def test_a_table_is_not_measured_twice(tmp_path, monkeypatch):
    model = with_router(tiny())
    monkeypatch.setattr(depth_losses, "SHARD", 2)
    first = loss_table(model.backbone, model.policy, rows(5), [3, 7], 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "losses-00001.safetensors").unlink()
    asked = []
    monkeypatch.setattr(depth_losses, "Rollouts", lambda *given: asked.append(len(given[2])) or Rollouts(*given))
    again = loss_table(model.backbone, model.policy, rows(5), [3, 7], 2, tmp_path)
    assert asked == [2]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    loss_table(model.backbone, model.policy, rows(5, seed=1), [3, 7], 2, tmp_path)
    assert asked == [2, 2, 2, 1]  # other examples: nothing stored is of use


# ---- GRPO ----------------------------------------------------------------------------------------------------------------

THETA = torch.tensor([0.3, -0.7, 0.1], dtype=torch.float64)
REWARDS = np.array([1.0, 0.2, -2.0])


def policy_of(theta):
    weights = np.exp(theta - np.max(theta))
    return weights / weights.sum()


def slope(function, theta, step=1e-6):
    """Central differences."""
    found = []
    for place in range(len(theta)):
        shift = np.zeros(len(theta))
        shift[place] = step
        found.append((function(theta + shift) - function(theta - shift)) / (2 * step))
    return np.array(found)


def mean_gradient(advantages_of, group, entropy_weight=0.0):
    """The code's gradient, averaged over all groups by their probability."""
    chances, total = policy_of(THETA.numpy()), torch.zeros(3, dtype=torch.float64)
    for actions in product(range(3), repeat=group):
        theta = THETA.clone().requires_grad_()
        drawn = torch.tensor([actions])
        advantages = advantages_of(torch.tensor(REWARDS)[drawn])
        grpo.grpo_loss(theta[None], drawn, advantages, entropy_weight).backward()
        total += np.prod(chances[list(actions)]) * theta.grad
    return total.numpy()


@pytest.mark.parametrize("group", [2, 4])
def test_centred_rewards_give_the_gradient_of_the_expected_reward(group):
    """A group's mean takes part in its own members, hence the factor (G - 1) / G."""
    found = mean_gradient(lambda rewards: rewards - rewards.mean(1, keepdim=True), group)
    expected = slope(lambda theta: -policy_of(theta) @ REWARDS, THETA.numpy()) * (group - 1) / group
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_the_mean_grpo_gradient_is_that_of_its_objective(entropy_weight):
    """Groups drawn from a fixed policy, advantages standardised by hand, the log-probabilities differentiated."""
    drawn_from = policy_of(THETA.numpy())

    def objective(theta):
        pi, total = policy_of(theta), 0.0
        for actions in product(range(3), repeat=4):
            got = REWARDS[list(actions)]
            spread = math.sqrt(((got - got.mean()) ** 2).mean())
            advantages = (got - got.mean()) / spread if spread > 0 else 0 * got
            total -= np.prod(drawn_from[list(actions)]) * np.mean(advantages * np.log(pi[list(actions)]))
        return total + entropy_weight * np.sum(pi * np.log(pi))

    found = mean_gradient(grpo.standardised, 4, entropy_weight)
    np.testing.assert_allclose(found, slope(objective, THETA.numpy()), rtol=1e-5, atol=1e-8)


def test_depths_are_drawn_from_the_policy():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    drawn = torch.cat([grpo.draw(logits, 50, 0, step) for step in range(200)], 1)
    shares = torch.stack([torch.bincount(row, minlength=3) / row.numel() for row in drawn])
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.02, rtol=0)
    assert not torch.equal(grpo.draw(logits, 50, 0, 1), grpo.draw(logits, 50, 1, 1))


def test_every_pass_shows_every_example_once():
    examples = list(range(7))
    seen = [example for step in range(7) for example in grpo.batch_of(examples, 2, 3, step)]
    assert sorted(seen[:7]) == sorted(seen[7:]) == examples
    assert seen[:7] != seen[7:]


def test_the_published_values_are_the_defaults():
    settings = Predictor()
    assert (settings.group, settings.batch_size, settings.steps, settings.learning_rate) == (4, 2, 10_000, 1e-5)
    assert (settings.quality_weight, settings.cost_weight, settings.data) == (5.0, 0.05, ["alpaca"])
    policy = BuddyPolicy(32, 16)
    depths = predictor.depths_of(policy, "paper", 9, 16)
    assert depths == [k + 2 for k in range(1, 31)]  # k of {1 .. 30} middle blocks, and the two that always run
    fresh = BudgetPredictor(16, depths, "paper")
    assert grpo.entropy(fresh(torch.randn(5, 16))).mean().item() == pytest.approx(math.log(30), abs=1e-6)
    assert predictor.depths_of(policy, "tuned", 9, 16) == [16, 18, 20, 22, 24, 26, 28, 30, 32]
    assert predictor.depths_of(policy, "tuned", 9, 4) == [28, 29, 30, 31, 32]


def trained(preset, folder, on_log=None, **settings):
    model = with_router(tiny())
    chosen = Predictor(**{"steps": 12, "save_steps": 5, "logging_steps": 3, "learning_rate": 0.01, **settings})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = predictor.train(
        model.backbone, model.policy, rows(12), preset, chosen, 4, folder, 0, on_log or (lambda *_: None)
    )
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # backbone and router are frozen
    return fitted, model.policy.predictor


def test_an_update_is_what_the_recipe_says(tmp_path):
    """One step by hand: draw, score by whole passes, standardise, differentiate, Adam."""
    fitted, network = trained("paper", tmp_path, steps=1, entropy_weight=0.0)
    model = with_router(tiny())
    torch.manual_seed(0)
    twin = BudgetPredictor(model.policy.width, list(range(3, 8)), "paper", hidden=32)
    batch = grpo.batch_of(rows(12), 2, 0, 0)
    logits = twin(Rollouts(model.backbone, model.policy, batch).contexts)
    actions = grpo.draw(logits, 4, 0, 0)
    scores = torch.tensor(
        [
            [-5.0 * one_loss(model, row, 3 + k) - 0.05 * (3 + k) / 7 for k in drawn]
            for row, drawn in zip(batch, actions.tolist(), strict=True)
        ]
    )
    advantages = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0)
    log_pi = logits.log_softmax(-1)
    loss = -sum(advantages[b, g] * log_pi[b, actions[b, g]] for b in range(2) for g in range(4)) / 8
    optimiser = torch.optim.Adam(twin.parameters(), lr=0.01)
    loss.backward()
    optimiser.step()
    for found, expected in zip(network.parameters(), twin.parameters(), strict=True):
        surely = expected.grad.abs() > 1e-5  # Adam's first step has the sign of the gradient, which rounding can turn
        torch.testing.assert_close(found[surely], expected[surely], rtol=1e-3, atol=1e-5)
        assert surely.any() or expected is twin.down.weight or expected is twin.down.bias  # behind a layer of zeros
    point = fitted.curve[0]
    assert point["reward"] == pytest.approx(scores.mean().item(), rel=1e-4)
    assert point["histogram"] == torch.bincount(actions.flatten(), minlength=5).tolist()
    assert point["mean_budget"] == pytest.approx((3 + actions.float()).mean().item() / 7)
    assert point["entropy"] == pytest.approx(math.log(5))


def test_a_killed_paper_training_ends_as_an_uninterrupted_one(tmp_path):
    whole, network = trained("paper", tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(step, values):
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        trained("paper", tmp_path / "cut", kill)
    seen = []
    resumed, again = trained("paper", tmp_path / "cut", lambda step, _: seen.append(step))
    assert seen == [6, 9, 12]  # it went on from step 5
    seen.clear()
    trained("paper", tmp_path / "cut", lambda step, _: seen.append(step), learning_rate=0.02)
    assert seen == [3, 6, 9, 12]  # of another training nothing is taken
    assert resumed == whole
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    assert any(value.abs().max() > 0 for value in (network.up.weight, network.up.bias))


def test_a_killed_tuned_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(depth_losses, "SHARD", 4)
    whole, network = trained("tuned", tmp_path / "whole", epochs=3, depths=3)
    losses = []

    def dies(*given):
        losses.append(given)
        if len(losses) == 2:
            raise KeyboardInterrupt
        return Rollouts(*given)

    monkeypatch.setattr(depth_losses, "Rollouts", dies)
    with pytest.raises(KeyboardInterrupt):
        trained("tuned", tmp_path / "cut", epochs=3, depths=3)
    resumed, again = trained("tuned", tmp_path / "cut", epochs=3, depths=3)
    assert len(losses) == 2 + 2  # of three parts one was there
    assert resumed == whole
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


# ---- the recipe that learns ----------------------------------------------------------------------------------------------


def test_the_tuned_gradient_is_that_of_the_expectation():
    torch.manual_seed(0)
    network = BudgetPredictor(4, [3, 5, 7], "tuned", hidden=5, price=0.5).double()
    torch.nn.init.normal_(network.up.weight)
    contexts, scaled = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    prices = torch.rand(2, 6).double()
    parameters = dict(network.named_parameters())
    start = {name: value.detach().numpy().copy() for name, value in parameters.items()}

    def objective(values):
        """With loops, and nothing of the code's."""
        down = contexts.numpy() @ values["down.weight"].T + values["down.bias"]
        estimated = np.array([1, 0.5, 0]) + (down / (1 + np.exp(-down))) @ values["up.weight"].T + values["up.bias"]
        total = 0.0
        for p, b in product(range(2), range(6)):
            price = prices[p, b].item()
            pi = policy_of(
                -np.exp(values["log_sharpness"]) * ((1 - price) * estimated[b] + price * np.array([0, 0.5, 1]))
            )
            total += pi @ ((1 - price) * scaled[b].numpy() + price * np.array([0, 0.5, 1])) / 12
        return total + np.mean((estimated - scaled.numpy()) ** 2)

    network.rise.copy_(torch.tensor([1, 0.5, 0]))
    loss = tuned_predictor.objective(network, contexts, scaled, prices)
    assert loss.item() == pytest.approx(objective(start), rel=1e-9)
    loss.backward()
    for name, value in start.items():
        expected = slope(
            lambda flat, name=name, value=value: objective({**start, name: flat.reshape(value.shape)}), value.flatten()
        )
        np.testing.assert_allclose(parameters[name].grad.numpy().flatten(), expected, rtol=1e-5, atol=1e-8)


def toy(count, seed):
    """Prompts of two kinds: a deep one that loses 4 nats without depth, and one that loses nothing; noise besides."""
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randn(count, 8, generator=generator)
    deep = (contexts[:, 0] > 0).double()
    steep = 4 * deep.unsqueeze(1) * torch.tensor([1.0, 0.5, 0.0]).double()
    hard = 3 + torch.randn(count, 1, generator=generator).double()  # how hard a response is says nothing about depth
    return contexts, hard + steep + 0.05 * torch.randn(count, 3, generator=generator).double()


def test_points_of_every_trial_say_which_it_is():
    torch.manual_seed(0)
    network = BudgetPredictor(8, [3, 5, 7], "tuned", hidden=16, price=0.5)
    told = []
    curve, _ = tuned_predictor.fit(
        network, *toy(40, 0), 7, Predictor(epochs=5), on_log=lambda step, values: told.append((step, values))
    )
    (trial,) = {point["trial"] for point in curve}
    own = [values for _, values in told if values["trial"] == trial]
    assert [values["held_out"] for values in own] == [point["held_out"] for point in curve[1:]]
    assert [values["pass"] for values in own] == [point["step"] for point in curve[1:]]
    assert {values["trial"] for _, values in told} == {0, 1, 2}
    assert [step for step, _ in told] == sorted({step for step, _ in told})


def test_it_learns_which_prompts_need_depth():
    torch.manual_seed(0)
    network = BudgetPredictor(8, [3, 5, 7], "tuned", hidden=32, price=0.5)
    curve, kept = tuned_predictor.fit(network, *toy(400, 0), 7, Predictor(epochs=100))
    contexts, losses = toy(300, 1)
    chosen = network.choose(contexts, 0.5)
    right = torch.where(contexts[:, 0] > 0, 7, 3)
    surely = contexts[:, 0].abs() > 0.3
    assert (chosen == right)[surely].float().mean() > 0.9
    end = next(point for point in curve if point["step"] == kept)
    assert curve[0]["entropy"] > 3 * end["entropy"]
    assert end["entropy"] < 0.2 * math.log(3)
    found = budgets.measure(network, contexts, full_table(losses), 7, resamples=200)
    assert found["beats_constant"]
    assert found["gain"]["low"] > 0.2
    assert found["entropy"] < 0.2 * math.log(3)
    assert found["histogram"][0] > 100
    assert found["histogram"][2] > 100


def full_table(losses):
    """Losses at 3, 5 and 7 as a table of 3 to 7, linear between."""
    between = (losses[:, :-1] + losses[:, 1:]) / 2
    return torch.stack([losses[:, 0], between[:, 0], losses[:, 1], between[:, 1], losses[:, 2]], 1)


def test_what_cannot_be_told_apart_is_not_said_to_beat_constants():
    """Contexts that say nothing about depth: no gain on other prompts."""
    torch.manual_seed(0)
    network = BudgetPredictor(8, [3, 5, 7], "tuned", hidden=32, price=0.5)
    _, losses = toy(400, 0)
    tuned_predictor.fit(network, torch.randn(400, 8), losses, 7, Predictor(epochs=20))
    found = budgets.measure(network, torch.randn(300, 8), full_table(toy(300, 1)[1]), 7, resamples=200)
    assert not found["beats_constant"]
    assert abs(found["gain"]["value"]) < 0.15


def test_a_price_is_from_quality_alone_to_depth_alone():
    torch.manual_seed(0)
    network = BudgetPredictor(8, [3, 5, 7], "tuned", hidden=32, price=0.5)
    contexts, losses = toy(200, 0)
    losses += torch.tensor([0.6, 0.3, 0.0])  # depth is worth something to everybody
    tuned_predictor.fit(network, contexts, losses, 7, Predictor(epochs=40))
    means = [network.choose(contexts, price).double().mean().item() for price in (0.0, 0.3, 0.6, 1.0)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 6.5
    assert means[-1] == 3


def test_losses_are_measured_from_full_depth_in_units_of_the_shallowest():
    network = BudgetPredictor(2, [3, 5, 7], "tuned", price=0.5)
    contexts = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    scaled = tuned_predictor.prepare(network, contexts, torch.tensor([[5.0, 3.0, 2.0], [9.0, 6.0, 5.0]]).double())
    nats = (3 + 4) / 2
    torch.testing.assert_close(scaled, torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 0.0]]) / nats)
    assert network.nats.item() == pytest.approx(nats)
    torch.testing.assert_close(network.rise, torch.tensor([3.5, 1.0, 0.0]) / nats)
    assert network.mean.tolist() == [2, 5]
    flat = torch.tensor([[1.0, 3.0, 2.0], [6.0, 6.0, 5.0]]).double()  # depth is worth nothing on average
    tuned_predictor.prepare(network, contexts, flat)
    assert network.nats.item() == pytest.approx(0.1)
    assert network.scale[0].item() == 1


def test_too_few_examples_are_refused():
    network = BudgetPredictor(8, [3, 5, 7], "tuned", price=0.5)
    with pytest.raises(UserError, match="examples: 3 prompts"):
        tuned_predictor.fit(network, *toy(3, 0), 7, Predictor())


# ---- in use --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kv", ["zero", "mask", "project"])
@pytest.mark.parametrize(("budget", "price"), [(None, None), ("auto", None), ("auto:0.1", 0.1), ("auto:1", 1.0)])
def test_hooks_count_the_depths_that_the_predictor_chose(kv, budget, price):
    model = decided(kv=kv)
    ids, mask = prompts(batch=6)
    expected = expected_depths(model, ids, mask, price)
    assert price == 1.0 or len(set(expected)) > 1
    counter = CountBlocks(model.backbone, "mlp")
    model.generate(ids, mask, budget=budget, max_new_tokens=5, do_sample=False)
    counter.close()
    assert model.trace.executed().tolist() == [expected] * 5
    assert counter.total() == 5 * sum(expected)


@torch.no_grad()
def test_a_batch_is_its_sequences_alone():
    model = decided()
    ids, mask = prompts(batch=6)
    together = model.generate(ids, mask, budget="auto:0.2", max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    executed = model.trace.executed()
    for row in range(6):
        own = ids[row][mask[row].bool()][None]
        alone = model.generate(own, budget="auto:0.2", max_new_tokens=6, do_sample=False)[0, own.shape[1] :]
        assert torch.equal(alone, together[row])
        assert torch.equal(model.trace.executed()[:, 0], executed[:, row])


@torch.no_grad()
def test_answers_do_not_choose_their_depth():
    model = decided()
    ids, mask = prompts(batch=4)
    context = torch.ones_like(ids).bool()
    context[:, 6:] = False
    model(ids, mask, budget="auto", context_mask=context)
    chosen = model.trace.executed()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 13) % VOCABULARY
    model(changed, mask, budget="auto", context_mask=context)
    assert torch.equal(model.trace.executed(), chosen)
    assert chosen[0].tolist() == expected_depths(model, ids[:, :6], mask[:, :6])


@torch.no_grad()
def test_the_causal_form_chooses_what_decoding_chooses():
    model = decided()
    ids, mask = prompts(batch=4)
    context = torch.ones_like(ids).bool()
    context[:, 6:] = False
    causal = model(ids, mask, budget="auto:0.3", routing="causal", context_mask=context).logits
    routes = torch.stack(model.trace.steps)
    cache = model.new_cache(16)
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 9)]:
        out = model(ids[:, start:end], mask[:, :end], budget="auto:0.3", past_key_values=cache)
        torch.testing.assert_close(out.logits[:, -1], causal[:, end - 1], rtol=1e-4, atol=1e-4)
        assert torch.equal(model.trace.steps[-1], routes[end - 1])


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: Decoders(lambda _: None, 8), lambda: Decoders(lambda _: Tape(False), 8)])
@pytest.mark.parametrize("kv", ["zero", "mask", "project"])
def test_captured_steps_are_those_of_the_eager_engine(make, kv):
    model, decoders = decided(kv=kv), make()
    for seed, budget in ((0, "auto"), (1, [1.0, 3 / 7, 5 / 7]), (2, "auto:0.1")):  # all with the same graphs
        ids, mask = prompts(seed=seed)
        tokens, results = torch.randint(1, VOCABULARY, (3, 6)), []
        for cache in (RoutedCache(7, kv), decoders.lease(model, 32, 3)):
            attention, found = mask, []
            for step in range(6):
                new = ids if step == 0 else tokens[:, step - 1 : step]
                attention = attention if step == 0 else torch.nn.functional.pad(attention, (0, 1), value=1)
                out = model(new, attention, budget=budget, past_key_values=cache)
                found.append((out.logits[:, -1].clone(), model.trace.steps[-1]))
            results.append(found)
            assert (cache.graph is None) == (len(results) == 1)
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(eager[0], graph[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(eager[1], graph[1])
        del cache, out


@torch.no_grad()
def test_explicit_budgets_do_not_ask_it():
    model, plain = decided(), with_router(tiny())
    ids, mask = prompts()
    asked = []
    model.policy.predictor.register_forward_pre_hook(lambda *_: asked.append(1))
    found = model(ids, mask, budget=[1.0, 3 / 7, 5 / 7]).logits
    assert torch.equal(found, plain(ids, mask, budget=[1.0, 3 / 7, 5 / 7]).logits)
    assert not asked
    model.generate(ids, mask, budget="auto", max_new_tokens=4)
    assert len(asked) == 1  # at the prefill, and never again


@pytest.mark.parametrize("budget", ["automatic", "auto:", "auto:much", "auto:1.5", "auto:-0.1", "auto:nan", "0.5", ""])
def test_other_words_are_no_budgets(budget):
    with pytest.raises(BudgetError, match="is neither a number"):
        price_of(budget)
    for model in (decided(), with_router(tiny()), RoutedModel(tiny(), StaticPolicy(7, [2]))):
        with pytest.raises(BudgetError, match="is neither a number"):
            model(prompts()[0], budget=budget)


def test_what_is_not_there_cannot_be_asked():
    ids, _ = prompts()
    for budget in (None, "auto", "auto:0.3"):
        with pytest.raises(UserError, match="buddy predictor --run") as refused:
            with_router(tiny()).generate(ids, budget=budget)
        assert "\n" not in str(refused.value)
    with pytest.raises(BudgetError, match="asks a budget predictor"):
        RoutedModel(tiny(), StaticPolicy(7, [2])).generate(ids, budget="auto:0.3")
    with pytest.raises(BudgetError, match="preset paper"):
        decided(PAPER).generate(ids, budget="auto:0.3")
    decided(PAPER).generate(ids, budget="auto", max_new_tokens=1)
    with pytest.raises(UserError, match="two or more depths"):
        BudgetPredictor(4, [5, 3], "paper")


@torch.no_grad()
def test_its_time_is_a_component_of_the_breakdown():
    model = decided()
    model.tokenizer = byte_tokenizer()
    model.backbone.resize_token_embeddings(300)
    settings = Breakdown(batch_size=2, tokens=6, steps=2, repeats=1, contexts=[8])
    ((_, metrics),) = breakdown(model, ["some text of a prompt"], [2], settings)
    assert tuple(metrics["phases"]["prefill"]["components"]) == COMPONENTS
    prefill, decode = (metrics["auto"]["phases"][phase]["components"] for phase in ("prefill", "decode"))
    assert tuple(prefill) == (*COMPONENTS, PREDICTOR)
    assert prefill[PREDICTOR]["ms"] > 0
    assert PREDICTOR not in decode
    assert sum(part["percent"] for part in prefill.values()) == pytest.approx(100)
    assert 3 <= metrics["auto"]["executed_mean"] <= 7


def test_the_harness_leaves_the_budget_to_it():
    model = decided()
    model.tokenizer = byte_tokenizer()
    model.backbone.resize_token_embeddings(300)
    lm = BuddyLM(model, budget="auto:0.2", batch_size=2)
    requests = [(("", ""), [5, 9, 13, 40], [7, 8]), (("", ""), [50, 6], [3])]
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = [expected_depths(model, torch.tensor([c]), torch.ones(1, len(c)), 0.2)[0] for _, c, _ in requests]
    assert lm.executed_mean == pytest.approx(sum(expected) / 2)


@torch.no_grad()
@pytest.mark.parametrize("settings", [PAPER, TUNED])
def test_a_saved_predictor_says_the_same(tmp_path, settings):
    model = decided(settings)
    if model.policy.predictor.priced:
        tuned_predictor.prepare(model.policy.predictor, torch.randn(5, 16), torch.randn(5, 3))
    folder, run = tmp_path / "backbone", tmp_path / "run"
    model.backbone.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    info = runs.RunInfo("buddy", "buddy", model.policy.settings(), "tiny", runs.relative(folder, run))
    runs.save(run, info, model.policy)
    assert json.loads((run / "run.json").read_text())["policy_settings"]["predictor"]["preset"] == settings["preset"]
    again = buddy.load(run, device="cpu", dtype="float32")
    ids, mask = prompts(batch=5)
    assert torch.equal(again(ids, mask, budget=None).logits, model(ids, mask, budget=None).logits)
    assert "predictor" not in with_router(tiny()).policy.settings()


# ---- frontiers -----------------------------------------------------------------------------------------------------------


def test_the_hull_leaves_out_what_mixing_two_others_beats():
    depths, losses = np.array([2.0, 3.0, 4.0, 6.0]), np.array([4.0, 3.5, 2.0, 1.0])
    assert [corner.tolist() for corner in hull(depths, losses)] == [[2, 4, 6], [4, 2, 1]]
    table = Table.of(np.array([losses - 1, losses + 1]), depths, 6, resamples=3)
    assert table.constant(np.full((4, 1), 3.0))[0, 0] == pytest.approx(3.0)  # half 2, half 4: not 3.5
    assert table.constant(np.full((4, 1), 5.0))[0, 0] == pytest.approx(1.5)


def test_the_arithmetic_of_choices_by_hand():
    losses = np.array([[3.0, 1.0], [2.0, 2.0], [5.0, 1.0], [1.0, 1.0]])
    table = Table.of(losses, [2, 4], 4, resamples=5)
    chosen = np.array([[1, 0], [0, 0], [1, 1], [0, 0]])
    depth, ce = table.at(chosen)
    assert depth[0].tolist() == [3.0, 2.5]
    assert ce[0].tolist() == [(1 + 2 + 1 + 1) / 4, (3 + 2 + 1 + 1) / 4]
    means = losses.mean(0)  # 2.75 and 1.25
    assert table.shuffled(chosen)[0] == pytest.approx([means.mean(), 0.75 * means[0] + 0.25 * means[1]])
    gain = table.constant(depth) - ce
    assert gain[0] == pytest.approx([2.0 - 1.25, 2.375 - 1.75])
    assert area(depth, gain, 4)[0] == pytest.approx((3.0 - 2.5) / 4 * (0.75 + 0.625) / 2)


def test_resampling_is_of_inputs_and_paired():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(50, 1)) + np.array([0.5, 0.0])  # inputs differ much, depths by exactly 0.5
    table = Table.of(losses, [2, 4], 4, resamples=400)
    np.testing.assert_allclose(table.weights.sum(1), 1)
    means = table.mean(losses)
    single, difference = interval(means[:, 0]), interval(means[:, 0] - means[:, 1])
    spread = losses[:, 0].std() / math.sqrt(50)
    assert single["high"] - single["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert difference["high"] - difference["low"] < 1e-9
    assert difference["value"] == pytest.approx(0.5)


def test_rank_correlation_knows_order_and_ties():
    ones = np.full((2, 5), 0.2)
    assert rank_correlation(np.array([1, 2, 3, 4, 9.0]), np.array([1, 4, 9, 16, 17.0]), ones)["value"] == pytest.approx(
        1
    )
    assert rank_correlation(np.array([1, 2, 3, 4, 9.0]), np.array([2, 2, 2, 2, 2.0]), ones) is None
    found = rank_correlation(np.array([1, 2, 2, 3, 4.0]), np.array([5, 3, 4, 4, 1.0]), ones)["value"]
    ranks = np.corrcoef([1, 2.5, 2.5, 4, 5], [5, 2, 3.5, 3.5, 1])[0, 1]
    assert found == pytest.approx(ranks)


def test_a_record_says_what_was_measured():
    """A predictor without a price that has one favourite, on a table of three inputs."""
    network = BudgetPredictor(2, [3, 4], "paper")
    with torch.no_grad():
        network.up.bias.copy_(torch.tensor([0.0, math.log(3)]))
    losses = torch.tensor([[3.0, 1.0, 1.0], [4.0, 4.0, 1.0], [2.0, 1.0, 1.0]]).double()
    found = budgets.measure(network, torch.zeros(3, 2), losses, 5, resamples=50)
    assert (found["depths"], found["choices"], found["price"], found["area"]) == ([3, 4, 5], [3, 4], None, None)
    assert found["entropy"] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert found["entropy_uniform"] == pytest.approx(math.log(2))
    (point,), (sampled,) = found["predictor"], found["sampled"]
    assert (point["depth_mean"], found["histogram"]) == (4, [0, 3])
    assert point["ce_mean"] == pytest.approx(2)
    assert [point[name] for name in ("constant", "interpolated", "random")] == pytest.approx([2, 2, 2])
    assert sampled["depth_mean"] == pytest.approx(3.75)
    assert sampled["ce_mean"] == pytest.approx(0.25 * 3 + 0.75 * 2)
    assert found["spearman"] is None
    assert found["beats_constant"] is False
    assert found["oracle"][0]["ce_mean"] == pytest.approx(1)  # quality alone
    assert found["oracle"][-1] == {
        "price": 1.0,
        "depth_mean": 3.0,
        **{k: found["constants"][0][k] for k in ("ce_mean", "low", "high")},
    }
    assert found["inputs"]["chosen"] == [4, 4, 4]
    json.dumps(found, allow_nan=False)


# ---- data and commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny run and two data sets."""
    root = tmp_path_factory.mktemp("study")
    for name in ("alpaca", "piqa", "mmlu", "gsm8k"):
        data.materialise(name, "embedded", root / name)
    tokenizer = byte_tokenizer()
    backbone = tiny()
    backbone.resize_token_embeddings(len(tokenizer))
    backbone.save_pretrained(root / "backbone")
    tokenizer.save_pretrained(root / "backbone")
    model = with_router(backbone)
    info = runs.RunInfo(
        *("buddy", "buddy", model.policy.settings(), "tiny", runs.relative(root / "backbone", root / "run")),
        variant={"feature": "value"},
        seed=2,
        study="small",
        training={"most_removed": 4},
    )
    runs.save(root / "run", info, model.policy)
    return root


def test_the_last_fifth_is_kept_back(study):
    tokenizer = byte_tokenizer()
    learnt = predictor_examples.training_rows(study / "alpaca", tokenizer, None, 4096)
    known = predictor_examples.fingerprints([study / "alpaca", study / "piqa"])
    assert list(known) == ["alpaca"]
    held, which = predictor_examples.held_out_rows(study / "alpaca", tokenizer, None, 4096, known)
    assert which == "held back"
    assert len(held) == 44 == 220 - len(learnt)
    assert not {tuple(row["input_ids"]) for row in held} & {tuple(row["input_ids"]) for row in learnt}
    everything, which = predictor_examples.held_out_rows(study / "alpaca", tokenizer, None, 4096, {})
    assert (len(everything), which) == (220, "all rows")
    questions, which = predictor_examples.held_out_rows(study / "piqa", tokenizer, 5, 4096, known)
    assert (len(questions), which) == (5, "evaluation split")
    row = json.loads((study / "piqa/validation.jsonl").read_text().split("\n")[0])
    text = tokenizer.decode(questions[0]["input_ids"])
    assert text == f"Question: {row['goal']}\nAnswer: {row[('sol1', 'sol2')[int(row['label'])]]}"
    assert len(predictor_examples.training_rows(study / "piqa", tokenizer, 3, 4096)) == 3


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


@pytest.mark.parametrize("preset", ["paper", "tuned", "rise"])
def test_from_a_run_to_a_record(study, tmp_path, preset, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = tmp_path / "run"
    of_paper, of_tuned = ["--steps", 3, "--logging-steps", 1], ["--epochs", 2, "--depths", 3]
    options = {"paper": of_paper, "tuned": of_tuned, "rise": ["--depths", 3]}[preset]
    count = 6 if preset == "rise" else 3
    chosen = ["--data", study / "alpaca", "--data", study / "piqa", "--examples", count, "--device", "cpu"]
    assert not command(
        *("predictor", "--run", study / "run", *chosen, "--preset", preset, *options),
        *("--out", out, "--record", tmp_path / "training.json"),
    )
    record = Record.read(tmp_path / "training.json")
    assert (record.kind, record.study, record.seed, record.variant["preset"]) == ("training", "small", 2, preset)
    assert record.metrics["entropy_uniform"] == pytest.approx(math.log(5 if preset == "paper" else 3))
    assert record.metrics["epochs"] == {"paper": 3 * 2 / 6, "tuned": 2, "rise": len(PENALTIES)}[preset]
    if preset == "rise":
        assert set(record.metrics["within"]) == {"alpaca", "piqa"}
        assert "piqa, n 6, not seen by the fit: R squared of the rise" in capsys.readouterr().out
    shown = {"loss", "reward", "entropy", "mean_budget", "histogram"} | ({"ce"} if preset != "rise" else set())
    assert shown <= set(record.metrics["curve"][0])
    assert not (out / "checkpoints").exists()
    model = buddy.load(out, device="cpu", dtype="float32")
    plain = buddy.load(study / "run", device="cpu", dtype="float32")
    ids = torch.randint(1, 90, (2, 7))
    assert torch.equal(model(ids, budget=5 / 7).logits, plain(ids, budget=5 / 7).logits)
    assert model.origin.info.training["predictor"]["data"] == ["alpaca", "piqa"]
    assert not command(
        *("budget-eval", "--run", out, "--data", study / "alpaca", "--data", study / "piqa", "--limit", 4),
        *("--out", tmp_path / "records", "--device", "cpu"),
    )
    for name, which, n in (("alpaca", "held back", 4), ("piqa", "evaluation split", 4), ("all", "alpaca, piqa", 8)):
        found = Record.read(tmp_path / "records" / f"dataset~{name}.json")
        assert (found.kind, found.n, found.metrics["preset"]) == ("budget", n, preset)
        assert which in found.metrics["rows"]
        assert len(found.metrics["constants"]) == 5
    assert "constant frontier" in capsys.readouterr().out
    scored = ["evaluate", "--run", out, "--data", study, "--tasks", "piqa", "--limit", 4, "--device", "cpu"]
    assert not command(*scored, "--budget", "auto", "--out", tmp_path / "scores")
    assert "blocks on average" in capsys.readouterr().out
    scores = Record.read(tmp_path / "scores/auto.json")
    assert (scores.kind, scores.budget, scores.n, scores.variant["preset"]) == ("accuracy", None, 4, preset)
    assert 3 <= scores.metrics["tasks"]["piqa"]["executed_mean"] <= 7
    several = [*scored[:3], "--data", study, "--tasks", "mmlu", "--limit", 3, "--device", "cpu"]
    assert not command(*several, "--budget", "auto", "--out", tmp_path / "mmlu")
    mmlu = Record.read(tmp_path / "mmlu/auto.json").metrics["tasks"]["mmlu"]
    assert list(mmlu["groups"]) == ["abstract_algebra", "anatomy", "astronomy"]  # a limit takes subjects in turn
    assert fmean(one["acc"] for one in mmlu["groups"].values()) == pytest.approx(mmlu["acc"])
    answers = ["solve", "--run", out, "--data", study, "--limit", 2, "--few-shot", 0, "--new-tokens", 3]
    assert not command(*answers, "--budget", "auto", "--device", "cpu", "--out", tmp_path / "answers")
    assert "blocks on average: gsm8k/strict-match" in capsys.readouterr().out
    solved = Record.read(tmp_path / "answers/auto.json")
    assert (solved.kind, solved.budget, solved.n, solved.variant["preset"]) == ("generation", None, 2, preset)
    assert 3 <= solved.metrics["executed_mean"] <= 7
    # Depth alone counts: the shallowest depth that it knows. A preset without a price refuses to hear one.
    assert command(*scored, "--budget", "auto:1", "--out", tmp_path / "scores") == (2 if preset == "paper" else 0)
    if preset != "paper":
        assert not command(*scored, "--removed", "4", "--out", tmp_path / "scores")
        priced_, constant = (Record.read(tmp_path / "scores" / f"{n}.json") for n in ("auto~1", "removed~4"))
        assert priced_.metrics["executed_mean"] == constant.metrics["executed_mean"] == 3
        mine, plainly = (found.metrics["tasks"]["piqa"] for found in (priced_, constant))
        assert {**mine, "executed_mean": 0} == {**plainly, "executed_mean": 0}
    capsys.readouterr()
    assert not command("generate", "--run", out, "--budget", "auto", "--max-new-tokens", 2, "--device", "cpu", "hello")
    assert "block  P  token" in capsys.readouterr().out


def test_mistakes_are_told_in_a_line(study, tmp_path, capsys):
    given = ["--data", study / "alpaca", "--out", tmp_path / "out", "--device", "cpu"]
    for arguments, message in (
        (
            ["predictor", "--run", study / "run", "--preset", "best", *given],
            "'best' is not one of paper, tuned or rise",
        ),
        (["predictor", "--run", study / "backbone", "--preset", "paper", *given], "needs one of buddy"),
        (["predictor", "--run", study / "run", "--preset", "paper", "--group", 1, *given], "--group: 1 is not allowed"),
        (["budget-eval", "--run", study / "run", *given], "has no budget predictor"),
        (["generate", "--run", study / "run", "--budget", "auto", "hi", "--device", "cpu"], "buddy predictor --run"),
        (
            ["generate", "--run", study / "run", "--budget", "much", "hi", "--device", "cpu"],
            "is not a number in (0, 1], auto or auto:PRICE",
        ),
        (["evaluate", "--run", study / "run", "--budget", "auto", *given], "buddy predictor --run"),
        (["evaluate", "--run", study / "run", "--budget", "0.5", *given], "neither auto nor auto:PRICE"),
        (["solve", "--run", study / "run", "--budget", "auto", *given[2:], "--data", study], "buddy predictor --run"),
    ):
        assert command(*arguments) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert message in error
    assert not (tmp_path / "out").exists()
