"""Importance against brute force: a block deleted from the Hugging Face model, hooks, autograd by hand."""

import copy

import pytest
import torch
from models import VOCABULARY
from torch.nn.functional import cosine_similarity, cross_entropy

from buddy.errors import UserError
from buddy.importance import estimate, windows

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
    from buddy.backbones.untrained import byte_tokenizer

    tokenizer = byte_tokenizer()
    text = "abcdefghij" * 10
    found = windows(tokenizer, text, samples=3, length=8)
    assert found.shape == (3, 8)
    assert found.flatten().tolist() == tokenizer(text, add_special_tokens=False).input_ids[:24]
    with pytest.raises(UserError, match="corpus holds 12"):
        windows(tokenizer, text, samples=13, length=8)


def test_an_unknown_indicator_is_refused(backbone):
    with pytest.raises(UserError, match="did you mean taylor"):
        estimate(backbone, IDS, "tailor")
