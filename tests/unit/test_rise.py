"""Preset rise: divergences against whole passes, its fit against independent algebra, choices against states of plain passes."""

import math

import numpy as np
import pytest
import torch
from models import VOCABULARY, prompts, tiny, with_router
from torch.nn.functional import kl_div

import buddy
from buddy import runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import BudgetError, UserError
from buddy.evaluation import budgets
from buddy.policies.predictor import RisePredictor, mean_state
from buddy.reporting import published
from buddy.training import rise_predictor, rises
from buddy.training.rises import RiseTable, rise_table

DEPTHS = [3, 5, 7]


def rows(count=6, seed=0):
    """Random examples: prompts of 3 to 9 tokens, responses of 1 to 6."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        prompt, answer = (int(torch.randint(*span, (), generator=generator)) for span in ((3, 10), (1, 7)))
        ids = torch.randint(1, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        found.append({"input_ids": ids, "prompt_length": prompt})
    return found


def decided(**options):
    """A routed model with a predictor of large random weights, so that prompts differ in what they get."""
    model = with_router(tiny(), **options)
    predictor = RisePredictor(32, DEPTHS, "rise", 0.5)
    torch.nn.init.normal_(predictor.weight, std=3.0, generator=torch.Generator().manual_seed(1))
    model.policy.predictor = predictor
    return model


@torch.no_grad()
def states_behind(model, ids, source=1):
    """States (S, H) behind a block, from a plain pass, each scaled to a root mean square of 1."""
    hidden = model.backbone(ids[None], output_hidden_states=True).hidden_states[source][0].double()
    return hidden / hidden.square().mean(-1, keepdim=True).sqrt()


@torch.no_grad()
def expected_depths(model, ids, mask, price=0.5):
    """What the predictor says of prompts, each read alone: the estimate of every token, then their mean."""
    predictor, found = model.policy.predictor, []
    for row, real in zip(ids, mask.bool(), strict=True):
        states = states_behind(model, row[real])
        each = predictor.rise.double() + (states - predictor.mean) @ predictor.weight.double()
        weighed = (1 - price) * each.mean(0) + price * torch.tensor([0.0, 0.5, 1.0])
        found.append(DEPTHS[int(weighed.argmin())])
    return found


# ---- what is measured ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_rises(model, row, depth):
    """Divergence of every token but the first and the last, by two whole passes."""
    ids = torch.tensor([row["input_ids"]])
    context = torch.arange(ids.shape[1])[None] < row["prompt_length"]
    whole, part = (
        model(ids, budget=budget, context_mask=context).logits[0].double().log_softmax(-1)
        for budget in (1.0, depth / model.blocks)
    )
    return kl_div(part, whole, log_target=True, reduction="none").sum(-1)[1:-1]


@pytest.mark.parametrize(("architecture", "source"), [("llama", 1), ("qwen3", 2)])
def test_the_table_has_the_divergences_of_whole_passes(architecture, source, monkeypatch):
    monkeypatch.setattr("buddy.training.depth_losses.HEAD_TOKENS", 2)
    model, examples, depths = with_router(tiny(architecture), source_block=source), rows(), [3, 5, 7]
    table = rise_table(model.backbone, model.policy, examples, depths, batch_size=4)
    for number, row in enumerate(examples):
        slow = torch.stack([slow_rises(model, row, depth) for depth in depths], -1)
        torch.testing.assert_close(table.token_rises[table.owner == number].double(), slow, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(table.rises[number], slow.mean(0), rtol=1e-3, atol=1e-5)
        ids = torch.tensor(row["input_ids"])
        states = states_behind(model, ids, source)
        torch.testing.assert_close(table.states[table.owner == number].double(), states[1:-1], rtol=2e-3, atol=2e-3)
        read = states[: row["prompt_length"]].mean(0)
        torch.testing.assert_close(table.contexts[number].double(), read, rtol=1e-4, atol=1e-5)
    assert table.rises[:, :-1].min() > 1e-3
    assert (table.rises[:, -1] == 0).all()


def test_of_long_inputs_some_tokens_are_kept_and_all_are_counted(monkeypatch):
    model, examples = with_router(tiny()), rows(4)
    whole = rise_table(model.backbone, model.policy, examples, DEPTHS)
    monkeypatch.setattr(rises, "TOKENS", 3)
    some = rise_table(model.backbone, model.policy, examples, DEPTHS)
    torch.testing.assert_close(some.rises, whole.rises)
    for number in range(4):
        every, kept = (table.token_rises[table.owner == number] for table in (whole, some))
        assert len(kept) == min(3, len(every))
        assert torch.equal(kept[[0, -1]], every[[0, -1]])


def test_inputs_of_two_tokens_have_nothing_to_tell():
    model = with_router(tiny())
    table = rise_table(model.backbone, model.policy, [{"input_ids": [5, 6], "prompt_length": 1}, *rows(1)], DEPTHS)
    assert table.rises[0].tolist() == [0, 0, 0]
    assert (table.owner == 1).all()


def test_a_table_is_not_measured_twice(tmp_path, monkeypatch):
    model = with_router(tiny())
    monkeypatch.setattr(rises, "SHARD", 2)
    first = rise_table(model.backbone, model.policy, rows(5), [3, 7], 2, tmp_path)
    (tmp_path / "rises-00001.safetensors").unlink()
    asked, original = [], rises.Rollouts
    monkeypatch.setattr(rises, "Rollouts", lambda *given, **how: asked.append(len(given[2])) or original(*given, **how))
    again = rise_table(model.backbone, model.policy, rows(5), [3, 7], 2, tmp_path)
    assert asked == [2]
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in RiseTable.__annotations__)
    rise_table(model.backbone, model.policy, rows(5, seed=1), [3, 7], 2, tmp_path)
    assert asked == [2, 2, 2, 1]  # other examples: nothing stored is of use


# ---- the fit -------------------------------------------------------------------------------------------------------------


def toy(inputs, seed, told=1.0, noise=0.5):
    """Inputs of twelve tokens of two data sets: a token's rise at the shallowest depth grows with its first component, which
    the tokens of an input share in part; at the depth between it is half of that."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(inputs, 1, 6, generator=random)
    states = (shared + torch.randn(inputs, 12, 6, generator=random)).half().float()
    steep = (1 + 0.4 * told * states[..., 0] + noise * torch.randn(inputs, 12, generator=random)).unsqueeze(-1)
    token_rises = steep * torch.tensor([1.0, 0.5, 0.0])
    table = RiseTable(
        contexts=states[:, :8].mean(1),
        rises=token_rises.double().mean(1),
        states=states.flatten(0, 1).half(),
        token_rises=token_rises.flatten(0, 1),
        owner=torch.arange(inputs).repeat_interleave(12),
    )
    return table, ["one", "two"] * (inputs // 2)


def fitted(table, sets):
    predictor = RisePredictor(6, DEPTHS, "rise", 0.5)
    curve, kept, said = rise_predictor.fit(predictor, table, sets, 7)
    return predictor, curve, kept, said


def test_weights_are_those_of_a_ridge_regression_on_tokens():
    table, sets = toy(60, 0)
    predictor, curve, kept, said = fitted(table, sets)
    x, y = table.states.double().numpy(), table.token_rises.double().numpy()
    x = x - x.mean(0)
    penalty = len(x) * said["penalty"] * x.var(0).mean()
    # Least squares with the penalty as further rows.
    rows_x = np.concatenate([x, math.sqrt(penalty) * np.eye(6)])
    rows_y = np.concatenate([y - y.mean(0), np.zeros((6, 3))])
    weight = np.linalg.lstsq(rows_x, rows_y, rcond=None)[0]
    found = predictor.weight.detach().double().numpy() * predictor.nats.item()
    assert found == pytest.approx(said["factor"] * weight, abs=1e-5)
    assert said["factor"] > 0
    assert predictor.nats.item() == pytest.approx(table.rises[:, 0].mean().item())
    torch.testing.assert_close(predictor.mean, table.contexts.mean(0))
    assert curve[kept]["penalty"] == said["penalty"]


def test_no_fit_has_seen_what_it_is_judged_by():
    """The share left of the kept penalty, by five fits on the tokens of the other inputs."""
    table, sets = toy(40, 0)
    _, curve, kept, said = fitted(table, sets)
    folds = (torch.randperm(40, generator=torch.Generator().manual_seed(0)) % 5).numpy()
    x, y, owner = table.states.double().numpy(), table.token_rises.double().numpy(), table.owner.numpy()
    estimated = np.zeros((40, 3))
    for fold in range(5):
        mine = np.isin(owner, np.flatnonzero(folds != fold))
        centre = x[mine].mean(0)
        squares = (x[mine] - centre).T @ (x[mine] - centre)
        squares += said["penalty"] * np.trace(squares) / 6 * np.eye(6)
        weight = np.linalg.solve(squares, (x[mine] - centre).T @ (y[mine] - y[mine].mean(0)))
        contexts = table.contexts.double().numpy()
        estimated[folds == fold] = (contexts[folds == fold] - contexts[folds != fold].mean(0)) @ weight
    true, group = table.rises.numpy(), np.arange(40) % 2
    for values in (true, estimated):
        for one in (0, 1):
            values[group == one] = values[group == one] - values[group == one].mean(0)
    left = ((true - estimated) ** 2).sum(0)[:2] / (true**2).sum(0)[:2]
    assert curve[kept]["loss"] == pytest.approx(left.mean(), rel=1e-6)
    assert curve[kept]["r2_within"] == pytest.approx(
        1 - np.var((true - estimated)[:, 0]) / np.var(true[:, 0]), rel=1e-6
    )


def test_it_learns_which_prompts_rise_and_gains_within_sets():
    predictor, _, _, said = fitted(*toy(200, 0))
    assert said["factor"] >= 0.75
    for found in said["within"].values():
        assert found["r2_within"]["low"] > 0.4
        assert 0.02 < found["gain"]["low"] < found["gain"]["value"] < found["oracle"]["value"]
    table, _ = toy(300, 1)
    losses = torch.stack([table.rises[:, 0] * share for share in (1, 0.75, 0.5, 0.25, 0)], 1)
    found = budgets.measure(predictor, table.contexts, losses, 7, resamples=200)
    assert (found["loss"], found["beats_constant"]) == ("kl", True)
    assert found["gain"]["low"] > 0.02
    assert found["oracle_gain"]["value"] > found["gain"]["value"]
    assert found["r2"]["low"] > 0.4
    assert found["spearman"]["value"] > 0.5  # what loses more gets more depth
    assert found["constants"][-1]["ce_mean"] == 0


def test_where_nothing_can_be_told_the_constants_are_kept():
    """Rises that no state tells of: a factor of 0, or a loss no larger than the error of choosing it."""
    gains = []
    for seed in range(6):
        predictor, _, _, said = fitted(*toy(100, seed, told=0.0))
        table, _ = toy(300, seed + 100, told=0.0)
        losses = torch.stack([table.rises[:, 0] * share for share in (1, 0.75, 0.5, 0.25, 0)], 1)
        found = budgets.measure(predictor, table.contexts, losses, 7, resamples=20)
        gains.append(found["gain"]["value"])
        if said["factor"] == 0:
            assert predictor.choose(table.contexts, 0.7).unique().numel() == 1
            assert gains[-1] == pytest.approx(0, abs=1e-9)
    assert np.mean(gains) > -0.005
    assert min(gains) > -0.02


def test_too_few_inputs_are_refused():
    with pytest.raises(UserError, match="examples: 6 inputs cannot be cross-fitted"):
        fitted(*toy(6, 0))


# ---- in use --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("source", [1, 2])
@pytest.mark.parametrize(("budget", "price"), [(None, 0.5), ("auto:0.2", 0.2), ("auto:1", 1.0)])
def test_every_sequence_gets_what_its_own_states_say(source, budget, price):
    model = decided(source_block=source)
    ids, mask = prompts(batch=6)
    predictor, expected = model.policy.predictor, []
    for row, real in zip(ids, mask.bool(), strict=True):
        states = states_behind(model, row[real], source)
        each = predictor.rise.double() + (states - predictor.mean) @ predictor.weight.double()
        weighed = (1 - price) * each.mean(0) + price * torch.tensor([0.0, 0.5, 1.0])
        expected.append(DEPTHS[int(weighed.argmin())])
    assert price == 1.0 or len(set(expected)) > 1
    model.generate(ids, mask, budget=budget, max_new_tokens=4, do_sample=False)
    assert model.trace.executed().tolist() == [expected] * 4


@torch.no_grad()
def test_answers_do_not_choose_their_depth_and_the_causal_form_agrees():
    model = decided()
    ids, mask = prompts(batch=4)
    context = torch.ones_like(ids).bool()
    context[:, 6:] = False
    model(ids, mask, budget="auto", context_mask=context)
    chosen = model.trace.executed()
    assert chosen[0].tolist() == expected_depths(model, ids[:, :6], mask[:, :6])
    model(ids, mask, budget="auto", routing="causal", context_mask=context)
    assert torch.stack(model.trace.steps).sum(-1).eq(chosen).all()
    asked = []
    model.policy.predictor.register_forward_pre_hook(lambda *_: asked.append(1))
    model(ids, mask, budget=5 / 7)
    assert not asked


@torch.no_grad()
def test_what_cannot_be_read_is_like_the_mean():
    predictor = decided().policy.predictor
    predictor.mean.fill_(0.3)
    nothing = mean_state(torch.randn(2, 3, 32), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(predictor.losses(nothing), predictor.rise.expand(2, -1))


@torch.no_grad()
def test_a_saved_predictor_says_the_same(tmp_path):
    model = decided()
    model.policy.predictor.mean.normal_()
    model.policy.predictor.rise.copy_(torch.tensor([1.0, 0.4, 0.0]))
    folder, run = tmp_path / "backbone", tmp_path / "run"
    model.backbone.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    info = runs.RunInfo("buddy", "buddy", model.policy.settings(), "tiny", runs.relative(folder, run))
    runs.save(run, info, model.policy)
    again = buddy.load(run, device="cpu", dtype="float32")
    ids, mask = prompts(batch=5)
    assert torch.equal(again(ids, mask, budget=None).logits, model(ids, mask, budget=None).logits)
    with pytest.raises(BudgetError, match="is neither a number"):
        again(ids, mask, budget="auto:2")


# ---- what the paper's recipe can move ------------------------------------------------------------------------------------


def test_the_papers_updates_move_a_weight_by_a_tenth():
    """10,000 of Adam's at 1e-5 that all push the same way; and what the output's biases can take from the entropy by that."""
    weight = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=1e-5)
    for _ in range(10_000):
        optimiser.zero_grad()
        (-weight).sum().backward()
        optimiser.step()
    assert weight.item() == pytest.approx(0.1, rel=1e-3)

    def drop(logits):
        chances = np.exp(logits) / np.exp(logits).sum()
        return math.log(30) + (chances * np.log(chances)).sum()

    # The least entropy of logits within a box is at a corner: so many of them up, the others down.
    most = max(drop(np.repeat([0.1, -0.1], [up, 30 - up])) for up in range(1, 30))
    assert most == pytest.approx(0.005, abs=2e-4)
    assert drop(np.linspace(-0.1, 0.1, 30)) == pytest.approx(
        0.0018, abs=1e-4
    )  # a preference that grows evenly with depth


def test_the_papers_compute_is_the_uniform_policys():
    executed = [2 + middle for middle in range(1, 31)]  # of 32 blocks, the first and the last always
    uniform = 100 * np.mean(executed) / 32
    assert uniform == pytest.approx(54.6875)
    theirs = published.retention("llama2-7b", published.MAIN_VARIANT)
    used = [depth for task, (_, depth) in theirs.items() if task not in ("mmlu", "gsm8k")]
    assert (min(used), max(used)) == (53.5, 55.3)
    assert np.mean(used) == pytest.approx(uniform, abs=0.4)
