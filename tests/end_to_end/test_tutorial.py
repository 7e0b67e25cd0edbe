"""docs/tutorial.md, word by word: its commands run as they stand there, and say what the page shows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from checkout import ROOT
from command_line import buddy

PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


def fences(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def steps() -> list[tuple[str, str]]:
    """Each of the five commands, and what the page shows it to say."""
    sections = re.split(r"^## \d\. ", PAGE, flags=re.M)[1:]
    sections[-1] = sections[-1].split("\n## ")[0]
    found = [fences(section) for section in sections]
    assert all([language for language, _ in blocks] == ["bash", ""] for blocks in found)
    return [(command.strip(), shown) for (_, command), (_, shown) in found]


def shape(text: str) -> list[str]:
    """Lines without what may differ: numbers, and the room that they take."""
    return [" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines() if line.strip()]


def said(command: str) -> str:
    """Run a command of the page, one line of a shell without anything of a shell's own."""
    first, *words = shlex.split(command)
    assert first == "buddy"
    done = buddy(*words)
    assert done.status == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a model of as many blocks as the page's, random, and prompts of a few words."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = buddy("backbone", "--random", "tiny-llama", "--layers", 30, "--out", "my-model")
        assert made.status == 0, made.err
        rows = [{"prompt": f"Name the number after {number}."} for number in range(80)]
        Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder


def test_the_commands_say_what_the_page_shows(here, monkeypatch):
    monkeypatch.chdir(here)
    found = steps()
    assert len(found) == 5
    for command, shown in found:
        assert "\n" not in command  # to be copied as one line
        lines = [line for line in shape(said(command)) if not line.startswith("{'")]
        assert lines == shape(shown), command
    assert Path("my/curve.png").stat().st_size > 5000
    budgets = [line.split(",")[5] for line in Path("my/curve.csv").read_text().splitlines()[1:]]
    assert budgets == ["1.0", f"{28 / 30:.6f}", f"{26 / 30:.6f}", f"{22 / 30:.6f}"]


def test_what_comes_next_works(here, monkeypatch):
    monkeypatch.chdir(here)
    section = PAGE.split("\n## What next")[1]
    commands = [" ".join(code.split()) for code in re.findall(r"`(buddy [^`]* --[^`]*)`", section)]
    assert [command.split()[1] for command in commands] == ["generate", "export", "card"]
    for command in commands:
        said(command)
    assert json.loads(Path("pruned/config.json").read_text())["num_hidden_layers"] == 22


def test_the_prompts_that_the_page_offers_are_there(here, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (_, offered), (_, shown) = fences(PAGE.split("<!-- try -->")[1])[:2]
    model, data, head = offered.strip().splitlines()
    assert said(data).strip() == shown.strip().splitlines()[1]
    assert head == "head -n 80 sample/train.jsonl > prompts.jsonl"
    wheel = dict(zip(shlex.split(model)[2::2], shlex.split(model)[3::2], strict=True))
    demo = (ROOT / "workflow/demo.yaml").read_text() + (ROOT / "config.yaml").read_text()
    assert wheel["--sha256"] in demo
    assert wheel["--file"] in demo
