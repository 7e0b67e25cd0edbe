"""What training minimises: both losses and their gradients against the definition, and the teacher that never learns."""

import pytest
import torch
from models import VOCABULARY, tiny
from torch.nn.functional import cross_entropy, kl_div

from buddy.backbones.untrained import byte_tokenizer
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.first import FirstPolicy
from buddy.policies.pudding import PuddingPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.engine import Routing, routed
from buddy.settings import First, Training
from buddy.training import first, loss, sft
from buddy.training.examples import IGNORED, Collator, encode
from buddy.training.job import Job
from buddy.training.recipe import Recipe, drawn

PAIRS = [("what is 1?", "one"), ("and 2, what is it?", "two, of course"), ("3?", "three!"), ("say 4", "four it is")]
SETTINGS = Training(
    loss="kl", epochs=1, batch_size=2, warmup_steps=0, max_length=64, logging_steps=1, learning_rate=1e-2,
    lora_rank=2, router_rank=4,
)  # fmt: skip


def frozen_head(dtype=torch.float32, scale=0.7):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, VOCABULARY, bias=False).to(dtype).requires_grad_(False)
    head.weight *= scale * 8
    return head


def states(seed, count=11, dtype=torch.float32):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def backbone_of(blocks=6):
    backbone = tiny("llama", blocks=blocks)
    backbone.resize_token_embeddings(300)
    return backbone


def batch_of(loss_on="response"):
    return Collator(pad=0, loss_on=loss_on)(encode(byte_tokenizer(), PAIRS, 64))


def divergence(teacher, student, labels):
    """Mean KL over labelled tokens in double precision, token by token, from logits (B, S, V)."""
    terms = []
    for row in range(labels.shape[0]):
        for place in range(1, labels.shape[1]):
            if labels[row, place] != IGNORED:
                p, q = (logits[row, place - 1].double().softmax(-1) for logits in (teacher, student))
                terms.append((p * (p / q).log()).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, 2**25])
def test_cross_entropies_and_their_gradient_are_those_of_torch_in_parts_of_any_size(monkeypatch, at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    head, mine = frozen_head(), states(1)
    theirs = mine.detach().clone().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (11,), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1))
    found, expected = loss.cross_entropies(head, mine, targets), cross_entropy(head(theirs), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, 2**25])
def test_divergences_and_their_gradient_are_those_of_the_definition(monkeypatch, at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    head, mine, teacher = frozen_head(), states(1), states(2).detach()
    theirs = mine.detach().clone().requires_grad_()
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1))
    found = loss.divergences(head, mine, teacher)
    told = head(teacher).softmax(-1)
    expected = (told * (told.log() - head(theirs).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        found, kl_div(head(mine).log_softmax(-1), told, reduction="none").sum(-1), atol=1e-5, rtol=1e-4
    )
    assert found.min() > 0.05
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_gradients_are_finite_differences():
    head, teacher = frozen_head(torch.float64), states(2, 3, torch.float64).detach()
    mine = states(1, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss.divergences(head, x, teacher), (mine,))
    assert torch.autograd.gradcheck(lambda x: loss.cross_entropies(head, x, torch.tensor([3, 0, 96])), (mine,))


def test_where_student_and_teacher_agree_loss_and_gradient_are_exactly_zero():
    """Not nearly: an optimiser that divides by the size of the gradient would follow what rounding leaves."""
    head, mine = frozen_head(), states(1)
    found = loss.divergences(head, mine, mine.detach())
    found.sum().backward()
    assert found.abs().max() == 0
    assert mine.grad.abs().max() == 0


def test_probabilities_of_a_bfloat16_head_are_taken_in_float32():
    head, mine, teacher = frozen_head(torch.bfloat16), states(1, 5, torch.bfloat16), states(2, 5, torch.bfloat16)
    found = loss.divergences(head, mine, teacher.detach())
    assert found.dtype == torch.float32
    p, q = (head(one.detach()).double().softmax(-1) for one in (teacher, mine))
    torch.testing.assert_close(found.double(), (p * (p / q).log()).sum(-1), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert mine.grad.dtype == torch.bfloat16


def test_no_labelled_token_is_no_loss():
    mine = states(1, 0)
    found = loss.cross_entropies(frozen_head(), mine, torch.zeros(0, dtype=torch.int64))
    found.sum().backward()
    assert found.shape == (0,)
    assert mine.grad.shape == (0, 16)


def test_a_head_that_learns_is_refused():
    with pytest.raises(ValueError, match="frozen"):
        loss.cross_entropies(frozen_head().requires_grad_(), states(1), torch.zeros(11, dtype=torch.int64))


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_labels_are_predicted_one_place_before_and_padding_never(loss_on):
    batch = batch_of(loss_on)
    where, tokens = loss.predicting(batch["labels"]), loss.next_tokens(batch["labels"])
    found = list(zip(where.nonzero().tolist(), tokens.tolist(), strict=True))
    expected = [
        ([row, place - 1], batch["input_ids"][row, place].item())
        for row in range(4)
        for place in range(1, batch["labels"].shape[1])
        if batch["labels"][row, place] != IGNORED
    ]
    assert found == expected
    assert all(batch["attention_mask"][row, place + 1] for (row, place), _ in found)


def test_the_teacher_is_the_untouched_backbone_however_much_lora_has_learnt(tmp_path):
    backbone, batch = backbone_of(), batch_of()
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        expected = backbone.model(**given).last_hidden_state
    settings = SETTINGS.model_copy(update={"lora_dropout": 0.5})
    trained = sft.train(
        backbone, byte_tokenizer(), StaticPolicy(6, [2, 3]), PAIRS, settings, Recipe(), tmp_path
    ).adapted  # fmt: skip
    trained.train()
    learning = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert torch.equal(loss.untouched(trained, **given), expected)
    assert trained.training
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == learning != set()
    with torch.no_grad():
        assert (trained.get_base_model().model(**given).last_hidden_state - expected).abs().max() > 1e-2


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_training_minimises_the_mean_divergence_over_all_tokens_of_an_update(
    tmp_path, loss_on, batch_size, accumulation
):
    """Examples of different lengths, in one batch or accumulated: the logged loss is the definition's."""
    settings = SETTINGS.model_copy(
        update={"batch_size": batch_size, "gradient_accumulation": accumulation, "loss_on": loss_on}
    )
    policy, batch = StaticPolicy(6, [2, 3]), batch_of(loss_on)
    backbone = backbone_of()
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        teacher = backbone(**given).logits
        with routed(backbone, Routing(policy, None)):
            student = backbone(**given).logits
    expected = divergence(teacher, student, batch["labels"])
    trained = sft.train(backbone, byte_tokenizer(), policy, PAIRS, settings, Recipe(), tmp_path)
    assert trained.steps == 1
    assert trained.curve[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    # The update follows the gradient of that mean, whichever way the examples were put together.
    reference = sft.train(
        backbone_of(), byte_tokenizer(), policy, PAIRS, SETTINGS.model_copy(update={"batch_size": 4, "loss_on": loss_on}),
        Recipe(), tmp_path / "whole",
    )  # fmt: skip
    assert trained.curve[0]["grad_norm"] == pytest.approx(reference.curve[0]["grad_norm"], rel=1e-3)


def test_a_model_at_full_depth_is_its_own_teacher(tmp_path):
    """Dense with LoRA has nothing to learn: its loss is exactly zero, and nothing moves."""
    trained = sft.train(
        backbone_of(), byte_tokenizer(), StaticPolicy(6), PAIRS, SETTINGS, Recipe(), tmp_path
    )  # fmt: skip
    assert [point["loss"] for point in trained.curve] == [0, 0]
    assert all(p.abs().max() == 0 for name, p in trained.adapted.named_parameters() if "lora_B" in name)


def test_cross_entropy_asks_no_teacher(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(loss, "untouched", never)
    settings = SETTINGS.model_copy(update={"loss": "ce"})
    sft.train(backbone_of(), byte_tokenizer(), StaticPolicy(6, [2]), PAIRS, settings, Recipe(), tmp_path)
    with pytest.raises(AssertionError, match="the teacher ran"):
        sft.train(backbone_of(), byte_tokenizer(), StaticPolicy(6, [2]), PAIRS, SETTINGS, Recipe(), tmp_path / "kl")


def test_every_method_learns_from_the_same_teacher(tmp_path):
    """BUDDY's router and LoRA, PuDDing's and FiRST's LoRA: after some updates each is closer to the whole model."""
    settings = SETTINGS.model_copy(update={"epochs": 6})
    torch.manual_seed(0)
    job = lambda name: Job(backbone_of(), byte_tokenizer(), PAIRS, settings, 2, tmp_path / name, 0)  # noqa: E731

    def buddy(name):
        policy = BuddyPolicy(6, 16, rank=4)
        return sft.train(
            backbone_of(), byte_tokenizer(), policy, PAIRS, settings, Recipe(drawn(2, 6), trains_policy=True),
            tmp_path / name,
        )  # fmt: skip

    found = {
        "buddy": buddy("buddy"),
        "static": job("static").lora(StaticPolicy(6, [2, 3])),
        "pudding": job("pudding").lora(PuddingPolicy(6, [[1, 2], [2, 3]], encoder="backbone", width=16)),
        "first": first.fit(job("first"), FirstPolicy(6, 32), First(epochs=2, calibration_prompts=4)),
    }
    for name, trained in found.items():
        losses = [point["loss"] for point in trained.curve if point["executed_fraction"] < 1]
        assert min(losses[-2:]) < 0.8 * max(losses[:2]), name
    gates = [point for point in found["first"].curve if point["executed_fraction"] == 1]
    assert len(gates) == 4
