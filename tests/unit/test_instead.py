"""What is compared in benchmarks/instead.py generates the same tokens where it should, and says why it is not there."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import prompts, saved, tiny, with_router

from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError
from buddy.routing.model import RoutedModel
from buddy.routing.quantised import int8, stored

SCRIPT = Path(__file__).parents[2] / "benchmarks/instead.py"


@pytest.fixture(scope="module")
def instead():
    spec = importlib.util.spec_from_file_location("instead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "instead", module)
        spec.loader.exec_module(module)
        yield module


PROMPT = prompts(batch=1)[0][0].tolist()


def test_every_way_decodes_the_tokens_of_the_model(instead, monkeypatch):
    model = with_router(tiny())
    model.backbone.generation_config.eos_token_id = None
    free = instead.plain(model.backbone)(PROMPT, 12)
    end = free[3]
    model.backbone.generation_config.eos_token_id = end  # nobody may stop there
    expected = instead.plain(model.backbone)(PROMPT, 12)
    assert len(expected) == 12
    assert end not in expected
    assert instead.routed(model, 1.0)(PROMPT, 12) == expected
    assert instead.routed(model, 4 / 7)(PROMPT, 12) != expected
    assert model.trace.executed().tolist() == [[4]] * 12
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)  # a compiler would take minutes
    static = instead.compiled(model.backbone, len(PROMPT) + 12)
    assert static(PROMPT, 12) == static(PROMPT, 12) == expected


def test_what_cannot_be_had_says_why(instead, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--gguf names no file"):
        instead.llama_cpp(None, 0, 64)
    with pytest.raises(UserError, match="no file"):
        instead.llama_cpp(tmp_path / "x.gguf", 0, 64)
    (tmp_path / "x.gguf").write_bytes(b"")
    monkeypatch.setattr(instead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="neither llama-cpp-python nor xllamacpp is installed"):
        instead.llama_cpp(tmp_path / "x.gguf", 0, 64)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="torchao is not installed"):
        int8(tiny())


def test_the_table_is_what_the_passes_say(instead):
    def one(seconds, tokens, peak):
        return {"seconds": seconds, "tokens": tokens, "peak_memory_mb": peak}

    found = {
        "generate": {"passes": [one(4.0, [[1, 2, 3, 4], [5, 6, 7, 8]], 100.0), one(2.0, [], 90.0), one(8.0, [], 80.0)]},
        "buddy-0.5": {"passes": [one(1.0, [[1, 2, 9, 4], [5, 6, 7, 8]], None)]},
        "llama.cpp": {"reason": "neither is installed"},
    }
    dense, half, other = instead.table(found, 4)
    assert (dense["tok_s"], dense["tok_s_low"], dense["tok_s_high"]) == (2.0, 1.0, 4.0)
    assert (dense["speedup"], dense["same_start"], dense["peak_memory_mb"]) == (1.0, 1.0, 100.0)
    assert (half["tok_s"], half["speedup"], half["same_start"], half["peak_memory_mb"]) == (8.0, 4.0, 0.75, None)
    assert other["reason"] == "neither is installed"
    text = instead.markdown([dense, half, other], "Note.")
    assert "| this engine | 0.5 | as loaded | 8.0 (8.0 to 8.0) | 4.00 |  | 0.75 |" in text
    assert "| llama.cpp |  | Q4_1 GGUF | not measured: neither is installed |" in text


def test_passes_are_kept_and_only_for_the_same_settings(instead, tmp_path):
    options = argparse.Namespace(out=tmp_path, settings={"new_tokens": 4}, repeats=2)
    found: dict = {}
    instead._keep(options, instead.ROWS[0], found, {"passes": [{"seconds": 1.0}]})
    assert instead._kept(tmp_path / "generate.json", {"new_tokens": 4}) == {"passes": [{"seconds": 1.0}]}
    with pytest.raises(UserError, match="measured with other settings"):
        instead._kept(tmp_path / "generate.json", {"new_tokens": 5})
    instead._keep(options, instead.ROWS[1], found, {"reason": "no compiler"})
    assert instead._kept(tmp_path / "buddy-1.json", {"new_tokens": 4}) == {}  # tried again
    assert {path.name for path in tmp_path.iterdir()} == {"generate.json", "buddy-1.json"}


def test_rows_run_in_processes_of_their_own(tmp_path):
    model = with_router(tiny())
    model.backbone.resize_token_embeddings(300)
    run = saved(RoutedModel(model.backbone, model.policy, tokenizer=byte_tokenizer()), tmp_path)
    data = tmp_path / "alpaca"
    data.mkdir()
    row = {"id": "0", "instruction": "Say it", "input": "", "output": "x"}
    (data / "train.jsonl").write_text(json.dumps(row) + "\n")
    (data / "data.json").write_text(json.dumps({"name": "alpaca"}))
    asked = ["--out", tmp_path / "out", "--rows", "generate,buddy-1,llama.cpp", "--repeats", "1", "--new-tokens", "4"]
    command = [sys.executable, SCRIPT, run, "--data", data, *asked, "--prompts", "1", "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = json.loads((tmp_path / "out/instead.json").read_text())["rows"]
    assert [line["row"] for line in lines] == ["generate", "buddy-1", "llama.cpp"]
    assert lines[1]["same_start"] == 1.0
    assert lines[1]["peak_memory_mb"] is None or lines[1]["peak_memory_mb"] > 50
    assert lines[2]["reason"] == "--gguf names no file"
    assert "not measured: --gguf names no file" in (tmp_path / "out/instead.md").read_text()


# ---- int8 ------------------------------------------------------------------------------------------------------------


def test_a_plain_tensor_is_stored_as_itself():
    tensor = torch.zeros(3)
    assert [part is tensor for part in stored(tensor)] == [True]


@torch.no_grad()
def test_a_quantised_backbone_is_routed_as_any_other():
    pytest.importorskip("torchao")
    ids, mask = prompts()
    model = with_router(tiny())
    before = model(ids, mask, budget=1.0).logits
    size = sum(part.nbytes for parameter in model.backbone.parameters() for part in stored(parameter))
    assert int8(model.backbone) is model.backbone
    after = sum(part.nbytes for parameter in model.backbone.parameters() for part in stored(parameter))
    assert after < 0.6 * size
    whole = model(ids, mask, budget=1.0).logits
    assert 0 < (whole - before).norm() / before.norm() < 0.2
    assert torch.equal(whole, model.backbone(ids, mask).logits)  # the engine adds nothing of its own
    out = model.generate(ids, mask, budget=[4 / 7, 5 / 7, 1.0], slack=0, max_new_tokens=6, do_sample=False)
    assert out.shape == (3, 15)
    assert model.trace.executed().tolist() == [[4, 5, 7]] * 6
