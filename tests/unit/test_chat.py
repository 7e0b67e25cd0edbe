"""A chat template is a program of unknown origin: it is used, refused where it is damaged, and stopped."""

import time

import pytest

from buddy import chat
from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError

TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
ENDLESS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)


def tokenizer(template):
    found = byte_tokenizer()
    found.chat_template = template
    return found


def test_a_prompt_becomes_a_turn():
    assert chat.in_template(tokenizer(TURNS), "hi", "RUN") == "<user>hi<a>"


def test_an_endless_template_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"--chat: the chat template of RUN does not end within 0.5 s"):
        chat.in_template(tokenizer(ENDLESS), "hi", "RUN")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ messages.nothing.at.all }}", "{% for a in range(10 ** 9) %}{% endfor %}"]
)
def test_a_damaged_template_is_told(template):
    with pytest.raises(UserError, match="the chat template of RUN is damaged"):
        chat.in_template(tokenizer(template), "hi", "RUN")


def test_none_is_told():
    with pytest.raises(UserError, match="RUN has no chat template"):
        chat.in_template(tokenizer(None), "hi", "RUN")
