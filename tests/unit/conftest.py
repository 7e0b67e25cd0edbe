"""A tiny routed model with a tokenizer, and what of it ran."""

import pytest
from models import tiny, with_router

from buddy.backbones.untrained import byte_tokenizer


@pytest.fixture
def model():
    """A router that changes its mind over a tiny Llama; a token is a byte."""
    backbone = tiny("llama")
    backbone.resize_token_embeddings(300)
    routed = with_router(backbone)
    routed.tokenizer = byte_tokenizer()
    return routed


@pytest.fixture
def ran(model):
    """Per pass the blocks that were called, by hooks on the backbone's own modules."""
    passes = []
    decoder = model.backbone.model
    decoder.embed_tokens.register_forward_pre_hook(lambda *_: passes.append(set()))
    for index, layer in enumerate(decoder.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: passes[-1].add(index))
    return passes
