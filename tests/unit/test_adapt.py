"""`buddy adapt`: a peer's run against the physically smaller model, trained and scored by other means."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from models import tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import buddy
from buddy.backbones.untrained import byte_tokenizer
from buddy.cli import build
from buddy.commands._common import backbone_folder
from buddy.data import materialise
from buddy.data.tasks import tasks
from buddy.errors import BudgetError, UserError
from buddy.evaluation import accuracy
from buddy.evaluation.harness import BuddyLM
from buddy.policies.static import StaticPolicy
from buddy.settings import Evaluation, Training
from buddy.study.records import Record
from buddy.training import sft
from buddy.training.recipe import Recipe

BLOCKS, REMOVED = 6, 2
TRAIN = ["--examples", "6", "--epochs", "1", "--batch-size", "2", "--warmup-steps", "1", "--learning-rate", "0.02"]


def run(*arguments):
    """A command, in this process; a user's mistake is raised."""
    result = CliRunner().invoke(build(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, data sets and ShortGPT's removal order."""
    root = tmp_path_factory.mktemp("adapt")
    run("backbone", "--random", "tiny-llama", "--layers", BLOCKS, "--dtype", "float32", "--out", root / "backbone")
    for name in ("alpaca", "piqa", "wikitext2"):
        materialise(name, "embedded", root / "data" / name)
    run(
        *("calibrate", "--backbone", root / "backbone", "--corpus", root / "data/wikitext2", "--method", "shortgpt"),
        *("--removed", 3, "--samples", 2, "--length", 64, "--out", root / "shortgpt.json"),
    )
    return root


@pytest.fixture(scope="module")
def trained(folder):
    """ShortGPT with two blocks removed and LoRA."""
    out = folder / "shortgpt-2"
    run(
        *("adapt", "--method", "shortgpt", "--backbone", folder / "backbone", "--removed", REMOVED, "--out", out),
        *("--calibration", folder / "shortgpt.json", "--data", folder / "data/alpaca", "--record", folder / "t.json"),
        *("--lora-rank", 2, "--max-length", 512, *TRAIN),
    )
    return out


def sliced_by_hand(folder, adapter, removed):
    """The Hugging Face model with LoRA added to its weights by hand, and blocks deleted."""
    model = AutoModelForCausalLM.from_pretrained(folder / "backbone").eval()
    if adapter is not None:
        settings, state = (
            json.loads((adapter / "adapter_config.json").read_text()),
            load_file(adapter / "adapter_model.safetensors"),
        )
        for name in [name for name in state if "lora_A" in name]:
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            update = state[name.replace("lora_A", "lora_B")] @ state[name]
            module.weight.data += settings["lora_alpha"] / settings["r"] * update
    for block in sorted(removed, reverse=True):
        del model.model.layers[block]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def test_a_trained_static_peer_scores_as_the_physically_smaller_model_through_plain_lm_eval(folder, trained):
    removed = Record.read(folder / "shortgpt.json").metrics["removed"][:REMOVED]
    smaller = sliced_by_hand(folder, trained / "adapter", removed)
    manager, chosen = tasks(folder / "data", ["piqa"])
    plain = simple_evaluate(
        HFLM(pretrained=smaller, tokenizer=byte_tokenizer(), batch_size=8, max_length=512),
        tasks=chosen, task_manager=manager, limit=16, bootstrap_iters=10, log_samples=True,
    )  # fmt: skip
    lm = BuddyLM(buddy.load(trained), batch_size=8, max_length=512)
    metrics = accuracy.measure(lm, (BLOCKS - REMOVED) / BLOCKS, Evaluation(tasks=["piqa"], limit=16), folder / "data")
    assert metrics["executed_mean"] == BLOCKS - REMOVED
    for metric in ("acc", "acc_norm"):
        assert metrics["tasks"]["piqa"][metric] == pytest.approx(plain["results"]["buddy_piqa"][f"{metric},none"])
        items = "".join(str(int(s[metric])) for s in sorted(plain["samples"]["buddy_piqa"], key=lambda s: s["doc_id"]))
        assert metrics["tasks"]["piqa"]["items"][metric] == items
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    model = buddy.load(trained)
    found = model(ids, budget=(BLOCKS - REMOVED) / BLOCKS).logits
    torch.testing.assert_close(found, smaller(ids).logits, atol=1e-4, rtol=1e-4)
    bare = sliced_by_hand(folder, None, removed)
    assert (found - bare(ids).logits).abs().max() > 1e-2, "LoRA changed nothing"


def test_lora_of_a_static_peer_is_that_of_the_physically_smaller_model(tmp_path):
    """Training with blocks skipped is training without them: the same adapter, tensor by tensor."""
    settings = Training(
        epochs=1, batch_size=2, warmup_steps=1, max_length=64, logging_steps=1, learning_rate=1e-2, lora_rank=2
    )
    pairs = [(f"what is {i}?", f"{i} it is") for i in range(6)]
    whole = tiny("llama", blocks=6)
    whole.resize_token_embeddings(300)
    smaller = copy.deepcopy(whole)
    for block in (4, 1):
        del smaller.model.layers[block]
    smaller.config.num_hidden_layers = 4

    def adapter(backbone, policy, recipe, folder):
        trained = sft.train(backbone, byte_tokenizer(), policy, pairs, settings, recipe, folder, seed=3)
        return {name: p.detach() for name, p in trained.adapted.named_parameters() if "lora_" in name}, trained

    skipping, first = adapter(whole, StaticPolicy(6, [1, 4]), Recipe(without_lora=[1, 4]), tmp_path / "a")
    deleted, second = adapter(smaller, StaticPolicy(4), Recipe(), tmp_path / "b")
    place = {0: 0, 2: 1, 3: 2, 5: 3}
    renamed = {
        re.sub(r"layers\.(\d+)", lambda m: f"layers.{place[int(m[1])]}", name): p for name, p in skipping.items()
    }
    assert renamed.keys() == deleted.keys()
    for name, parameter in renamed.items():
        torch.testing.assert_close(parameter, deleted[name], atol=1e-5, rtol=1e-4)
    assert any(p.abs().max() > 1e-3 for name, p in deleted.items() if "lora_B" in name)
    assert first.trainable == second.trainable == sum(p.numel() for p in deleted.values())


def test_the_run_and_its_record_say_what_it_is(folder, trained):
    model = buddy.load(trained)
    removed = Record.read(folder / "shortgpt.json").metrics["removed"][:REMOVED]
    record = Record.read(folder / "t.json")
    assert record.kind == "training"
    assert record.method == model.origin.info.method == "shortgpt"
    assert record.variant == {"criterion": "block_influence", "removed": REMOVED, "lora": "trained"}
    assert record.metrics["removed_blocks"] == removed
    assert record.budget is not None
    assert (record.budget.removed, record.budget.executed) == (REMOVED, BLOCKS - REMOVED)
    assert record.metrics["router_parameters"] == 0
    assert record.metrics["objective"] == model.origin.info.training["loss"] == "ce"
    adapter = load_file(trained / "adapter/adapter_model.safetensors")
    assert record.metrics["trainable_parameters"] == sum(tensor.numel() for tensor in adapter.values())
    assert not (trained / "checkpoints").exists()
    out = model.generate(**model.tokenizer("hello", return_tensors="pt"), max_new_tokens=3)  # no budget: its own
    assert out.shape[1] > 3
    assert model.trace.executed().unique().tolist() == [BLOCKS - REMOVED]
    with pytest.raises(BudgetError):
        model.generate(**model.tokenizer("hello", return_tensors="pt"), budget=0.5, max_new_tokens=3)


def test_without_lora_it_is_the_untouched_model_with_blocks_deleted(folder, tmp_path):
    run(
        *("adapt", "--method", "shortgpt", "--backbone", folder / "backbone", "--removed", 3, "--lora", "none"),
        *("--calibration", folder / "shortgpt.json", "--out", tmp_path / "bare", "--record", tmp_path / "bare.json"),
    )
    assert not (tmp_path / "bare/adapter").exists()
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    removed = Record.read(folder / "shortgpt.json").metrics["removed"]
    expected = sliced_by_hand(folder, None, removed)(ids).logits
    torch.testing.assert_close(buddy.load(tmp_path / "bare")(ids, budget=0.5).logits, expected, atol=1e-5, rtol=1e-5)
    metrics = Record.read(tmp_path / "bare.json").metrics
    assert (metrics["steps"], metrics["trainable_parameters"], metrics["curve"]) == (0, 0, [])


def test_dense_with_lora_runs_every_block(folder, tmp_path):
    run(
        *("adapt", "--method", "dense_lora", "--backbone", folder / "backbone", "--out", tmp_path / "run"),
        *("--data", folder / "data/alpaca", "--lora-rank", 2, "--max-length", 512, *TRAIN),
    )
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    model = buddy.load(tmp_path / "run")
    expected = sliced_by_hand(folder, tmp_path / "run/adapter", [])(ids).logits
    torch.testing.assert_close(model(ids, budget=1.0).logits, expected, atol=1e-4, rtol=1e-4)
    assert model.trace.executed().unique().tolist() == [BLOCKS]


def test_dense_with_lora_is_its_own_teacher(folder, tmp_path):
    run(
        *(
            "adapt",
            "--method",
            "dense_lora",
            "--backbone",
            folder / "backbone",
            "--out",
            tmp_path / "run",
            "--loss",
            "kl",
        ),
        *("--data", folder / "data/alpaca", "--lora-rank", 2, "--record", tmp_path / "t.json", *TRAIN),
    )
    record = Record.read(tmp_path / "t.json")
    assert record.metrics["objective"] == buddy.load(tmp_path / "run").origin.info.training["loss"] == "kl"
    assert record.metrics["final_loss"] == 0
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        buddy.load(tmp_path / "run")(ids, budget=1.0).logits, sliced_by_hand(folder, None, [])(ids).logits
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "slep"], "did you mean sleb"),
        (["--method", "sleb", "--removed", "2"], "--data"),
        (["--method", "sleb", "--removed", "2", "--lora", "none"], "needs the record of `buddy calibrate --method sleb`"),
        (["--method", "sleb", "--removed", "2", "--lora", "none", "--calibration", "shortgpt.json"], "method shortgpt"),
        (["--method", "shortgpt", "--removed", "4", "--lora", "none", "--calibration", "shortgpt.json"], "at most 3"),
        (["--method", "shortgpt", "--removed", "0", "--lora", "none", "--calibration", "shortgpt.json"], "between 1 and 4"),
        (["--method", "shortgpt", "--removed", "2", "--lora", "none", "--calibration", "nowhere.json"], "not a readable record"),
        (["--method", "dense_lora", "--removed", "2", "--data", "data/alpaca"], "dense_lora removes none"),
        (["--method", "dense_lora", "--data", "data/piqa"], "no prompts"),
        (["--method", "first", "--removed", "2", "--lora", "none"], "--data"),
        (["--method", "sleb", "--lora", "some"], "--lora"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_named(folder, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        run("adapt", "--backbone", "backbone", "--out", tmp_path / "x", *arguments)
    assert words in str(error.value)
    assert not (tmp_path / "x").exists()


def test_a_backbone_goes_by_its_name_in_the_latest_study(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, study in enumerate(("new", "old")):
        shutil.copytree(folder / "backbone", f"results/{study}/backbones/small")
        os.utime(f"results/{study}/backbones/small/backbone.json", (1e9 - age, 1e9 - age))
    found = backbone_folder(Path("small"))
    assert found.as_posix() == "results/new/backbones/small"
    assert backbone_folder(folder / "backbone") == folder / "backbone"
    with pytest.raises(UserError, match="studies have fetched: small"):
        backbone_folder(Path("smal"))
    out = run(
        *("calibrate", "--backbone", "small", "--corpus", folder / "data/wikitext2", "--method", "sleb"),
        *("--removed", 2, "--samples", 2, "--length", 64, "--json"),
    )
    assert len(json.loads(out)["removed"]) == 2
