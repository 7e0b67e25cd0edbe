"""A prompt in a backbone's chat template, which is a program that came with the weights: it gets a bound."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from buddy.errors import UserError

SECONDS = 10
"""A template that takes longer will not end; real ones take milliseconds."""


def in_template(tokenizer: Any, prompt: str, where: str) -> str:
    """The prompt as the user's turn, ready for the model's.

    Args:
        tokenizer: the backbone's.
        prompt: what the user says.
        where: what was asked to use the template, for the message.

    Raises:
        UserError: there is no template, it is damaged, or it does not end within ``SECONDS``.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(f"--chat: {where} has no chat template; leave --chat out")
    try:
        with _bounded(f"--chat: the chat template of {where} does not end within {SECONDS} s; leave --chat out"):
            return str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
            )
    except (TemplateError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"--chat: the chat template of {where} is damaged ({error}); leave --chat out") from None


@contextmanager
def _bounded(message: str) -> Iterator[None]:
    """Raise a mistake where the block takes too long; only a main thread can be interrupted, others are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise UserError(message)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
