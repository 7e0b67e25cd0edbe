"""The token that fills up the shorter rows of a batch: any that the backbone has an embedding for, since none is read."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


def settle(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and model a padding token that is one, where theirs is absent or outside the vocabulary.

    Checkpoints are published with none, with -1, and with one that a tokenizer has beyond the model's embeddings. What is
    right is left as it is: a generation infers padding from the model's own.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; its padding token is one that the model has an embedding for from then on.
    """
    size = model.get_input_embeddings().weight.shape[0]

    def usable(token: Any) -> bool:
        return isinstance(token, int) and 0 <= token < size

    named = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    token = next(filter(usable, named), 0)
    if tokenizer.pad_token_id != token:
        if tokenizer.pad_token_id is not None:
            log.info("the tokenizer's padding token %d is outside the vocabulary of %d", tokenizer.pad_token_id, size)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
    own = model.generation_config.pad_token_id
    if own is not None and not usable(own):
        log.info(
            "the checkpoint's pad_token_id %s is outside the vocabulary of %d; %d takes its place", own, size, token
        )
        model.generation_config.pad_token_id = token
