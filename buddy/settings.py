"""The sections of a study file: every knob with its type, default and meaning, said once.

The JSON schema, the configuration reference and the options of the commands are generated from these models.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from buddy.methods import METHODS, of_kind
from buddy.tasks import PAPERS, TASKS

Feature = Literal["key", "value", "key+value"]
Prior = Literal["none", "delta_ppl", "cosine", "taylor"]
KV = Literal["zero", "mask", "project"]
Indicator = Literal["delta_ppl", "taylor", "cosine", "block_influence"]
Execution = Literal["dense", "sliced", "full", "reuse", "recompute", "varied", "mixed", "nested"]
Engine = Literal["eager", "graph"]
RoutingForm = Literal["sequence", "causal"]
Loss = Literal["ce", "kl"]
PredictorPreset = Literal["paper", "tuned", "rise"]
RouterRecipe = Literal["paper", "tuned"]
PoolOver = Literal["prompt", "question", "all"]
DecodeMode = Literal["recompute", "reuse"]
ScoredData = Literal["alpaca", "gsm8k", "samsum", "wikitext2", "ptb"]
Architecture = Literal["llama3-8b", "llama2-7b", "llama1-13b", "qwen2.5-7b", "tiny-llama", "tiny-qwen2", "tiny-qwen3"]
FEATURES: tuple[Feature, ...] = get_args(Feature)
PRIORS: tuple[Prior, ...] = get_args(Prior)
INDICATORS: tuple[Indicator, ...] = get_args(Indicator)
ROUTING_FORMS: tuple[RoutingForm, ...] = get_args(RoutingForm)
ENGINES: tuple[Engine, ...] = get_args(Engine)
DECODE_MODES = ("reuse", "recompute")
PREDICTOR_PRESETS: tuple[PredictorPreset, ...] = get_args(PredictorPreset)
ROUTER_RECIPES: tuple[RouterRecipe, ...] = get_args(RouterRecipe)
KV_POLICIES: tuple[KV, ...] = get_args(KV)
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

TRAINED = [name for name, task in TASKS.items() if task.train == "train"]
"""Tasks that have a split to train on."""

# Names out of tables that other packages extend: no type checker can know them, every reader of settings can.
if TYPE_CHECKING:
    Task: TypeAlias = str
    TrainedTask: TypeAlias = str
    StaticPeer: TypeAlias = str
    DynamicMethod: TypeAlias = str
    Criterion: TypeAlias = str
    DataName: TypeAlias = str
else:
    Task = Literal[tuple(TASKS)]
    TrainedTask = Literal[tuple(TRAINED)]
    StaticPeer = Literal[of_kind("static")]
    DynamicMethod = Literal[of_kind("routed", "dynamic")]
    Criterion = Literal[tuple(dict.fromkeys(one for method in METHODS.values() for one in method.criteria))]
    DataName = Literal[(*TASKS, "gsm8k", "alpaca", "samsum")]

MOST_SEED = 2**32 - 1
"""Largest seed that every generator takes."""
MOST_BLOCKS = 1000
"""Blocks that a model may have: the largest published ones have some 130."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""A name that is safe as a folder and as a part of a path."""


MODEL_TYPES = ("llama", "qwen2", "qwen3")
"""Values of ``model_type`` in config.json that are routed: plain stacks of pre-norm blocks with rotary embedding."""


class Settings(BaseModel):
    """A section of the study; keys it does not know are errors, and so are infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1."""
        given = value if isinstance(value, list) else [value]
        kind = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(one, bool) for one in given) and bool not in (kind, *get_args(kind)):
            raise ValueError("true and false are no number")
        return value


def told(pattern: str, what: str) -> AfterValidator:
    """A check that says what is allowed in words, where a pattern's own message would show the pattern."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"not {what}")
        return value

    return AfterValidator(check)


Text = Annotated[
    str, told(r"[^\x00-\x1f\x7f]+", "text: it is empty, or holds a line break or another control character")
]
"""What is passed on as it is: names elsewhere, paths, words of a command line."""
File = Annotated[Text, told(r"[^{}]+", "a name that a workflow can read: it holds { or }")]
"""A path that is a rule's input, where braces are wildcards."""


class HubSource(Settings):
    """A model repository on the Hugging Face Hub."""

    hub: Text = Field(description="repository, owner/name")
    revision: Text = Field("main", description="commit to fetch; the commit found is written to the records")


# These two become a word of pip's command line, where one that begins with "-" would be an option.
_WORD = "[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
Distribution = Annotated[str, told(_WORD, "a distribution name (letters and digits, with . _ - between them)")]
Version = Annotated[str, told("[A-Za-z0-9][A-Za-z0-9.!+_-]*", "a version such as 1.2.0")]


class WheelSource(Settings):
    """A GGUF file inside a wheel on the Python package index."""

    wheel: Distribution = Field(description="distribution name")
    version: Version = Field(description="its version")
    file: Text = Field(description="the GGUF file inside the wheel")
    sha256: str = Field(description="SHA-256 of that file", pattern=r"^[0-9a-f]{64}$")


class RandomSource(Settings):
    """A named architecture with random weights: enough for timing and tests."""

    random: Architecture = Field(description="architecture")
    seed: int = Field(0, description="seed of the weights", ge=0, le=MOST_SEED)
    layers: int | None = Field(
        None, description="number of blocks, where it should differ from the architecture's", ge=3, le=MOST_BLOCKS
    )
    tokenizer: Text | None = Field(None, description="backbone whose tokenizer to take; none: one token per byte")


class FolderSource(Settings):
    """A local folder in the Hugging Face format."""

    folder: Text = Field(description="path of the folder")


SOURCES: dict[str, type[Settings]] = {
    "hub": HubSource,
    "wheel": WheelSource,
    "random": RandomSource,
    "folder": FolderSource,
}
"""Where backbones come from, by the key that says so."""


def _named_source(value: Any) -> str | None:
    """The key that says which source is meant; None for no such key, or several."""
    if isinstance(value, Settings):
        return next(key for key, model in SOURCES.items() if isinstance(value, model))
    named = [key for key in SOURCES if isinstance(value, dict) and key in value]
    return named[0] if len(named) == 1 else None


Source = Annotated[
    Annotated[HubSource, Tag("hub")]
    | Annotated[WheelSource, Tag("wheel")]
    | Annotated[RandomSource, Tag("random")]
    | Annotated[FolderSource, Tag("folder")],
    Discriminator(_named_source, "source", "expected exactly one of the keys hub, wheel, random and folder"),
]


SHORTEST_WINDOW = 8
"""Tokens that a window of a calibration corpus has at least."""


class Importance(Settings):
    """How block importance (the priors) is estimated."""

    corpus: File = Field("wikitext2", description="data set, or text file, that calibrates it")
    samples: int = Field(64, description="number of windows", ge=1)
    length: int = Field(512, description="tokens per window", ge=SHORTEST_WINDOW)


def corpus_name(corpus: str) -> str:
    """What a calibration corpus is called in paths: the data set, or the text file without folder and ending."""
    return PurePath(corpus).stem


class Pudding(Settings):
    """PuDDing: a pool of omission sets, and a router that picks one per prompt."""

    tasks: list[TrainedTask] = Field(
        ["piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"],
        description="tasks whose training splits make the pool and train the router",
        min_length=1,
    )
    criteria: list[Literal["likelihood", "likelihood_diff"]] = Field(
        ["likelihood", "likelihood_diff"],
        description="what a removal must keep: the right answer's likelihood, or its lead over the wrong ones; a set each",
        min_length=1,
    )
    pool_items: int = Field(128, description="training items of each task that a set is searched on", ge=1)
    router_items: int | None = Field(
        None, description="training items of each task that the router learns from (all by default)", ge=2
    )
    encoder: Text = Field(
        "backbone",
        description="what reads the prompt: backbone (its first block's keys and values), or an encoder on the Hub or in a "
        "folder, such as google-bert/bert-base-uncased",
    )
    epochs: int = Field(10, description="passes of the router's training", ge=1)
    batch_size: int = Field(32, description="prompts per step of the router's training", ge=1)
    learning_rate: float | None = Field(
        None, description="AdamW's rate for the router; by default one that suits the encoder", gt=0
    )


class First(Settings):
    """FiRST: a gate in each block, trained first; then LoRA."""

    skip_weight: float = Field(
        0.01, description="weight of the mean gate in the loss: what running a block costs", ge=0
    )
    epochs: float = Field(1, description="passes over the instruction data for the gates", gt=0)
    learning_rate: float = Field(1e-3, description="AdamW's rate for the gates", gt=0)
    threshold: float | None = Field(
        None,
        description="gate from which a block runs; by default the one that brings the mean depth over the prompts of "
        "calibration nearest to the depth asked for (the paper has 0.5)",
        ge=0,
        le=1,
    )
    tasks: list[TrainedTask] = Field(
        TRAINED,
        description="tasks whose training questions, without their answers, the threshold is chosen on, since depth follows "
        "the text; []: prompts of the instruction data",
    )
    calibration_prompts: int = Field(256, description="prompts that the threshold is chosen on", ge=1)


READ_BY_GATES = ("skip_weight", "epochs", "learning_rate")
"""Fields of `First` that the training of the gates reads; the others choose their threshold."""


class Training(Settings):
    """Stage 1: Decision Module and LoRA, trained together (paper sec. 4.2.3, 5.1)."""

    data: str = Field("alpaca", description="instruction data set")
    examples: int | None = Field(None, description="use the first N examples (all by default)", ge=1)
    epochs: float = Field(2, description="passes over the data", gt=0)
    batch_size: int = Field(
        8,
        description="sequences per pass on the device; where they do not fit into its memory, half of them at a time, and twice "
        "the gradient_accumulation",
        ge=1,
    )
    gradient_accumulation: int = Field(1, description="steps whose gradients are added before an update", ge=1)
    learning_rate: float = Field(1e-4, description="AdamW's peak rate for LoRA and router", gt=0)
    router_learning_rate: float | None = Field(None, description="another rate for the router alone", gt=0)
    warmup_steps: int = Field(100, description="linear warm-up, steps", ge=0)
    max_length: int = Field(512, description="longest sequence, tokens; longer ones are cut", ge=16)
    loss: Loss = Field(
        "ce",
        description="ce: cross-entropy of the data's tokens (the paper's); kl: divergence of each next token's distribution "
        "from that of the backbone at full depth without LoRA. The same for every method of the study",
    )
    loss_on: Literal["response", "all"] = Field("response", description="tokens that enter the loss")
    pool_over: PoolOver = Field(
        "prompt",
        description="tokens the router pools over: prompt, what inference will have seen of such a prompt; question, the "
        "prompt without its template, which is nearer to what benchmarks ask; all, the response too. Read by recipe paper",
    )
    routing: RoutingForm = Field(
        "sequence",
        description="sequence: one route per example, from the tokens of pool_over; causal: the prompt's route for the "
        "prompt, then each token its own, as decoding recomputes it",
    )
    kv: KV = Field(
        "zero",
        description="K/V of skipped blocks: zero (the paper's), mask or project. The run's default; it enters training "
        "itself with routing: causal",
    )
    lora_rank: int = Field(
        8, description="LoRA rank on every linear layer of the blocks; 0 trains the router alone", ge=0
    )
    lora_alpha: float = Field(16, description="LoRA scale", gt=0)
    lora_dropout: float = Field(0.0, description="LoRA dropout", ge=0, lt=1)
    router_rank: int = Field(32, description="hidden width r of the Decision Module", ge=1)
    gradient_checkpointing: bool = Field(False, description="trade compute for memory in the backbone")
    save_steps: int = Field(500, description="steps between checkpoints, from which a killed job resumes", ge=1)
    logging_steps: int = Field(10, description="steps between log lines", ge=1)

    @model_validator(mode="after")
    def _causal_has_a_prompt(self) -> Training:
        if self.routing == "causal" and self.pool_over == "all":
            raise ValueError(
                "pool_over: all leaves nothing to routing: causal, which needs pool_over: prompt or question"
            )
        return self


class Router(Settings):
    """The tuned recipe of BUDDY's router: removal orders searched on the training data, and one chosen by the input."""

    start: str | None = Field(
        None,
        description="folder of a finished run of the same backbone and variant, whose router is taken as it is: nothing is "
        "searched or measured, only LoRA is trained here",
    )
    known: str | None = Field(
        None,
        description="training record of a tuned run of such a backbone, whose removal orders are measured here: none is "
        "searched, and orders, search_examples, exchanges and rounds are not read",
    )
    examples: int = Field(512, description="training examples whose losses along the pool's routes are measured", ge=8)
    held_out: int = Field(
        128, description="further training examples, kept apart, by whose losses the router to keep is chosen", ge=4
    )
    orders: int = Field(
        6, description="removal orders to search, each on the examples that it suits, besides one for all of them", ge=1
    )
    search_examples: int = Field(32, description="examples that an order is searched on", ge=1)
    exchanges: int = Field(
        8,
        description="exchanges of one block for another in a search, at most; 0 takes the best run of neighbouring blocks, or "
        "the prior's route, as it is",
        ge=0,
    )
    loss: Loss = Field(
        "kl",
        description="what a route costs: kl, divergence of the response's tokens from the model at full depth, which varies "
        "less and asks for no right answer; ce, their cross-entropy",
    )
    response_tokens: int = Field(32, description="tokens of each response that are measured, at most", ge=1)
    pool_over: Literal["prompt", "question"] = Field(
        "question",
        description="what of a training prompt the router reads: question, the prompt without its template, as benchmarks "
        "have none; prompt, all of it",
    )
    rounds: int = Field(
        2, description="times that examples are sorted by the order that suits them, and orders searched anew", ge=1
    )
    batch_size: int = Field(8, description="examples per pass, each of which takes several routes", ge=1)
    at_measured: float | None = Field(
        None,
        description="share of the examples on which LoRA is trained at one of the depths that routes were measured at, the "
        "study's; the others have any depth from its deepest to all blocks, as all have by default and in the paper",
        ge=0,
        le=1,
    )


class Evaluation(Settings):
    """Accuracy through lm-evaluation-harness."""

    tasks: list[Task] = Field([*PAPERS], description="tasks", min_length=1)
    few_shot: int = Field(0, description="solved examples in the prompt", ge=0)
    limit: int | None = Field(
        None,
        description="first N items of each task (all by default; a limited record never enters a paper table unmarked)",
        ge=1,
    )
    batch_size: int = Field(16, description="sequences per forward pass", ge=1)
    routing: RoutingForm = Field(
        "sequence",
        description="sequence: the context's route for the answer too; causal: each token of the answer has its own, "
        "as decoding recomputes it",
    )
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")


class Generation(Settings):
    """Problems answered by generation, through lm-evaluation-harness (Table 12)."""

    backbones: list[Name] | None = Field(None, description="backbones that answer (all of the study by default)")
    tasks: list[Literal["gsm8k"]] = Field(["gsm8k"], description="tasks", min_length=1)
    few_shot: int | None = Field(
        None, description="solved examples in the prompt; the harness's own number by default", ge=0
    )
    limit: int | None = Field(None, description="first N items of each task (all by default)", ge=1)
    batch_size: int = Field(16, description="sequences generated together", ge=1)
    new_tokens: int = Field(256, description="longest answer, tokens", ge=1)
    decode: Literal["recompute", "reuse"] = Field(
        "recompute", description="recompute chooses a path at every step, reuse keeps the prompt's"
    )
    slack: int | None = Field(
        None,
        description="blocks that a step of a batch may call beyond those that its deepest sequence runs; 0 is one set for "
        "all, nothing leaves sequences independent; methods that score single blocks (BUDDY)",
        ge=0,
    )
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")


class Trace(Settings):
    """Which blocks run, prompt by prompt and step by step (Table 1, Figures 4, 6 and 9 to 11)."""

    backbones: list[Name] | None = Field(None, description="backbones that are traced (all of the study by default)")
    datasets: list[Literal["alpaca", "samsum", "gsm8k"]] = Field(["alpaca"], description="prompts", min_length=1)
    tasks: list[Task] = Field(
        [], description="tasks, too, of which BUDDY's main run reads the prompts and generates nothing"
    )
    prompts: int = Field(100, description="prompts per data set and task", ge=1)
    new_tokens: int = Field(32, description="tokens generated after each prompt of a data set", ge=1)
    batch_size: int = Field(8, description="sequences generated together", ge=1)
    decode: Literal["recompute", "reuse"] = Field(
        "recompute", description="recompute chooses a path at every step, reuse keeps the prompt's"
    )
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")


class Summaries(Settings):
    """Dialogues summarised by BUDDY with the prompt's path kept and with one chosen at every step (Figure 5)."""

    backbones: list[Name] | None = Field(None, description="backbones that summarise (all of the study by default)")
    prompts: int = Field(200, description="dialogues of SAMSum", ge=1)
    new_tokens: int = Field(128, description="longest summary, tokens", ge=1)
    batch_size: int = Field(16, description="sequences generated together", ge=1)
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")


class Likelihood(Settings):
    """How likely held-out text is under a routed model, and how near it stays to the whole one (`buddy score`)."""

    backbones: list[Name] | None = Field(None, description="backbones that are scored (all of the study by default)")
    datasets: list[ScoredData] = Field(
        [],
        description="text that is scored: responses to prompts (alpaca, gsm8k, samsum), or prose in windows whose second "
        "half continues the first; none: nothing is scored. Priors and static peers know the corpora of `importance` and "
        "`peers`",
    )
    items: int = Field(128, description="items of each data set", ge=2)
    max_length: int = Field(
        256, description="longest item, tokens, and length of a window of prose; a longer response is cut", ge=16
    )
    batch_size: int = Field(8, description="items per pass", ge=1)
    kv: list[KV] = Field(
        ["zero"],
        description="K/V of skipped blocks, a record each (of a variant that only an ablation shows, the first); the tables "
        "show the first, and compare BUDDY's",
        min_length=1,
    )
    decode: list[DecodeMode] = Field(
        ["recompute"],
        description="routes of the response, a record each: recompute, as decoding would choose them token by token; reuse, "
        "the prompt's. The tables show the first, and compare BUDDY's",
        min_length=1,
    )

    @field_validator("datasets", "kv", "decode")
    @classmethod
    def _each_once(cls, chosen: list[str]) -> list[str]:
        if len(set(chosen)) != len(chosen):
            raise ValueError("one is named twice")
        return chosen


class Predictor(Settings):
    """The budget predictor: one preset is the paper's recipe (sec. 4.4, C.4, D.7), the others learn."""

    backbones: list[Name] | None = Field(None, description="backbones that get one (all of the study by default)")
    presets: list[PredictorPreset] = Field(
        ["paper", "tuned"],
        description="recipes: paper (GRPO, as published), tuned (exact expectation over a grid of depths, at any price), rise "
        "(how far each depth moves the model's own predictions, estimated token by token; at any price)",
    )
    data: list[DataName] = Field(["alpaca"], description="paper: data sets it is trained on", min_length=1)
    tuned_data: list[DataName] = Field(
        ["alpaca", *PAPERS],
        description="tuned, rise: data sets it is trained on; their losses, or rises, are measured once",
        min_length=1,
    )
    examples: int | None = Field(
        None,
        description="use the first N examples of each data set (paper: all by default; tuned: 2000; rise: 400)",
        ge=1,
    )
    max_length: int = Field(512, description="longest example, tokens; a longer response is cut", ge=16)
    steps: int = Field(10_000, description="paper: updates", ge=1)
    batch_size: int = Field(2, description="paper: prompts per update", ge=1)
    group: int = Field(4, description="paper: depths drawn for each prompt (G)", ge=2)
    learning_rate: float = Field(1e-5, description="paper: Adam's rate", gt=0)
    quality_weight: float = Field(
        5.0, description="paper: weight of the cross-entropy in the reward (lambda_perf)", ge=0
    )
    cost_weight: float = Field(0.05, description="paper: weight of the budget in the reward (lambda_cost)", ge=0)
    entropy_weight: float = Field(
        0.01, description="paper: weight of the policy's entropy (beta, whose value is not published)", ge=0
    )
    save_steps: int = Field(
        250, description="paper: updates between checkpoints, from which a killed job resumes", ge=1
    )
    logging_steps: int = Field(10, description="paper: updates between log lines", ge=1)
    depths: int = Field(
        9,
        description="tuned, rise: depths to choose from, spread from the deepest pruning trained for to full depth",
        ge=2,
    )
    table_batch: int = Field(8, description="tuned, rise: examples per pass when these depths are measured", ge=1)
    epochs: int = Field(400, description="tuned: passes over the measured losses, at most", ge=1)
    price: float = Field(
        0.5,
        description="tuned, rise: price where none is given, from 0 (only quality counts) to 1 (only depth counts)",
        ge=0,
        le=1,
    )
    datasets: list[DataName] = Field(
        ["alpaca", "gsm8k", *PAPERS], description="data sets on whose held-out inputs it is evaluated", min_length=1
    )
    limit: int | None = Field(None, description="first N held-out inputs of each (all by default)", ge=1)
    tasks: list[Task] = Field(
        [*PAPERS, "mmlu"],
        description="tasks that are scored with each input's depth left to the predictor; [] for none",
    )
    problems: list[Literal["gsm8k"]] = Field(
        ["gsm8k"],
        description="word problems answered by generation, as the section `generation` says, with each input's depth left to "
        "the predictor; [] for none",
    )


_GRPO = ("steps", "batch_size", "group", "learning_rate", "quality_weight", "cost_weight", "entropy_weight")
READ_BY_PRESET: dict[PredictorPreset, tuple[str, ...]] = {
    "paper": ("examples", "max_length", *_GRPO, "save_steps", "logging_steps"),
    "tuned": ("examples", "max_length", "depths", "table_batch", "epochs", "price"),
    "rise": ("examples", "max_length", "depths", "table_batch", "price"),
}
"""Fields of `Predictor` that each preset reads."""


class Latency(Settings):
    """Prefill and decode speed."""

    backbones: list[Name] | None = Field(None, description="backbones to time (all of the study by default)")
    methods: list[DynamicMethod] = Field(
        ["buddy"],
        description="methods that are timed, those of them that the study compares; a static peer is BUDDY's sliced model",
        min_length=1,
    )
    datasets: list[Literal["alpaca", "samsum"]] = Field(["alpaca", "samsum"], description="prompts", min_length=1)
    prompts: int = Field(32, description="prompts per data set", ge=1)
    new_tokens: int = Field(128, description="tokens decoded after each prompt", ge=1)
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        [1], description="prompts decoded together; each size is timed", min_length=1
    )
    repeats: int = Field(5, description="timed passes over the prompts; the median is reported", ge=1)
    warmup: int = Field(1, description="untimed passes first", ge=0)
    turn: int = Field(
        8,
        description="tokens an execution decodes before the next one takes its turn: drift of the machine hits all",
        ge=1,
    )
    executions: list[Execution] = Field(
        ["dense", "sliced", "reuse", "recompute"],
        description="what is timed side by side; dense is always timed; full is the run with all blocks, which shows what "
        "the engine costs; varied has routes that are drawn for every sequence and step, where a trained router may take one "
        "path; mixed is a batch whose sequences have different budgets, nested one whose budgets share one set of blocks "
        "(both at batch sizes above 1)",
        min_length=1,
    )
    slack: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        description="varied routes are timed under these bounds too: blocks that a step of a batch may call beyond those of "
        "one sequence; 0 is one set for all (batch sizes above 1)",
    )
    engines: list[Engine] = Field(
        ["eager", "graph"], description="eager, and on a GPU also decoding by captured CUDA graphs", min_length=1
    )
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")


class Breakdown(Settings):
    """What a routed pass spends its time on, by the profiler (Table 8), and what routing costs at longer contexts."""

    backbones: list[Name] | None = Field(None, description="backbones to profile (all of the study by default)")
    batch_size: int = Field(5, description="sequences in the batch", ge=1)
    tokens: int = Field(256, description="prompt tokens per sequence", ge=1)
    steps: int = Field(16, description="decode steps that are profiled", ge=1)
    repeats: int = Field(5, description="profiled passes; the median is reported", ge=1)
    contexts: list[Annotated[int, Field(ge=1)]] = Field(
        [128, 512, 2048, 8192], description="context lengths, tokens, at which a routing step is timed", min_length=1
    )
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")
