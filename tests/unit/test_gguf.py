"""A GGUF file of an exported model: transformers and llama.cpp read from it what the Hugging Face folder computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from importlib import resources

import hub_server
import numpy as np
import pytest
import torch
from command_line import buddy as command
from gguf import GGMLQuantizationType, GGUFReader
from huggingface_hub import constants
from models import tiny
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from buddy import runs
from buddy.backbones import gguf_model, gguf_tokenizer, gguf_vocabulary
from buddy.backbones.untrained import CHAT_TEMPLATE, byte_tokenizer
from buddy.errors import UserError
from buddy.policies.static import StaticPolicy

BLOCKS = 7
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The capital of France is",
    " two  spaces\n\n\ttab and 12345 numbers, 3.14",
    "We've seen it; they'll see it's «naïve» 漢字 🙂",
    "<|im_start|>user\nHi<|im_end|>",
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_level(kind: str) -> Tokenizer:
    """An untrained byte-level tokenizer that cuts text as the published ones of this kind do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    regex = {"llama-bpe": LLAMA3, "qwen2": QWEN2}.get(kind)
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }.get(kind) or ([pre_tokenizers.Split(Regex(regex), "isolated")] if regex else [])
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """An untrained tokenizer of Llama 2's kind: pieces with a space before words, bytes to fall back on."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def prose() -> list[str]:
    file = resources.files("buddy.data") / "embedded/wikitext2.validation.jsonl"
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 600 tokens, learnt from the embedded prose."""
    pieces = kind == "llama"
    special = SPECIAL + ([f"<0x{byte:02X}>" for byte in range(256)] if pieces else [])
    alphabet = [] if pieces else pre_tokenizers.ByteLevel.alphabet()
    tokenizer = sentencepiece() if pieces else byte_level(kind)
    how = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(prose(), how)
    if pieces:  # bytes are pieces like others, not marks
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def smollm():
    return trained("smollm")


def of(architecture: str, tokenizer, **changed) -> torch.nn.Module:
    """A tiny model with an embedding for the tokenizer's tokens and five more."""
    plain = tiny(architecture)
    config = type(plain.config)(**{**plain.config.to_dict(), "vocab_size": len(tokenizer) + 5, **changed})
    torch.manual_seed(1)
    model = type(plain)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases that matter
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return model


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def run(request, tmp_path):
    """A static peer's run with random LoRA, its backbone published under a licence."""
    folder = tmp_path / "results" / "small" / "backbones" / "tiny"
    tokenizer = trained("smollm" if request.param == "llama" else "qwen2")
    backbone = of(request.param, tokenizer, tie_word_embeddings=request.param == "qwen3")
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    adapted = get_peft_model(backbone, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    place = tmp_path / "results" / "small" / "runs" / "method~sleb"
    policy = StaticPolicy(BLOCKS, [4, 2, 3])
    training = {"data": "alpaca", "loss": "kl", "lora_rank": 4}
    info = runs.RunInfo(
        "sleb", "static", policy.settings(), "tiny", runs.relative(folder, place), training=training, commit="abc1234"
    )
    return runs.save(place, info, policy, adapted)


class LlamaCpp:
    """llama.cpp over a file, asked through its own server."""

    def __init__(self, file) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
        params.warmup, params.verbosity = False, -1
        self.server = xllamacpp.Server(params)
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(self, path: str, asked: dict) -> dict:
        body = json.dumps(asked).encode()
        request = urllib.request.Request(
            self.server.listening_address + path, body, {"Content-Type": "application/json"}
        )
        return json.loads(self.open(request, timeout=60).read())

    def tokens(self, text: str) -> list[int]:
        return self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def next(self, ids: list[int], size: int) -> torch.Tensor:
        """Log-probabilities of the next token, shape (V,)."""
        asked = {"prompt": ids, "n_predict": 1, "n_probs": size, "temperature": 1.0, "cache_prompt": False}
        answers = (self.ask("/completion", {**asked, "seed": seed}) for seed in range(20))
        answer = next(one for one in answers if "completion_probabilities" in one)  # none with the end of the text
        found = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(found) == size
        return torch.tensor([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])])


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every matrix at half precision, computed with in float32."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    return model


@torch.no_grad()
def test_transformers_and_llama_cpp_read_what_the_folder_holds(run, tmp_path):
    out, file = tmp_path / "out", tmp_path / "files" / "m.gguf"
    done = command("export", "--run", run, "--removed", 2, "--out", out, "--gguf", file)
    assert done.status == 0, done.err
    assert f"{file}: f16, 0." in done.out
    plain = rounded(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())
    # Its reader knows no width of heads for some architectures; the rest is compared.
    again = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, config=plain.config
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("A text of some words and 17 numbers", return_tensors="pt").input_ids
    expected = plain(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(again(ids).logits, expected, atol=2e-5, rtol=0)
    fields = GGUFReader(file).fields
    assert fields["general.license"].contents() == "mit"
    assert fields["buddy.blocks"].contents() == 7
    assert fields["buddy.removed"].contents() == [2, 4]
    assert "without 2 of its 7 blocks (2, 4; counted from 0), which sleb left out" in (
        fields["general.description"].contents()
    )
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE
    if plain.config.model_type == "llama":
        own = gguf_tokenizer.read(file, "test")
        assert all(own(text).input_ids == tokenizer(text).input_ids for text in TEXTS)
    there = LlamaCpp(file)
    assert all(there.tokens(text) == tokenizer(text).input_ids for text in TEXTS)
    found = there.next(ids[0].tolist(), plain.config.vocab_size)
    # It keeps K and V, and what goes into a matrix, at half precision.
    torch.testing.assert_close(found, expected[0, -1].log_softmax(-1), atol=0.02, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_llama_cpp_turns_positions_as_transformers_does(smollm, rope, tmp_path):
    shape = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4}
    model = of("llama", smollm, rope_parameters=rope, **shape)
    gguf_model.write(model, smollm, tmp_path / "m.gguf", "f16", gguf_model.Facts("m"))
    ids = torch.randint(3, len(smollm), (1, 200), generator=torch.Generator().manual_seed(0))
    expected = rounded(model)(ids).logits[0, -1].log_softmax(-1)
    plain = of("llama", smollm, **shape)
    plain.load_state_dict(model.state_dict())
    without = plain(ids).logits[0, -1].log_softmax(-1)
    if rope["rope_type"] != "default":
        assert (without - expected).abs().max() > 0.1  # the parameters matter here
    found = LlamaCpp(tmp_path / "m.gguf").next(ids[0].tolist(), model.config.vocab_size)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "llama-bpe", "qwen2", "llama"])
def test_llama_cpp_cuts_text_into_the_same_tokens(kind, tmp_path):
    tokenizer = trained(kind)
    assert len({len(tokenizer(text).input_ids) for text in TEXTS}) > 1
    found = gguf_vocabulary.of(tokenizer, len(tokenizer) + 5)
    assert (found.model, found.pre) == (("llama", "default") if kind == "llama" else ("gpt2", kind))
    gguf_model.write(of("llama", tokenizer), tokenizer, tmp_path / "m.gguf", "f16", gguf_model.Facts("m"))
    there = LlamaCpp(tmp_path / "m.gguf")
    texts = [*TEXTS, *prose()[:5]]
    if kind == "llama":  # theirs puts a space after a mark, too: as Llama 2's own tokenizer did
        texts.remove(TEXTS[3])
    for text in texts:
        assert there.tokens(text) == tokenizer(text).input_ids, text


def test_a_token_before_every_text_is_there_in_llama_cpp_too(tmp_path):
    tokenizer = trained("llama-bpe")
    from tokenizers.processors import TemplateProcessing

    begins = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begins} $A", special_tokens=[(begins, tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    gguf_model.write(of("llama", tokenizer), tokenizer, tmp_path / "m.gguf", "f16", gguf_model.Facts("m"))
    assert LlamaCpp(tmp_path / "m.gguf").tokens("some text") == tokenizer("some text").input_ids


def test_8_bits_are_as_near_as_they_can_be(smollm, tmp_path):
    model = of("qwen2", smollm)
    for kind in gguf_model.TYPES:
        gguf_model.write(model, smollm, tmp_path / f"{kind}.gguf", kind, gguf_model.Facts("m"))
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "q8_0.gguf").tensors}
    weight = model.model.layers[3].self_attn.q_proj.weight.detach().numpy()  # rows of 32: one block each
    tensor = stored["blk.3.attn_q.weight"]
    assert tensor.tensor_type == GGMLQuantizationType.Q8_0
    scale = tensor.data[:, :2].copy().view(np.float16).astype(np.float32)
    found = tensor.data[:, 2:].view(np.int8) * scale
    step = np.abs(weight).max(1, keepdims=True) / 127
    assert (np.abs(found - weight) <= 0.5 * step + np.abs(weight) * 2**-10).all()  # the step itself is half precision
    assert stored["blk.3.ffn_down.weight"].tensor_type == GGMLQuantizationType.F16  # rows of 48
    assert stored["blk.3.attn_q.bias"].tensor_type == GGMLQuantizationType.F32


def test_what_has_no_place_in_a_file_is_refused_before_anything_is_written(smollm, run, tmp_path):
    def refused(said, tokenizer=smollm, **changed):
        with pytest.raises(UserError, match=said):
            gguf_model.check(of("llama", smollm, **changed).config, tokenizer)

    refused("has no merges", byte_tokenizer())
    odd = trained("gpt-2")
    odd.backend_tokenizer.normalizer = normalizers.Lowercase()
    refused("changes text before it is cut", odd)
    odd = trained("gpt-2")
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    refused("cuts text in a way that GGUF has no name for", odd)
    refused("a token 599, the model an embedding of 300", vocab_size=300)
    refused("hidden_act is 'gelu'", hidden_act="gelu")
    refused("dynamic", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 3.0}
    refused("attention_factor: 3.0, which has no place", rope_parameters=scaled)

    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"GGUF, and mine")
    asked = ("export", "--run", run, "--removed", 2, "--out", tmp_path / "out")
    assert "is not a file that buddy made" in command(*asked, "--gguf", mine).mistake
    assert "ends in .gguf" in command(*asked, "--gguf", tmp_path / "model.bin").mistake
    assert (
        "'q4_0' is not one of f16 or q8_0" in command(*asked, "--gguf", tmp_path / "x.gguf", "--type", "q4_0").mistake
    )
    assert mine.read_bytes() == b"GGUF, and mine"
    assert not (tmp_path / "out").exists()
    for _ in range(2):  # its own it replaces
        assert command(*asked, "--gguf", tmp_path / "x.gguf").status == 0


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hub, which this process takes for the real one."""
    with hub_server.serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.mark.parametrize("run", ["llama"], indirect=True)
def test_a_folder_is_sent_to_the_hub_and_loads_from_there(hub, run, tmp_path):
    out = tmp_path / "out"
    words = ("--run", run, "--removed", 2, "--out", out, "--gguf", out / "m.gguf", "--push", "me/small")
    assert "there is nobody to ask; give --yes as well" in command("export", *words).mistake
    assert not out.exists()
    done = command("export", *words, "--yes", "--private")
    assert done.status == 0, done.err
    there = hub.repositories["models"]["me/small"]
    assert there == {file.name: file.read_bytes() for file in out.iterdir() if file.name != ".buddy.json"}
    assert {"README.md", "config.json", "model.safetensors", "m.gguf", "tokenizer.json"} <= set(there)
    assert hub.private == {"me/small"}
    size = sum(map(len, there.values())) / 1e6
    assert f"{len(there)} files, {size:,.1f} MB; licence: mit" in done.out
    assert "to me/small on the Hub, as me (private where it is made now" in done.out
    assert f"sent: {hub.url}/me/small" in done.out

    settings = {**os.environ, **hub_server.environment(hub.url, tmp_path / "cache")}
    code = "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('me/small').num_parameters())"
    loaded = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert int(loaded.stdout) == AutoModelForCausalLM.from_pretrained(out).num_parameters()


@pytest.mark.parametrize("run", ["llama"], indirect=True)
@pytest.mark.parametrize(("answer", "sent"), [("y", True), ("n", False)])
def test_it_asks_before_it_sends(hub, run, tmp_path, monkeypatch, answer, sent):
    monkeypatch.setattr(sys.modules["buddy.commands.export"], "_somebody", lambda: True)
    words = ("export", "--run", run, "--removed", 2, "--out", tmp_path / "out", "--push", "me/small")
    done = command(*words, stdin=f"{answer}\n")
    assert done.status == 0, done.err
    assert done.out.index("licence: mit") < done.out.index("Send it?")
    assert ("me/small" in hub.repositories["models"]) is sent
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("run", ["llama"], indirect=True)
def test_what_the_hub_refuses_is_told_before_any_work(hub, run, tmp_path, monkeypatch):
    words = ("export", "--run", run, "--removed", 2, "--out", tmp_path / "out", "--yes", "--push")
    for name, token, said in (
        ("me/small", "hf_reads", "the Hub refused (HTTP 401); may the token in HF_TOKEN write there?"),
        ("me/small", "", "no token"),
        ("small", "hf_writes", "write owner/name"),
        ("me/sm all", "hf_writes", "--push me/sm all"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert said in command(*words, name).mistake
    assert not (tmp_path / "out").exists()
    assert hub.repositories["models"] == {}
