"""A run on disk: what is saved is what is loaded."""

import json
import shutil

import pytest
import torch
from models import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import buddy
from buddy import runs
from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy


@pytest.fixture
def study(tmp_path):
    """A tiny backbone on disk and a run on it with a random adapter and router."""
    folder, run = tmp_path / "backbones" / "tiny", tmp_path / "runs" / "a" / "seed~0"
    backbone = tiny("llama")
    backbone.resize_token_embeddings(300)
    backbone.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    torch.manual_seed(1)
    policy = BuddyPolicy(7, 16, feature="key", source_block=2, omega=0.3, rank=4, prior=torch.randn(4))
    adapted = get_peft_model(backbone, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    info = runs.RunInfo(
        "buddy", "buddy", policy.settings(), "tiny", runs.relative(folder, run), {"feature": "key"}, study="test"
    )
    runs.save(run, info, policy, adapted)
    return folder, run


IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("merge", [True, False])
def test_budget_one_equals_the_fine_tuned_backbone_loaded_with_peft_alone(study, merge):
    folder, run = study
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run / "adapter").eval()
    expected = (plain.merge_and_unload() if merge else plain)(IDS).logits
    model = buddy.load(run, device="cpu", merge=merge)
    assert torch.equal(model(IDS, budget=1.0).logits, expected)
    assert not torch.equal(expected, AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)  # the adapter counts
    assert type(model.backbone) is type(AutoModelForCausalLM.from_pretrained(folder))
    if merge:
        assert list(model.backbone.state_dict()) == list(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@torch.no_grad()
@pytest.mark.parametrize("merge", [True, False])
def test_save_and_load_round_trip_to_equal_logits(study, merge, tmp_path):
    _, run = study
    model = buddy.load(run, device="cpu", merge=merge)
    model.save(tmp_path / "elsewhere" / "copy")
    again = buddy.load(tmp_path / "elsewhere" / "copy", device="cpu", merge=merge)
    for budget in (1.0, 5 / 7, 3 / 7):
        assert torch.equal(model(IDS, budget=budget).logits, again(IDS, budget=budget).logits)
        assert model.trace.paths() == again.trace.paths()
    assert again.policy.settings() == model.policy.settings()
    assert torch.equal(again.policy.prior, model.policy.prior)


@torch.no_grad()
def test_a_moved_study_still_loads_and_a_moved_backbone_can_be_named(study, tmp_path):
    folder, run = study
    before = buddy.load(run, device="cpu")(IDS, budget=0.6).logits
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.move(tmp_path, moved)
    assert torch.equal(buddy.load(moved / run.relative_to(tmp_path), device="cpu")(IDS, budget=0.6).logits, before)
    shutil.move(moved / folder.relative_to(tmp_path), moved / "other")
    with pytest.raises(UserError, match="backbone="):
        buddy.load(moved / run.relative_to(tmp_path), device="cpu")
    named = buddy.load(moved / run.relative_to(tmp_path), backbone=moved / "other", device="cpu")
    assert torch.equal(named(IDS, budget=0.6).logits, before)


@torch.no_grad()
def test_a_plain_backbone_is_the_dense_model(study):
    folder, _ = study
    model = buddy.load(folder, device="cpu")
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)
    assert model.trace.executed().tolist() == [[7, 7]]


def test_what_cannot_be_loaded_is_one_line(study, tmp_path):
    folder, run = study
    with pytest.raises(UserError, match="not a run"):
        buddy.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no GPU is visible"):
        buddy.load(folder, device="cuda")
    with pytest.raises(UserError, match="dtype"):
        buddy.load(folder, dtype="float8")
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(UserError, match="newer"):
        buddy.load(run)
    (run / "run.json").write_text(json.dumps(content)[:40])
    with pytest.raises(UserError, match="damaged"):
        buddy.load(run)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_what_lies_there_and_plain_lora(study, name):
    _, run = study
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, "digests": {}}))  # as runs were once
    (run / "adapter" / name).rename(run / "adapter" / "elsewhere")
    with pytest.raises(UserError, match=f"(no {name}: the adapter is not complete)"):  # and not looked up on the Hub
        buddy.load(run, device="cpu")
    (run / "adapter" / "elsewhere").rename(run / "adapter" / name)
    file = run / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "'LOHA' is not LORA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "code"}, "names code to import"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            buddy.load(run, device="cpu")


def test_a_failed_save_leaves_the_old_run(study):
    _, run = study
    before = sorted((path.name, path.stat().st_size) for path in run.rglob("*"))

    class Broken:
        def state_dict(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        runs.save(run, runs.RunInfo.read(run), Broken())
    assert sorted((path.name, path.stat().st_size) for path in run.rglob("*")) == before
    assert [path.name for path in run.parent.iterdir()] == [run.name]
