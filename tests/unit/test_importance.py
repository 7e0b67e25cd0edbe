"""Importance against brute force: a block deleted from the Hugging Face model, hooks, autograd by hand."""

import copy

import pytest
import torch
from models import VOCABULARY
from torch.nn.functional import cosine_similarity, cross_entropy

from buddy import settings
from buddy.backbones.untrained import byte_tokenizer
from buddy.commands.importance import importance as command
from buddy.errors import UserError
from buddy.importance import INDICATORS, estimate, windows
from buddy.reporting import measured
from buddy.study.records import Record, find

IDS = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


def without(backbone, block):
    """A copy of the model with one block deleted."""
    smaller = copy.deepcopy(backbone)
    del smaller.model.layers[block]
    smaller.config.num_hidden_layers -= 1
    for place, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = place
    return smaller


@torch.no_grad()
def perplexity(model, ids):
    logits = model(ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()


def test_delta_ppl_deletes_each_block(backbone):
    found = estimate(backbone, IDS, "delta_ppl", batch_size=2)
    for block in range(7):
        smaller = without(backbone, block)
        expected = perplexity(smaller, IDS) - perplexity(backbone, IDS)
        torch.testing.assert_close(found.values[block].float(), expected, atol=1e-3, rtol=1e-4)
        for row in range(3):
            window = IDS[row : row + 1]
            expected = perplexity(smaller, window) - perplexity(backbone, window)
            torch.testing.assert_close(found.per_window[row, block].float(), expected, atol=1e-3, rtol=1e-4)


def test_cosine_compares_final_representations(backbone):
    found = estimate(backbone, IDS, "cosine")
    with torch.no_grad():
        full = backbone.model(IDS).last_hidden_state.mean(1)
        for block in range(7):
            other = without(backbone, block).model(IDS).last_hidden_state.mean(1)
            expected = 1 - cosine_similarity(full, other, dim=-1)
            torch.testing.assert_close(found.per_window[:, block].float(), expected, atol=1e-5, rtol=1e-4)


def test_block_influence_by_hooks(backbone):
    seen = {}

    def remember(block):
        def hook(_module, arguments, _keywords, output):
            seen[block] = 1 - cosine_similarity(arguments[0], output, dim=-1).mean(-1)

        return hook

    handles = [
        layer.register_forward_hook(remember(block), with_kwargs=True)
        for block, layer in enumerate(backbone.model.layers)
    ]
    with torch.no_grad():
        backbone(IDS)
    for handle in handles:
        handle.remove()
    found = estimate(backbone, IDS, "block_influence", batch_size=3)
    for block in range(7):
        torch.testing.assert_close(found.per_window[:, block].float(), seen[block], atol=1e-5, rtol=1e-4)


def test_taylor_is_weight_times_gradient(backbone):
    found = estimate(backbone, IDS, "taylor")
    assert all(p.grad is None for p in backbone.parameters())  # nothing is left behind
    for row in range(3):
        window = IDS[row : row + 1]
        logits = backbone(window).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        for block, layer in enumerate(backbone.model.layers):
            expected = sum((p * p.grad).abs().sum().item() for p in layer.parameters())
            assert found.per_window[row, block].item() == pytest.approx(expected, rel=1e-4)
        backbone.zero_grad(set_to_none=True)


def test_windows_are_the_first_of_the_corpus_without_special_tokens():
    tokenizer = byte_tokenizer()
    text = "abcdefghij" * 10
    found = windows(tokenizer, text, samples=3, length=8)
    assert found.shape == (3, 8)
    assert found.flatten().tolist() == tokenizer(text, add_special_tokens=False).input_ids[:24]
    with pytest.raises(UserError, match="corpus holds 12"):
        windows(tokenizer, text, samples=13, length=8)


def test_every_indicator_can_be_asked_for_in_a_study():
    assert set(INDICATORS) == set(settings.INDICATORS)


@pytest.fixture
def arguments(backbone, tmp_path):
    """A backbone on disk and a text, and the command's arguments for them."""
    backbone.resize_token_embeddings(300)
    backbone.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    (tmp_path / "book.txt").write_text("It was a bright cold day in April. " * 5)
    given = {"backbone": tmp_path / "small", "corpus": tmp_path / "book.txt", "indicator": "delta_ppl", "samples": 3}
    rest = {"taylor": "window", "seed": None, "study": "s", "name": "", "device": "cpu", "dtype": "auto"}
    return given | rest | {"out": tmp_path / "out"}


def test_several_lengths_have_a_record_each_as_if_alone(arguments, tmp_path):
    command(**arguments, length="24,16,24")
    out = arguments["out"]
    made = [path.relative_to(out).as_posix() for path in find(out)]
    assert made == [f"length~{length}/indicator~delta_ppl.json" for length in (16, 24)]
    for length in (16, 24):
        command(**arguments | {"out": tmp_path / "alone.json"}, length=str(length))
        alone, beside = (Record.read(path) for path in (tmp_path / "alone.json", out / made[length == 24]))
        assert beside.metrics == alone.metrics
        assert beside.metrics["length"] == length
        assert (beside.kind, beside.backbone, beside.study, beside.n) == ("importance", "small", "s", 3)
    # A study reads them as lengths of its own corpus.
    out.rename(tmp_path / "backbone~small")
    found = [
        one for one in measured.load(tmp_path)[0] if isinstance(one, measured.Importance) and one.length is not None
    ]
    assert sorted(one.length for one in found) == [16, 24]
    assert {one.corpus for one in found} == {None}


@pytest.mark.parametrize(
    ("length", "message"),
    [("16,60", "3 windows of 60 tokens"), ("7,16", "--length: 7 is not at least 8"), ("many", "--length: 'many'")],
)
def test_lengths_that_cannot_be_leave_no_record(arguments, length, message):
    with pytest.raises(UserError, match=message):
        command(**arguments, length=length)
    assert not arguments["out"].exists()


def test_an_unknown_indicator_is_refused(backbone):
    with pytest.raises(UserError, match="did you mean taylor"):
        estimate(backbone, IDS, "tailor")
