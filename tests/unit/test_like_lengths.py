"""Batches of like length, and batches that do not fit: what is trained is the same, with less padding and less memory."""

import itertools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import PAIRS, RECIPE, SETTINGS, backbone_of, policy_for, run, tokenizer

from buddy.backbones.untrained import byte_tokenizer
from buddy.data import materialise
from buddy.data.inputs import training as instructions
from buddy.policies.static import StaticPolicy
from buddy.training import loss as losses
from buddy.training import sft
from buddy.training.batches import POOL, LikeLengths
from buddy.training.examples import Collator, encode
from buddy.training.recipe import Recipe

LENGTHS = st.lists(st.integers(2, 400), min_size=1, max_size=300)


def batches(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


# ---- the order -------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_every_example_comes_once_in_an_order_of_seed_and_epoch_alone(lengths, batch, seed, epoch):
    sampler, again = (LikeLengths(lengths, batch, seed) for _ in range(2))
    sampler.set_epoch(epoch)
    again.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(again) == list(sampler)
    assert len(sampler) == len(lengths)


def test_the_order_changes_with_seed_and_epoch_and_so_does_who_meets_whom():
    lengths = torch.randint(10, 500, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    met = []
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        sampler = LikeLengths(lengths, 3, seed)
        sampler.set_epoch(epoch)
        met.append({frozenset(batch) for batch in batches(sampler, 3)})
    for one, other in itertools.combinations(met, 2):
        assert len(one & other) < 0.1 * len(one)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_the_longest_whole_batch_comes_first_and_an_incomplete_one_last(lengths, batch, seed):
    found = batches(LikeLengths(lengths, batch, seed), batch)
    assert all(len(one) == batch for one in found[:-1])
    whole = [max(lengths[place] for place in one) for one in found if len(one) == batch]
    assert whole[:1] == [max(whole)] if whole else True


def test_lengths_do_not_rise_or_fall_through_an_epoch():
    """Else the rate's schedule would meet short examples first and long ones last."""
    lengths = torch.randint(10, 500, (8 * POOL * 4,), generator=torch.Generator().manual_seed(1)).tolist()
    means = [sum(lengths[place] for place in one) / 8 for one in batches(LikeLengths(lengths, 8, 0), 8)][1:]
    places = torch.arange(len(means), dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([places, torch.tensor(means, dtype=torch.float64)]))[0, 1]) < 0.2


# ---- real examples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The embedded instructions, several times over with some words cut, so that there are enough for pools."""
    folder = tmp_path_factory.mktemp("alpaca")
    materialise("alpaca", "embedded", folder)
    return encode(byte_tokenizer(), instructions(folder), 512)


def real(rows, order, size=8):
    """Share of the positions of all batches that are tokens."""
    lengths = [len(row["input_ids"]) for row in rows]
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(lengths) / sum(len(one) * max(lengths[place] for place in one) for one in parts)


def test_most_positions_are_tokens_where_they_were_padding(rows):
    lengths = [len(row["input_ids"]) for row in rows]
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    before, after = real(rows, shuffled), real(rows, list(LikeLengths(lengths, 8, 0)))
    assert after > 0.9
    assert after > before


def test_lengths_as_they_are_in_alpaca_gain_half_as_much_again():
    """Lengths with the spread of Alpaca's: 190 tokens, and a few times that."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, generator=generator).mul(0.5).exp().mul(170).clamp(30, 512).int().tolist()
    made = [{"input_ids": range(length)} for length in spread]
    shuffled = torch.randperm(len(made), generator=generator).tolist()
    before, after = real(made, shuffled), real(made, list(LikeLengths(spread, 8, 0)))
    assert 0.5 < before < 0.65
    assert after > 0.97
    assert after / before > 1.5


def test_the_loss_of_all_tokens_is_the_same_in_any_order(rows):
    some = rows[:40]
    backbone = backbone_of().double().eval()
    collate = Collator(0)
    totals = []
    for order in (list(range(40)), list(LikeLengths([len(row["input_ids"]) for row in some], 8, 3))):
        total = tokens = 0
        for start in range(0, 40, 8):
            batch = collate([some[place] for place in order[start : start + 8]])
            with torch.no_grad():
                told = backbone.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                where = losses.predicting(batch["labels"])
                head = backbone.lm_head.requires_grad_(False)
                each = losses.cross_entropies(head, told.last_hidden_state[where], losses.next_tokens(batch["labels"]))
            total, tokens = total + each.sum().item(), tokens + len(each)
        totals.append((total, tokens))
    assert totals[0][1] == totals[1][1]
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-6)


def test_a_training_counts_tokens_and_positions(tmp_path):
    trained, _ = run(tmp_path)
    encoded = encode(byte_tokenizer(), PAIRS, SETTINGS.max_length)
    lengths = [len(row["input_ids"]) for row in encoded]
    positions = 0
    sampler = LikeLengths(lengths, 3, 0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        positions += sum(3 * max(lengths[place] for place in one) for one in batches(sampler, 3))
    assert (trained.tokens, trained.positions) == (2 * sum(lengths), positions)
    assert trained.batch_size == 3


# ---- out of memory ---------------------------------------------------------------------------------------------------


def holding(sequences):
    """A device that holds so many sequences in training, and no more; the CPU has no such limit of its own."""

    def hook(module, _inputs, kept):
        if module.training and len(kept["input_ids"]) > sequences:
            raise torch.OutOfMemoryError(f"holds {sequences}")

    return hook


def limited(folder, settings, sequences, stop_after=None, recipe=None, seed=0):
    """A training on such a device."""
    backbone = backbone_of()
    backbone.model.register_forward_pre_hook(holding(sequences), with_kwargs=True)
    policy = policy_for(backbone) if recipe else StaticPolicy(6, [2])

    def log(step, _values):
        if stop_after is not None and step >= stop_after:
            raise KeyboardInterrupt

    how = recipe or Recipe()
    return sft.train(backbone, tokenizer(folder), policy, PAIRS, settings, how, folder, seed, on_log=log)


def learnt(trained):
    return {name: value for name, value in trained.adapted.named_parameters() if "lora" in name}


def test_what_does_not_fit_is_halved_and_the_updates_are_the_same(tmp_path, caplog):
    settings = SETTINGS.model_copy(update={"batch_size": 4})
    with caplog.at_level(logging.WARNING):
        small = limited(tmp_path / "small", settings, sequences=1)
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert told == [
        "out of memory at batch_size 4: goes on with batch_size 2 and gradient_accumulation 2, the same examples in each update",
        "out of memory at batch_size 2: goes on with batch_size 1 and gradient_accumulation 4, the same examples in each update",
    ]
    large = limited(tmp_path / "large", settings, sequences=4)
    assert (small.batch_size, large.batch_size) == (1, 4)
    assert (small.steps, small.tokens) == (large.steps, large.tokens) == (6, large.tokens)
    assert small.positions < large.positions  # one at a time needs no padding
    for name, value in learnt(large).items():
        torch.testing.assert_close(learnt(small)[name], value, atol=1e-5, rtol=1e-3, msg=name)
    assert [point["loss"] for point in small.curve] == pytest.approx([point["loss"] for point in large.curve], rel=1e-4)


def test_it_is_the_training_of_the_smaller_batch_to_the_last_bit(tmp_path):
    halved = limited(tmp_path / "halved", SETTINGS.model_copy(update={"batch_size": 4}), sequences=2, recipe=RECIPE)
    smaller = {"batch_size": 2, "gradient_accumulation": 2}
    asked = limited(tmp_path / "asked", SETTINGS.model_copy(update=smaller), sequences=2, recipe=RECIPE)
    for name, value in learnt(asked).items():
        assert torch.equal(learnt(halved)[name], value), name


def test_a_killed_training_that_was_halved_goes_on_where_it_was(tmp_path):
    settings = SETTINGS.model_copy(update={"batch_size": 4})
    whole = limited(tmp_path / "whole", settings, sequences=2)
    with pytest.raises(KeyboardInterrupt):
        limited(tmp_path / "cut", settings, sequences=2, stop_after=4)
    resumed = limited(tmp_path / "cut", settings, sequences=2)
    assert [point["step"] for point in resumed.curve][-1] == 6
    assert (resumed.tokens, resumed.positions) == (whole.tokens, whole.positions)
    for name, value in learnt(whole).items():
        assert torch.equal(learnt(resumed)[name], value), name


def test_a_single_sequence_that_does_not_fit_is_told_as_before(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="holds 0"):
        limited(tmp_path, SETTINGS.model_copy(update={"batch_size": 2}), sequences=0)
