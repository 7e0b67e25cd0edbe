"""What becomes of each of Hugging Face's options in a routed pass: honoured, translated, or refused before it starts.

The table is complete for the versions that this package was tested with; a test walks through the installed one's
parameters. An option that a newer version adds is refused where it is used, until somebody decides here what it means.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import transformers
from transformers import GenerationConfig

from buddy.errors import UserError
from buddy.routing.types import CausalLM

HONOURED, TRANSLATED, REFUSED = "honoured", "translated", "refused"


@dataclass(frozen=True)
class Decision:
    """What becomes of an option.

    Attributes:
        how: `HONOURED`: as in Hugging Face's own model. `TRANSLATED`: the same result by other means. `REFUSED`.
        why: what it is translated into, or why it is refused; for an honoured one what should be known about it.
        allowed: the values that are not refused: those of a refused option that ask for nothing. None allows all.
    """

    how: str
    why: str = ""
    allowed: tuple[Any, ...] | None = None

    def allows(self, value: Any) -> bool:
        """Whether an option may have this value."""
        return self.allowed is None or any(_same(value, allowed) for allowed in self.allowed)


def _honoured(names: str, why: str = "") -> dict[str, Decision]:
    return {name: Decision(HONOURED, why) for name in names.split()}


def _refused(names: str, why: str, *idle: Any) -> dict[str, Decision]:
    return {name: Decision(REFUSED, why, (None, False, *idle)) for name in names.split()}


def _same(value: Any, allowed: Any) -> bool:
    """Whether two values are one, True and 1 being two; never compares tensors or objects."""
    if value is None or allowed is None or isinstance(value, bool) or isinstance(allowed, bool):
        return value is allowed
    return isinstance(value, Number | str) and value == allowed


_BEAMS = "beams change places, and a route belongs to one sequence; use num_beams=1, sampled or greedy"
_DRAFTS = "tokens that are taken back cannot be taken out of the running scores that choose routes"
_GUIDANCE = "guidance runs a second pass beside each step, whose routes would be mixed with the text's"

FIELDS: dict[str, Decision] = {
    **_honoured("max_length max_new_tokens min_length min_new_tokens max_time stop_strings"),
    **_honoured("do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff"),
    **_honoured("repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size"),
    **_honoured("bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens forced_bos_token_id"),
    **_honoured("forced_eos_token_id exponential_decay_length_penalty remove_invalid_values renormalize_logits"),
    **_honoured("watermarking_config num_return_sequences pad_token_id bos_token_id eos_token_id"),
    **_honoured("output_scores output_logits return_dict_in_generate"),
    **_honoured("output_hidden_states", "a block that a sequence skips leaves its state as it was"),
    **_honoured("early_stopping length_penalty diversity_penalty low_memory", "without effect at one beam, as there"),
    **_honoured(
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold", "without effect alone"
    ),
    **_honoured("max_matching_ngram_size assistant_lookbehind target_lookbehind", "without effect alone"),
    **_honoured("assistant_ensemble_weight speculation_type", "without effect alone"),
    **_honoured("cache_config max_cache_len", "without effect on a cache that grows, as there"),
    **_honoured("decoder_start_token_id", "without effect in a decoder, as there"),
    **_honoured("disable_compile", "the pass is never compiled"),
    **_honoured("transformers_version _from_model_config _commit_hash", "says where the options come from"),
    "use_cache": Decision(
        TRANSLATED, "a generation always keeps its cache: the tokens are those of passes without one"
    ),
    "cache_implementation": Decision(
        TRANSLATED, "the routed cache grows as `dynamic` does, and is no other", (None, "dynamic", "hybrid")
    ),
    **_refused("num_beams num_beam_groups", _BEAMS, 1),
    **_refused("constraints force_words_ids", _BEAMS),
    **_refused("prompt_lookup_num_tokens use_mtp is_assistant", _DRAFTS),
    **_refused("assistant_early_exit", "a route says which blocks run; give a budget instead"),
    **_refused("guidance_scale", _GUIDANCE, 1),
    **_refused("penalty_alpha", "contrastive search tries out tokens and takes them back", 0),
    **_refused("dola_layers", "it compares the states of blocks that may not have run"),
    **_refused("token_healing", "it generates from shortened prompts first, and replaces them"),
    **_refused("output_attentions", "a block that is skipped attends to nothing"),
    **_refused(
        "prefill_chunk_size", "a prompt's route is read from all of it; a prefill in chunks would choose one for each"
    ),
    **_refused("compile_config", "decode steps are captured as CUDA graphs instead: engine='graph'"),
    **_refused("continuous_batching_config", "a cache holds the sequences that it was started with"),
}
"""Every field of ``GenerationConfig``, wherever it is set: in the call, in its ``generation_config``, in the checkpoint's."""

PASS: dict[str, Decision] = {
    **_honoured("input_ids", "(B, S)"),
    **_honoured("inputs_embeds", "(B, S, H); not for a policy that reads tokens"),
    **_honoured("attention_mask", "(B, past + S), 1 for real tokens; one of four dimensions is refused"),
    **_honoured("past_key_values", "a cache that this model made; routing goes on where it stopped"),
    **_honoured("position_ids logits_to_keep use_cache num_items_in_batch"),
    **_honoured("output_hidden_states", "a block that a sequence skips leaves its state as it was"),
    **_refused("output_attentions", "a block that is skipped attends to nothing"),
    **_refused("output_router_logits", "the backbone has no experts"),
    **_refused("cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx", "packed sequences would share a route"),
    "is_causal": Decision(REFUSED, "only causal attention is routed", (None, True)),
}
"""Every argument of a backbone's forward pass."""

FORWARD: dict[str, Decision] = {**PASS, **_honoured("labels return_dict")}
"""Every argument of `RoutedModel.forward` that is Hugging Face's."""

ARGUMENTS: dict[str, Decision] = {
    **PASS,
    "inputs": Decision(TRANSLATED, "the same as input_ids"),
    **_honoured("generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn streamer"),
    **_honoured("tokenizer", "for stop strings; the model's own where none is given"),
    **_refused("labels", "a generation has no loss"),
    **_refused("synced_gpus", "the model is on one device"),
    **_refused("assistant_model assistant_tokenizer", _DRAFTS),
    **_refused("negative_prompt_ids negative_prompt_attention_mask", _GUIDANCE),
    **_refused("custom_generate", "only the decoding loops of transformers are routed"),
    **_refused("trust_remote_code", "code from elsewhere is never run"),
}
"""Every argument of `RoutedModel.generate` that is Hugging Face's and no field of ``GenerationConfig``."""


def check_pass(given: Mapping[str, Any], config: Any) -> None:
    """Refuse arguments of a forward pass that would not be honoured.

    Args:
        given: keyword arguments of the call.
        config: the backbone's configuration, which has defaults of some.

    Raises:
        UserError: names the first one.
    """
    for name, value in given.items():
        _check(name, value, FORWARD, "forward")
    _check_defaults(given, config)


def _check_defaults(given: Mapping[str, Any], config: Any) -> None:
    if given.get("output_attentions") is None:
        _check("output_attentions", config.output_attentions, PASS, "the backbone's config.json")


class Options:
    """The options of one generation: those of the call, of its ``generation_config``, and of the checkpoint's.

    Args:
        given: keyword arguments of the call.
        backbone: has defaults in its ``generation_config`` and its configuration.

    Raises:
        UserError: an option that is refused or not known; names it, and where it was set.
    """

    def __init__(self, given: Mapping[str, Any], backbone: CausalLM) -> None:
        self.given = given
        self._sources = [(backbone.generation_config, "the checkpoint's generation_config")]
        config = given.get("generation_config")
        if config is not None:
            if not isinstance(config, GenerationConfig):
                raise UserError(f"generate: generation_config is of type {type(config).__name__}, not GenerationConfig")
            self._sources.insert(0, (config, "generation_config"))
        known = {**ARGUMENTS, **FIELDS}
        for name, value in given.items():
            _check(name, value, known, "generate")
        for name in sorted(set().union(*(vars(source) for source, _ in self._sources)) - set(given)):
            value, where = self._found(name)
            if not name.startswith("_"):
                self._check_field(name, value, where)
        _check_defaults(given, backbone.config)

    def _check_field(self, name: str, value: Any, where: str) -> None:
        """A field that is set in a configuration; what not even the installed version knows has no effect there."""
        installed = vars(GenerationConfig())
        if name in FIELDS or (name in installed and value != installed[name]):
            _check(name, value, FIELDS, where)
        elif name not in installed and where == "generation_config":
            raise _unknown(name, FIELDS, where)

    def _found(self, name: str) -> tuple[Any, str]:
        """The value in force, and where it was set: the call, its configuration, the checkpoint's, nowhere."""
        if name in self.given:
            return self.given[name], "generate"
        for source, where in self._sources:
            if getattr(source, name, None) is not None:
                return getattr(source, name), where
        return None, "nowhere"

    def __getitem__(self, name: str) -> Any:
        """The value in force; None where nothing sets it."""
        return self._found(name)[0]

    def translated(self, tokenizer: Any = None) -> dict[str, Any]:
        """Keyword arguments for Hugging Face's ``generate``.

        Args:
            tokenizer: for stop strings, where the call gives none.
        """
        arguments = {name: value for name, value in self.given.items() if name not in ("inputs", "trust_remote_code")}
        if self["use_cache"] is False:
            arguments["use_cache"] = True
        if self["cache_implementation"] is not None:
            arguments["cache_implementation"] = None
        if self["stop_strings"] is not None and arguments.get("tokenizer") is None and tokenizer is not None:
            arguments["tokenizer"] = tokenizer
        return arguments


def _check(name: str, value: Any, known: Mapping[str, Decision], where: str) -> None:
    if name not in known:
        raise _unknown(name, known, where)
    decision = known[name]
    if not decision.allows(value):
        raise UserError(f"{where}: {name}={_short(value)} does not work with routing: {decision.why}")


def _unknown(name: str, known: Mapping[str, Decision], where: str) -> UserError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return UserError(
        f"{where}: {name!r} is no option that is known here, with transformers {transformers.__version__}{hint}"
    )


def _short(value: Any) -> str:
    """A value for an error message: a number or a word as it is, anything larger by its type."""
    text = repr(value)
    return text if isinstance(value, bool | int | float | str) and len(text) <= 40 else type(value).__name__
