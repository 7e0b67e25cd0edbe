"""What is loaded is whole, finite, of the right shape and of the right origin, or it is refused in one line."""

import json
import shutil

import pytest
import torch
from command_line import buddy as command
from models import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import buddy
from buddy import runs
from buddy.backbones import fingerprint
from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError
from buddy.policies.buddy import BuddyPolicy
from buddy.study.records import Record

WEIGHTS = "model.safetensors"


def backbone(folder, seed=0):
    model = tiny("llama", seed=seed)
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A backbone and a run on it with router and adapter, that know of each other."""
    root = tmp_path_factory.mktemp("made")
    model = backbone(root / "backbone")
    torch.manual_seed(1)
    policy = BuddyPolicy(7, 16, rank=4, prior=torch.randn(5))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    where = runs.relative(root / "backbone", root / "run")
    info = runs.RunInfo("buddy", "buddy", policy.settings(), "tiny", where, training={"lora_rank": 2})
    info.digests = {"backbone": fingerprint.of_backbone(root / "backbone")}
    runs.save(root / "run", info, policy, adapted)
    return root


@pytest.fixture
def study(made, tmp_path):
    """A copy of them to damage."""
    shutil.copytree(made, tmp_path / "study")
    return tmp_path / "study"


def changed(file, change):
    """Write a safetensors file again with its tensors changed."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def broken(value):
    def change(tensors):
        name = sorted(tensors)[len(tensors) // 2]
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return change


def without(tensors):
    tensors.pop(sorted(tensors)[len(tensors) // 2])


def with_another(tensors):
    tensors["model.layers.1.foreign.weight"] = torch.zeros(2)


def of_another_shape(tensors):
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name] = torch.zeros(3, 5)


def forget(study):
    """Make the run one from before there were digests."""
    file = study / "run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "digests": {}}))


DAMAGE = [
    (broken(float("nan")), "holds NaN or infinity"),
    (broken(float("inf")), "holds NaN or infinity"),
    (without, ": no "),
    (with_another, "which the model has not"),
    (of_another_shape, "of shape (3, 5) where the model has"),
]
FILES = {
    "backbone": f"backbone/{WEIGHTS}",
    "router": "run/router.safetensors",
    "adapter": "run/adapter/adapter_model.safetensors",
}


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_broken_tensor_is_never_computed_with(study, part, damage, message):
    forget(study)
    changed(study / FILES[part], damage)
    with pytest.raises(UserError) as error:
        buddy.load(study / "run", device="cpu")
    assert message in str(error.value) or (part == "adapter" and "does not fit the model" in str(error.value))
    assert str(study / FILES[part].split("/")[0]) in str(error.value)
    if part == "backbone":
        with pytest.raises(UserError):
            buddy.load(study / "backbone", device="cpu")


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("rest", [0, 7, 0.5, None])
def test_a_cut_or_missing_file_is_told_by_name(study, part, rest):
    forget(study)
    file = study / FILES[part]
    content = file.read_bytes()
    file.unlink()
    if rest is not None:
        file.write_bytes(content[: int(rest * len(content)) if isinstance(rest, float) else rest])
    with pytest.raises(UserError) as error:
        buddy.load(study / "run", device="cpu")
    assert file.name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 8}, "config.json says 8 blocks, the weights hold 7"),
        ({"num_hidden_layers": 6}, "config.json says 6 blocks, the weights hold 7"),
        ({"hidden_size": 64}, "where the model has"),
        ({"intermediate_size": 40}, "where the model has"),
        ({"vocab_size": 97}, "where the model has"),
        ({"attention_bias": True}, "bias"),
    ],
)
def test_a_configuration_of_another_model_is_refused(study, change, message):
    file = study / "backbone/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for path in ("backbone", "run"):
        forget(study)
        with pytest.raises(UserError, match=message):
            buddy.load(study / path, device="cpu")


@pytest.mark.parametrize("part", ["router", "adapter"])
def test_a_run_is_its_own_router_and_adapter_and_no_others(study, part):
    file = study / FILES[part]
    changed(file, lambda tensors: tensors.update({name: value * 1.001 for name, value in tensors.items()}))
    with pytest.raises(UserError, match="changed since the run was saved"):
        buddy.load(study / "run", device="cpu")
    shutil.rmtree(file.parent) if part == "adapter" else file.unlink()
    with pytest.raises(UserError, match="missing since the run was saved"):
        buddy.load(study / "run", device="cpu")


def test_a_run_without_digests_loads_and_says_so(study, caplog):
    before = buddy.load(study / "run", device="cpu").policy.state_dict()
    forget(study)
    with caplog.at_level("INFO"):
        after = buddy.load(study / "run", device="cpu").policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "made before runs had digests" in caplog.text
    shutil.rmtree(study / "run/adapter")
    with pytest.raises(UserError, match="though the run was trained with LoRA"):
        buddy.load(study / "run", device="cpu")


def test_another_backbone_of_the_same_shape_is_refused(study, tmp_path):
    backbone(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="was made with another backbone"):
        buddy.load(study / "run", backbone=tmp_path / "other", device="cpu")
    shutil.rmtree(study / "backbone")
    shutil.copytree(tmp_path / "other", study / "backbone")
    with pytest.raises(UserError, match="was made with another backbone"):
        buddy.load(study / "run", device="cpu")


def test_settings_of_another_policy_are_told(study):
    file = study / "run/run.json"
    content = json.loads(file.read_text())
    for settings, message in (
        ({"blocks": 7}, "policy_settings"),
        ({**content["policy_settings"], "blocks": "seven"}, "policy_settings"),
        ({**content["policy_settings"], "blocks": 9}, "9 blocks"),
        ({**content["policy_settings"], "width": 32}, "of shape"),
    ):
        file.write_text(json.dumps({**content, "policy_settings": settings}))
        with pytest.raises(UserError, match=message):
            buddy.load(study / "run", device="cpu")


# The fingerprint of a backbone


def test_a_fingerprint_is_of_the_weights_wherever_they_lie(made, tmp_path):
    expected = fingerprint.of_backbone(made / "backbone")
    shutil.copytree(made / "backbone", tmp_path / "copy")
    assert fingerprint.of_backbone(tmp_path / "copy") == expected
    linked = tmp_path / "linked"
    assert command("backbone", "--folder", made / "backbone", "--out", linked).status == 0
    assert fingerprint.of_backbone(linked) == expected
    model = tiny("llama")
    model.resize_token_embeddings(300)
    model.load_state_dict(load_file(made / "backbone" / WEIGHTS), strict=False)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint.of_backbone(tmp_path / "shards") == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({name: value * 1.0001 for name, value in tensors.items() if "q_proj" in name}),
        lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}),
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] + 1}),
    ],
)
def test_a_fingerprint_tells_changed_weights(study, change):
    before = fingerprint.of_backbone(study / "backbone")
    changed(study / "backbone" / WEIGHTS, change)
    assert fingerprint.of_backbone(study / "backbone") != before


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}, {"rms_norm_eps": 0.1}]
)
def test_a_fingerprint_tells_another_use_of_the_same_weights(study, change):
    before = fingerprint.of_backbone(study / "backbone")
    file = study / "backbone/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert fingerprint.of_backbone(study / "backbone") != before


def test_priors_and_orders_of_another_backbone_are_refused(made, tmp_path):
    backbone(tmp_path / "other", seed=5)
    (tmp_path / "book.txt").write_text("A long day by the sea. " * 100)
    ranked = ("--corpus", tmp_path / "book.txt", "--samples", 1, "--length", 16, "--device", "cpu")
    assert command("data", "--name", "alpaca", "--source", "embedded", "--out", tmp_path / "alpaca").status == 0
    prior, order = tmp_path / "prior.json", tmp_path / "order.json"
    measure = ("importance", "--backbone", tmp_path / "other", "--indicator", "cosine", *ranked, "--out", prior)
    assert command(*measure).status == 0
    choose = (
        "calibrate",
        "--backbone",
        tmp_path / "other",
        "--method",
        "shortgpt",
        "--removed",
        1,
        *ranked,
        "--out",
        order,
    )
    assert command(*choose).status == 0
    on = ("--backbone", made / "backbone", "--data", tmp_path / "alpaca", "--out", tmp_path / "run", "--device", "cpu")
    train = ("train", *on, "--most-removed", 1, "--prior", prior)
    adapt = ("adapt", *on, "--method", "shortgpt", "--removed", 1, "--calibration", order, "--lora", "none")
    for words, record in ((train, prior), (adapt, order)):
        said = command(*words).mistake
        assert str(record) in said
        assert "was made with another backbone" in said
        assert not (tmp_path / "run").exists()
        old = Record.read(record)
        old.digests = {}
        old.write(record)
    assert command(*adapt).status == 0  # a record from before there were digests
    assert set(runs.RunInfo.read(tmp_path / "run").digests) == {"backbone", "calibration"}
