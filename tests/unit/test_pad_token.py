"""Padding tokens of checkpoints as they are published, after loading."""

import json

import pytest
import torch
from models import tiny

from buddy import runs
from buddy.backbones.untrained import byte_tokenizer


@torch.no_grad()
@pytest.mark.parametrize(("rows", "own"), [(258, 258), (257, -1), (300, None), (300, 258), (300, 5)])
def test_a_padding_token_beyond_the_embeddings_negative_or_absent_is_settled(tmp_path, rows, own):
    backbone, tokenizer = tiny("llama"), byte_tokenizer()
    backbone.resize_token_embeddings(rows)
    if own is None:
        tokenizer.pad_token = None
    backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "pad_token_id": own}), encoding="utf-8")
    model = runs.load(tmp_path, device="cpu")
    pad = model.tokenizer.pad_token_id
    assert 0 <= pad < rows
    assert model.tokenizer.eos_token_id == tokenizer.eos_token_id
    right = own is None or 0 <= own < rows
    assert model.backbone.generation_config.pad_token_id == (own if right else pad)
    # Rows that end early are fed their padding until the last has ended.
    ends = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": list(range(90))}
    inputs = model.tokenizer(["a", "bcd", "ef"], return_tensors="pt", padding=True)
    together = model.generate(**inputs, **ends)[:, 3:]
    for row, text in enumerate(("a", "bcd", "ef")):
        alone = model.generate(**model.tokenizer([text], return_tensors="pt"), **ends)[0, len(text) :]
        assert torch.equal(together[row, : len(alone)], alone)
