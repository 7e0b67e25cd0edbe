"""Hugging Face's options: each one decided, the honoured ones equal to the untouched model's, the others refused unrun."""

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, prompts, tiny, with_router
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import MinLengthLogitsProcessor, TopKLogitsWarper
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.utils import TransformersKwargs

from buddy.backbones.untrained import byte_tokenizer
from buddy.errors import UserError
from buddy.policies.static import StaticPolicy
from buddy.routing import options
from buddy.routing.model import RoutedModel
from buddy.routing.options import Options

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def pair(architecture="llama", kv="zero", **configuration):
    """The untouched model, and a routed one over a copy of it."""
    backbone = tiny(architecture)
    for name, value in configuration.items():
        setattr(backbone.config, name, value)
    return copy.deepcopy(backbone), with_router(backbone, kv=kv)


class Passes:
    """Counts a backbone's passes, by a hook on its embeddings."""

    def __init__(self, backbone):
        self.count = 0
        self.handle = backbone.get_input_embeddings().register_forward_hook(self._hook)

    def _hook(self, *_):
        self.count += 1


# ---- every option is decided -----------------------------------------------------------------------------------------


def test_every_field_of_the_installed_generation_config_is_decided():
    undecided = set(vars(GenerationConfig())) - set(options.FIELDS)
    assert not undecided, f"decide what becomes of them in buddy/routing/options.py: {sorted(undecided)}"


def test_every_argument_of_the_installed_generate_is_decided():
    source = inspect.getsource(GenerationMixin)
    names = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    for taken in ("tokenizer", "assistant_tokenizer", "trust_remote_code"):  # those that it takes out of its kwargs
        assert f'kwargs.pop("{taken}"' in source
        names.add(taken)
    assert not names - set(options.ARGUMENTS)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_argument_of_the_installed_forward_passes_is_decided(architecture):
    backbone = tiny(architecture)
    names = set(TransformersKwargs.__annotations__)
    for forward in (type(backbone).forward, type(backbone.get_decoder()).forward):
        names |= set(inspect.signature(forward).parameters) - {"self", "kwargs"}
    assert not names - set(options.FORWARD)
    assert not names - set(options.ARGUMENTS)


def test_every_decision_says_why():
    for decisions in (options.FIELDS, options.FORWARD, options.ARGUMENTS):
        for name, decision in decisions.items():
            assert decision.how in (options.HONOURED, options.TRANSLATED, options.REFUSED)
            assert decision.how == options.HONOURED or decision.why, name
            assert decision.allows(None), f"{name}: what nobody set must not be refused"


def test_the_documentation_names_what_is_not_simply_honoured():
    text = (Path(__file__).parents[2] / "docs/engine.md").read_text(encoding="utf-8")
    for name, decision in {**options.ARGUMENTS, **options.FIELDS}.items():
        if decision.how != options.HONOURED:
            assert f"`{name}`" in text, name


# ---- the honoured ones are the untouched model's ---------------------------------------------------------------------

_PROCESSING = {
    "temperature": st.floats(0.3, 3.0),
    "top_k": st.integers(1, 60),
    "top_p": st.floats(0.2, 1.0),
    "min_p": st.floats(0.0, 0.3),
    "typical_p": st.floats(0.2, 1.0),
    "epsilon_cutoff": st.floats(0.0, 0.01),
    "eta_cutoff": st.floats(0.0, 0.01),
    "repetition_penalty": st.floats(1.0, 2.0),
    "encoder_repetition_penalty": st.floats(0.8, 1.5),
    "no_repeat_ngram_size": st.integers(0, 3),
    "encoder_no_repeat_ngram_size": st.integers(0, 2),
    "bad_words_ids": st.lists(st.lists(st.integers(1, 96), min_size=1, max_size=2), min_size=1, max_size=3),
    "sequence_bias": st.just([[[5], 3.0], [[7, 8], -2.0]]),
    "suppress_tokens": st.lists(st.integers(0, 96), min_size=1, max_size=9),
    "begin_suppress_tokens": st.lists(st.integers(0, 96), min_size=1, max_size=9),
    "forced_eos_token_id": st.integers(1, 96),
    "exponential_decay_length_penalty": st.just((2, 1.3)),
    "remove_invalid_values": st.booleans(),
    "renormalize_logits": st.booleans(),
    "eos_token_id": st.lists(st.integers(1, 96), min_size=1, max_size=12),
    "min_new_tokens": st.integers(1, 4),
    "early_stopping": st.just(True),
    "length_penalty": st.floats(0.5, 2.0),
    "num_assistant_tokens": st.integers(1, 9),
    "assistant_lookbehind": st.integers(1, 9),
    "max_cache_len": st.integers(50, 90),
    "use_cache": st.booleans(),
    "cache_implementation": st.sampled_from((None, "dynamic")),
}
_OUTPUTS = ("output_scores", "output_logits", "output_hidden_states")


@torch.no_grad()
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    kv=st.sampled_from(("zero", "mask", "project")),
    chosen=st.fixed_dictionaries({}, optional=_PROCESSING),
    sample=st.booleans(),
    length=st.sampled_from(({"max_new_tokens": 6}, {"max_length": 14}, {"max_new_tokens": 6, "min_length": 12}, {})),
    outputs=st.sets(st.sampled_from(_OUTPUTS)),
    masked=st.booleans(),
    copies=st.integers(1, 2),
    place=st.sampled_from(("call", "config", "checkpoint")),
    seed=st.integers(0, 99),
)
def test_full_depth_equals_the_untouched_model_under_any_options(
    architecture, kv, chosen, sample, length, outputs, masked, copies, place, seed
):
    plain, model = pair(architecture, kv)
    ids, mask = prompts(seed=seed)
    asked = {**chosen, **length, "do_sample": sample, "pad_token_id": 0, **dict.fromkeys(outputs, True)}
    asked["return_dict_in_generate"] = bool(outputs)
    if "exponential_decay_length_penalty" in chosen:
        asked.setdefault("eos_token_id", [3])
    # Hugging Face refuses an end that is forced and suppressed.
    asked["suppress_tokens"] = [t for t in chosen.get("suppress_tokens", ()) if t != chosen.get("forced_eos_token_id")]
    if not asked["suppress_tokens"]:
        del asked["suppress_tokens"]
    if sample:
        asked["num_return_sequences"] = copies
    asked = {name: value for name, value in asked.items() if name in vars(GenerationConfig())}
    given_mask = {"attention_mask": mask} if masked else {}
    if place == "call":
        arguments = asked
    elif place == "config":
        arguments = {"generation_config": GenerationConfig(**asked)}
    else:
        arguments = {}
        for one in (plain, model.backbone):
            one.generation_config.update(**asked)
    torch.manual_seed(seed)
    try:
        expected = plain.generate(input_ids=ids, **given_mask, **copy.deepcopy(arguments))
    except (ValueError, RuntimeError) as error:  # options that leave no token to draw
        torch.manual_seed(seed)
        with pytest.raises((UserError, type(error))):
            model.generate(ids, budget=1.0, **given_mask, **copy.deepcopy(arguments))
        return
    torch.manual_seed(seed)
    found = model.generate(ids, budget=1.0, **given_mask, **copy.deepcopy(arguments))
    if not outputs:
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.past_key_values is None) == (expected.past_key_values is None)
    close = {"atol": 1e-4, "rtol": 1e-4} if asked.get("use_cache") is False else {"atol": 0, "rtol": 0}
    for name in ("scores", "logits"):
        if f"output_{name}" in outputs:
            for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(one, other, equal_nan=True, **close)
    if "output_hidden_states" in outputs:
        for step, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert len(step) == 8
            for one, two in zip(step, other, strict=True):
                torch.testing.assert_close(one, two[:, -one.shape[1] :], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("where", ["call", "config", "checkpoint", "config.json"])
def test_a_cache_that_is_not_wanted_changes_no_token(where, tmp_path):
    plain, model = pair()
    ids, mask = prompts()
    arguments = dict(GREEDY)
    if where == "call":
        arguments["use_cache"] = False
    elif where == "config":
        arguments = {"generation_config": GenerationConfig(use_cache=False, **GREEDY)}
    elif where == "checkpoint":
        plain.generation_config.use_cache = model.backbone.generation_config.use_cache = False
    else:
        plain.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        (tmp_path / "config.json").write_text(json.dumps({**content, "use_cache": False}), encoding="utf-8")
        plain = type(plain).from_pretrained(tmp_path).eval()
        model = RoutedModel(type(plain).from_pretrained(tmp_path).eval(), model.policy)
    expected = plain.generate(input_ids=ids, attention_mask=mask, **arguments)
    assert torch.equal(model.generate(ids, mask, budget=1.0, **arguments), expected)
    routed = model.generate(ids, mask, budget=4 / 7, **arguments)
    arguments["use_cache"] = True
    assert torch.equal(model.generate(ids, mask, budget=4 / 7, **arguments), routed)


@torch.no_grad()
def test_padding_without_a_mask_is_inferred_as_there():
    plain, model = pair()
    ids, mask = prompts()
    expected = plain.generate(input_ids=ids, pad_token_id=0, **GREEDY)
    assert torch.equal(model.generate(ids, budget=1.0, pad_token_id=0, **GREEDY), expected)
    routed = model.generate(ids, mask, budget=4 / 7, **GREEDY)
    assert torch.equal(model.generate(ids, budget=4 / 7, pad_token_id=0, **GREEDY), routed)
    assert torch.equal(model.generate(inputs=ids, budget=4 / 7, pad_token_id=0, **GREEDY), routed)


@torch.no_grad()
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_may_stand_for_tokens(with_ids):
    plain, model = pair()
    ids, mask = prompts()
    embeddings = plain.get_input_embeddings()(ids)
    given_ids = ids if with_ids else None
    expected = plain.generate(input_ids=given_ids, attention_mask=mask, inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(model.generate(given_ids, mask, budget=1.0, inputs_embeds=embeddings, **GREEDY), expected)
    routed = model.generate(ids, mask, budget=4 / 7, **GREEDY)
    found = model.generate(given_ids, mask, budget=4 / 7, inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(found[:, -8:], routed[:, -8:])
    assert torch.equal(
        model(attention_mask=mask, budget=4 / 7, inputs_embeds=embeddings).logits, model(ids, mask, budget=4 / 7).logits
    )


@torch.no_grad()
def test_a_prompt_may_be_absent_and_positions_given():
    plain, model = pair()
    assert torch.equal(model.generate(budget=1.0, **GREEDY), plain.generate(**GREEDY))
    ids, mask = prompts()
    positions = torch.arange(9)[None].expand(3, -1) + 5
    expected = plain.generate(input_ids=ids, attention_mask=mask, position_ids=positions, **GREEDY)
    assert torch.equal(model.generate(ids, mask, budget=1.0, position_ids=positions, **GREEDY), expected)


@torch.no_grad()
def test_processors_criteria_and_stop_strings_are_the_callers():
    plain, model = pair()
    backbone = model.backbone
    for one in (plain, backbone):
        one.resize_token_embeddings(300)
    tokenizer = byte_tokenizer()
    model.tokenizer = tokenizer
    ids, mask = prompts()

    def arguments():
        return {
            "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(12, 3), TopKLogitsWarper(4)]),
            "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(13)]),
            "prefix_allowed_tokens_fn": lambda row, tokens: list(range(row, 90)),
            "max_new_tokens": 9,
            "do_sample": True,
        }

    for more in ({}, {"stop_strings": ["a", "Q"]}):
        torch.manual_seed(5)
        expected = plain.generate(input_ids=ids, attention_mask=mask, tokenizer=tokenizer, **more, **arguments())
        torch.manual_seed(5)
        assert torch.equal(model.generate(ids, mask, budget=1.0, **more, **arguments()), expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pass_has_the_loss_states_and_outputs_of_the_untouched_model(attention):
    plain, model = pair(_attn_implementation=attention)
    ids, mask = prompts()
    arguments = {
        "labels": ids.masked_fill(mask == 0, -100),
        "output_hidden_states": True,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "num_items_in_batch": torch.tensor(20),
    }
    expected = plain(input_ids=ids, attention_mask=mask, **arguments)
    for form in ("sequence", "causal"):
        found = model(ids, mask, budget=1.0, routing=form, **arguments)
        assert torch.equal(found.loss, expected.loss)
        assert len(found.hidden_states) == 8
        assert all(torch.equal(*both) for both in zip(found.hidden_states, expected.hidden_states, strict=True))
    logits = plain(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(ids, mask, budget=1.0, return_dict=False)[0], logits)
    assert torch.equal(model(ids, mask, budget=1.0, logits_to_keep=2).logits, logits[:, -2:])
    model.config.output_hidden_states = True
    assert len(model(ids, mask, budget=1.0).hidden_states) == 8


@torch.no_grad()
def test_a_block_that_is_skipped_leaves_its_state():
    model = with_router(tiny())
    ids, mask = prompts()
    states = model(ids, mask, budget=4 / 7, output_hidden_states=True).hidden_states
    route = model.trace.steps[0]
    for block in range(6):  # the last is shown after the norm
        for row in range(3):
            assert torch.equal(states[block][row], states[block + 1][row]) is not bool(route[row, block])


# ---- a second turn ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@settings(deadline=None, max_examples=25)
@given(
    kv=st.sampled_from(("zero", "mask", "project")),
    source=st.integers(1, 3),
    decode=st.sampled_from(("recompute", "reuse", 3)),
    only_new=st.booleans(),
    said=st.integers(0, 6),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_second_turn_goes_on_as_one_pass_over_everything_would(kv, source, decode, only_new, said, padded, seed):
    plain = tiny(seed=seed % 3)
    # Balanced on another prompt: an exact tie would be broken by the rounding that batching changes.
    model = with_router(copy.deepcopy(plain), source_block=source, kv=kv, seed=seed, balanced=1000)
    ids, mask = prompts(seed=seed)
    if not padded:
        ids, mask = ids[:1], mask[:1]
    keep = {"return_dict_in_generate": True, "decode": decode}
    new = torch.randint(1, VOCABULARY, (len(ids), said), generator=torch.Generator().manual_seed(seed))
    for budget in (1.0, 5 / 7):
        first = model.generate(ids, mask, budget=budget, **GREEDY, **keep)
        whole = torch.cat([first.sequences, new], 1)
        whole_mask = torch.cat([mask, torch.ones_like(whole[:, 9:])], 1)
        cache, held = first.past_key_values, first.past_key_values.length
        second = model.generate(
            whole[:, held:] if only_new else whole, whole_mask, past_key_values=cache, **GREEDY, **keep
        ).sequences
        if budget == 1.0:
            expected = plain.generate(input_ids=whole, attention_mask=whole_mask, **GREEDY)
            assert torch.equal(second[:, -8:], expected[:, -8:])
        elif said == 0:  # as if nobody had stopped in between
            longer = model.generate(ids, mask, budget=budget, decode=decode, max_new_tokens=16, do_sample=False)
            assert torch.equal(second[:, -8:], longer[:, -8:])
        elif decode == "recompute":  # what was said is read, and a route is chosen from all that was read
            after = model.trace.steps[0]
            model(whole, whole_mask, budget=budget)
            assert torch.equal(after, model.trace.steps[0])


@torch.no_grad()
def test_a_cache_that_cannot_be_gone_on_from_is_refused():
    model = with_router(tiny())
    other = RoutedModel(tiny(blocks=6), StaticPolicy(6))
    ids, mask = prompts()
    first = model.generate(ids, mask, budget=5 / 7, return_dict_in_generate=True, **GREEDY)
    cache, whole = first.past_key_values, first.sequences
    passes = Passes(model.backbone)
    refused = [
        ("DynamicCache has no routing state", lambda: model.generate(ids, past_key_values=DynamicCache())),
        ("DynamicCache has no routing state", lambda: model(ids, budget=1.0, past_key_values=DynamicCache())),
        ("cache of 6 blocks", lambda: model.generate(ids, past_key_values=other.new_cache())),
        ("holds 3 sequences, the call has 1", lambda: model.generate(whole[:1], past_key_values=cache)),
        ("holds 3 sequences, the call has 6", lambda: model.generate(
            whole, past_key_values=cache, do_sample=True, num_return_sequences=2)),
        ("holds 16 already", lambda: model.generate(whole[:, :16], past_key_values=cache)),
        ("holds 16 already", lambda: model.generate(whole[:, 16:], past_key_values=cache)),
        ("was started with 0.714", lambda: model.generate(whole, past_key_values=cache, budget=1.0)),
        ("was started with 0.714", lambda: model(ids[:, :1], budget=[1.0, 5 / 7, 5 / 7], past_key_values=cache)),
        ("start a conversation", lambda: model.generate(
            None, past_key_values=cache, inputs_embeds=model.backbone.get_input_embeddings()(ids))),
    ]  # fmt: skip
    passes.count = 0
    for message, call in refused[:-1]:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert passes.count == 0
    with pytest.raises(UserError, match=refused[-1][0]):
        refused[-1][1]()
    model(ids[:, :1], budget=[5 / 7] * 3, past_key_values=cache)  # the same depths, said otherwise


# ---- what is refused is refused unrun --------------------------------------------------------------------------------

REFUSED = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[3]],
    "prompt_lookup_num_tokens": 3,
    "use_mtp": True,
    "is_assistant": True,
    "assistant_early_exit": 3,
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "token_healing": True,
    "output_attentions": True,
    "prefill_chunk_size": 4,
    "compile_config": object(),
    "continuous_batching_config": object(),
    "cache_implementation": "static",
    "output_router_logits": True,
    "cu_seq_lens_q": torch.tensor([0, 3]),
    "cu_seq_lens_k": torch.tensor([0, 3]),
    "max_length_q": 3,
    "max_length_k": 3,
    "seq_idx": torch.zeros(1, 3, dtype=torch.int32),
    "is_causal": False,
    "labels": torch.zeros(3, 9, dtype=torch.long),
    "synced_gpus": True,
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "negative_prompt_ids": torch.ones(3, 9, dtype=torch.long),
    "negative_prompt_attention_mask": torch.ones(3, 9, dtype=torch.long),
    "custom_generate": "somebody/strategy",
    "trust_remote_code": True,
}


def test_the_list_below_holds_everything_that_is_refused():
    refused = {
        name
        for name, decision in {**options.ARGUMENTS, **options.FIELDS}.items()
        if decision.how == options.REFUSED or decision.allowed is not None
    }
    assert refused - {"use_cache"} == set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_refused_unrun_wherever_it_is_set(name):
    plain, model = pair()
    ids, mask = prompts()
    passes = Passes(model.backbone)
    before = model.backbone.config.to_dict()

    def refused(source, **arguments):
        with pytest.raises(UserError, match=f"^{source}: {name}=") as error:
            model.generate(ids, mask, budget=1.0, **GREEDY, **arguments)
        assert "\n" not in str(error.value)
        assert passes.count == 0

    refused("generate", **{name: REFUSED[name]})
    if name in options.FIELDS:
        configuration = GenerationConfig()
        setattr(configuration, name, REFUSED[name])
        refused("generation_config", generation_config=configuration)
        setattr(model.backbone.generation_config, name, REFUSED[name])
        refused("the checkpoint's generation_config")
        overruled = 1 if name.startswith("num_beam") else None
        setattr(model.backbone.generation_config, name, None if name != "num_beams" else 2)
        model.generate(ids, mask, budget=1.0, **GREEDY, **{name: overruled})
    if name in options.FORWARD and options.FORWARD[name].how == options.REFUSED:
        passes.count = 0
        with pytest.raises(UserError, match=f"^forward: {name}="):
            model(ids, mask, budget=1.0, **{name: REFUSED[name]})
        assert passes.count == 0
    assert model.backbone.config.to_dict() == before
    assert torch.equal(model.generate(ids, mask, budget=1.0, num_beams=1, **GREEDY),
                       plain.generate(input_ids=ids, attention_mask=mask, **GREEDY))  # fmt: skip


@torch.no_grad()
def test_wrong_inputs_are_refused_unrun_in_one_line():
    model = with_router(tiny())
    ids, mask = prompts()
    passes = Passes(model.backbone)
    square = torch.ones(3, 1, 9, 9)
    refused = [
        ("did you mean max_new_tokens", lambda: model.generate(ids, mask, budget=1.0, max_new_token=5)),
        ("'token_type_ids' is no option", lambda: model.generate(ids, mask, budget=1.0, token_type_ids=ids)),
        ("did you mean logits_to_keep", lambda: model(ids, mask, budget=1.0, logits_to_kep=5)),
        ("did you mean max_new_tokens", lambda: model.generate(
            ids, mask, budget=1.0, generation_config=GenerationConfig(max_new_tokns=3))),
        ("generation_config is of type dict", lambda: model.generate(ids, budget=1.0, generation_config={})),
        ("attention_mask: shape .3, 1, 9, 9.", lambda: model.generate(ids, square, budget=1.0)),
        ("attention_mask: shape .3, 1, 9, 9.", lambda: model(ids, square, budget=1.0)),
        ("attention_mask: shape .3, 8., where .3, 9. is needed", lambda: model(ids, mask[:, 1:], budget=1.0)),
        ("attention_mask: shape .3, 8., where .3, 9. is needed", lambda: model.generate(ids, mask[:, 1:], budget=1.0)),
        ("input_ids: shape .9,.", lambda: model.generate(ids[0], budget=1.0)),
        ("input_ids: shape .3, 0. holds no token", lambda: model.generate(ids[:, :0], budget=1.0)),
        ("input_ids: a tensor is needed, not list", lambda: model.generate(ids.tolist(), budget=1.0)),
        ("input_ids: torch.float32", lambda: model.generate(ids.float(), budget=1.0)),
        ("token 97 is outside the vocabulary of 97", lambda: model.generate(ids + 97 - ids.max(), budget=1.0)),
        ("token -1 is outside", lambda: model.generate(ids - 1, budget=1.0)),
        ("either input_ids or inputs_embeds", lambda: model(budget=1.0)),
        ("either input_ids or inputs$", lambda: model.generate(ids, inputs=ids, budget=1.0)),
        ("inputs_embeds: width 5", lambda: model(inputs_embeds=torch.zeros(1, 2, 5), budget=1.0)),
        ("max_new_tokens", lambda: model.generate(ids, mask, budget=1.0, max_new_tokens=0)),
        ("generate: .*temperature", lambda: model.generate(ids, mask, budget=1.0, do_sample=True, temperature=-1.0)),
        ("generate: .*max_length", lambda: model.generate(ids, mask, budget=1.0, max_length=3)),
        ("generate: .*tokenizer", lambda: model.generate(ids, mask, budget=1.0, stop_strings="x")),
    ]  # fmt: skip
    for message, call in refused:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value), message
        assert passes.count == 0, message
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    for call in (lambda: model(ids, mask, budget=1.0), lambda: model.generate(ids, mask, budget=1.0, **GREEDY)):
        with pytest.raises(UserError, match=r"config.json: output_attentions"):
            call()
    assert passes.count == 0
    model.config.output_attentions = False
    model.config.is_causal = False
    with pytest.raises(UserError, match="is_causal"):
        RoutedModel(model.backbone, model.policy)


def test_an_option_of_another_version_is_refused_until_it_is_decided(monkeypatch):
    """A newer transformers adds fields: used, they are refused; left alone, they are not in the way."""
    _, model = pair()
    ids, mask = prompts()
    monkeypatch.delitem(options.FIELDS, "top_p")
    model.generate(ids, mask, budget=1.0, **GREEDY)
    for arguments in ({"top_p": 0.5}, {"generation_config": GenerationConfig(top_p=0.5)}):
        with pytest.raises(UserError, match=r"'top_p' is no option that is known here, with transformers \d"):
            model.generate(ids, mask, budget=1.0, **GREEDY, **arguments)
    model.backbone.generation_config.top_p = 0.5
    with pytest.raises(UserError, match=r"^the checkpoint's generation_config: 'top_p'"):
        model.generate(ids, mask, budget=1.0, **GREEDY)
    model.backbone.generation_config.top_p = None
    model.backbone.generation_config.chat_format = "a word of another tool's"  # which transformers reads past as well
    model.generate(ids, mask, budget=1.0, **GREEDY)


def test_a_policy_that_reads_tokens_needs_them():
    model = with_router(tiny())
    model.policy.reads_tokens = True
    with pytest.raises(UserError, match="reads tokens; give input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32), budget=1.0)


def test_options_say_what_is_in_force_and_where():
    _, model = pair()
    own = model.backbone.generation_config
    own.max_new_tokens, own.top_k = 3, 7
    configuration = GenerationConfig(max_new_tokens=5)
    assert Options({"generation_config": configuration}, model.backbone)["max_new_tokens"] == 5
    assert Options({"generation_config": configuration, "top_k": 9}, model.backbone)["top_k"] == 9
    assert Options({}, model.backbone)["max_new_tokens"] == 3
    assert Options({}, model.backbone)["top_p"] is None
