"""The sections of a study file that say what is compared; those of training and measuring are `buddy.settings`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from buddy.methods import METHODS
from buddy.settings import (
    MOST_BLOCKS,
    MOST_SEED,
    NAME_PATTERN,
    SHORTEST_WINDOW,
    Criterion,
    Feature,
    File,
    Importance,
    Indicator,
    Name,
    Prior,
    RouterRecipe,
    Settings,
    Source,
    StaticPeer,
    Text,
    Training,
    corpus_name,
    told,
)
from buddy.study.devices import DEVICES

if TYPE_CHECKING:
    Method: TypeAlias = str
else:
    Method = Literal[tuple(METHODS)]
Lora = Literal["trained", "none"]
TableKind = Literal[
    "accuracy",
    "latency",
    "breakdown",
    "ablation",
    "generation",
    "peer_latency",
    "properties",
    "training_cost",
    "likelihood",
]


class Backbone(Settings):
    """A pretrained decoder and how deep the study prunes it."""

    source: Source = Field(
        description="where the weights come from: {hub, revision}, {wheel, version, file, sha256}, "
        "{random: architecture, seed} or {folder}"
    )
    blocks: int = Field(description="number of blocks L; checked against the weights", ge=3, le=MOST_BLOCKS)
    removed: list[int] = Field(description="numbers of blocks left out, one per budget of the study", min_length=1)
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="weights written for wheel and random sources; compute is bfloat16 on a GPU, float32 on a CPU",
    )
    parameters: float | None = Field(
        None, description="billions of parameters, where a plan cannot know them: of a repository not fetched yet", gt=0
    )
    gradient_checkpointing: bool | None = Field(
        None, description="trade compute for memory in its trainings; training.gradient_checkpointing by default"
    )
    mem_gb: int | None = Field(
        None,
        description="host memory of every job that loads it, GB; by default what the job needs (`buddy plan`)",
        ge=1,
    )
    hours: float | None = Field(
        None,
        description="time limit of every job that loads it, hours; by default what the job takes, times limits.safety",
        gt=0,
    )

    @model_validator(mode="after")
    def _legal_removals(self) -> Backbone:
        most = self.blocks - 2
        for removed in self.removed:
            if not 1 <= removed <= most:
                raise ValueError(
                    f"removed: {removed} is not between 1 and {most} (the first and last block always run)"
                )
        if len(set(self.removed)) != len(self.removed):
            raise ValueError(f"removed: {self.removed} names a number twice")
        return self


class Variant(Settings):
    """BUDDY's main variant; an ablation varies these."""

    feature: Feature = Field("value", description="what the router reads of the source block's KV cache")
    prior: Prior = Field("taylor", description="block importance fused into the router's scores")
    omega: float = Field(0.1, description="weight of the standardised prior in the score", ge=0)
    source_block: int = Field(
        1, description="block whose KV the router reads (counted from 1); blocks up to it always run", ge=1
    )
    recipe: RouterRecipe = Field(
        "paper",
        description="how the router is trained: paper (straight-through gradients, together with LoRA) or tuned (fitted to "
        "losses of measured routes, then LoRA along its routes; section `router`)",
    )


class Ablation(Settings):
    """A grid around the main variant on one backbone: every combination of the listed values."""

    name: Name = Field(description="name, used by tables")
    backbone: Name = Field(description="backbone it runs on")
    feature: list[Feature] | None = Field(None, description="features to compare", min_length=1)
    prior: list[Prior] | None = Field(None, description="priors to compare", min_length=1)
    omega: list[Annotated[float, Field(ge=0)]] | None = Field(None, description="omegas to compare", min_length=1)
    source_block: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="source blocks to compare", min_length=1
    )
    recipe: list[RouterRecipe] | None = Field(None, description="the router's recipes to compare", min_length=1)

    def axes(self) -> list[str]:
        """Names of the axes with more than one value, in the order of `Variant`."""
        return [axis for axis in Variant.model_fields if len(getattr(self, axis) or ()) > 1]


class Table(Settings):
    """What a numbered table of the paper shows in this study."""

    kind: TableKind = Field(
        description="accuracy by budget, latency (of BUDDY, or of all methods: peer_latency), what a pass spends its "
        "time on, an ablation, generated answers (GSM8K), measured properties of the methods, hours of training, or "
        "likelihoods (a study that has some makes the table `likelihood` unasked)"
    )
    backbone: Name | None = Field(
        None, description="backbone it is about; generation, training_cost and likelihood show several"
    )
    ablation: Name | None = Field(None, description="ablation of an ablation table")

    @model_validator(mode="after")
    def _names_its_subject(self) -> Table:
        several = dict.fromkeys(("generation", "training_cost", "likelihood"))
        needed = {"ablation": "ablation", **several}.get(self.kind, "backbone")
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"a table of kind {self.kind} needs the key {needed!r}")
        return self


TableName = Annotated[str, told("table[1-9][0-9]*", "table and a number, such as table2")]


class StudyPlan(Settings):
    """What to run."""

    name: Name = Field(description="results go to results/<name>")
    backbones: list[Name] = Field(
        description="backbones of the study, names from the section `backbones`", min_length=1
    )
    methods: list[Method] = Field(
        ["dense", "buddy"],
        description="methods compared on every backbone: dense, dense_lora (its fine-tuning without pruning), buddy, the "
        "static peers shortgpt, shortened_llama and sleb, and the dynamic ones pudding and first",
        min_length=1,
    )
    lora: list[Lora] = Field(
        ["trained"],
        description="trained: every method has its LoRA; none: the methods without any, to tell fine-tuning from pruning",
        min_length=1,
    )
    removed: dict[str, list[int]] = Field(
        {}, description="per backbone, numbers of removed blocks in place of the definition's"
    )
    peers_removed: dict[str, list[int]] = Field(
        {},
        description="per backbone, those of its numbers of removed blocks at which peers are compared, each of them a "
        "training of its own; by default all",
    )
    seeds: list[Annotated[int, Field(ge=0, le=MOST_SEED)]] = Field([0], description="training seeds", min_length=1)
    main: Variant = Field(Variant(), description="BUDDY's main variant")
    recipes: list[RouterRecipe] | None = Field(
        None,
        description="the router's recipes that are compared on every backbone, a run each, that of `main` among them; by "
        "default it alone. What is timed, traced or answers by generation has that of `main`",
        min_length=1,
    )
    ablations: list[Ablation] = Field([], description="grids around the main variant")
    tables: dict[TableName, Table] = Field({}, description="the paper's tables: what each shows in this study")
    records: Text | None = Field(
        None,
        description="folder of measured records, such as results/reference/NAME/records, to build tables and figures "
        "from; nothing is measured then",
    )

    @model_validator(mode="after")
    def _recipes_hold_the_main_one(self) -> StudyPlan:
        if self.recipes is not None and (
            self.main.recipe not in self.recipes or len(set(self.recipes)) != len(self.recipes)
        ):
            raise ValueError(
                f"recipes: {self.recipes} must name that of main, {self.main.recipe}, and each recipe once"
            )
        return self

    def compared_recipes(self) -> list[RouterRecipe]:
        """The router's recipes that are compared on every backbone."""
        return self.recipes or [self.main.recipe]


class Data(Settings):
    """Where data sets come from, and who answers the prompts that are trained on."""

    source: Text = Field(
        "hub",
        description="`hub` (the published sets), `embedded` (the small sets in the package) or a folder of NAME.SPLIT.jsonl[.gz] files",
    )
    answers: Literal["given", "backbone"] = Field(
        "given",
        description="responses in training.data: given, the set's own; backbone, each run's backbone answers the prompts "
        "itself, greedily (they need no responses then)",
    )
    new_tokens: int = Field(256, description="longest answer of a backbone, tokens", ge=1)
    batch_size: int = Field(32, description="prompts that a backbone answers together", ge=1)


class Orders(Settings):
    """In which order blocks would be removed, by corpus and by length of the context (Figures 1, 2, 7 and 8)."""

    backbones: list[Name] | None = Field(None, description="backbones that are looked at (all of the study by default)")
    indicators: list[Indicator] = Field(
        [],
        description="what ranks the blocks, each on the corpus of `importance` and on the others; none: nothing is measured",
    )
    corpora: list[File] = Field([], description="other data sets, or text files, that the blocks are ranked on")
    lengths: list[Annotated[int, Field(ge=SHORTEST_WINDOW)]] = Field(
        [],
        description="tokens per window on the corpus of `importance`, two or more, to compare (delta_ppl and taylor of the "
        "indicators); `importance.length` everywhere else",
    )
    samples: int = Field(64, description="number of windows on each other corpus and of each length", ge=1)

    @model_validator(mode="after")
    def _tell_apart(self) -> Orders:
        names = [corpus_name(corpus) for corpus in self.corpora]
        if len(set(names)) != len(names):
            raise ValueError(f"corpora: {self.corpora} has a name twice")
        for name in names:
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(f"corpora: {name!r} has other signs than letters, digits and ._+-")
        if len(set(self.lengths)) != len(self.lengths) or len(self.lengths) == 1:
            raise ValueError(f"lengths: {self.lengths} are not two or more different ones, or none")
        return self


class Peers(Importance):
    """How the static peers choose the blocks they remove: on which text, by what, and which blocks they keep."""

    criteria: dict[StaticPeer, list[Criterion]] = Field(
        {},
        description="per method what ranks its blocks, a run for each; its paper's main one by default (shortened_llama "
        "has ppl, taylor and ppl_unprotected)",
    )
    protect: dict[StaticPeer, list[int]] = Field(
        {},
        description="per method the blocks it never removes, from 0, negative from the end; what its authors keep by default",
    )

    @model_validator(mode="after")
    def _has_criteria(self) -> Peers:
        for method, chosen in self.criteria.items():
            wrong = [criterion for criterion in chosen if criterion not in METHODS[method].criteria]
            if wrong or not chosen or len(set(chosen)) != len(chosen):
                raise ValueError(
                    f"criteria.{method}: {chosen} is not a choice among {', '.join(METHODS[method].criteria)}"
                )
        return self

    def criteria_of(self, method: StaticPeer) -> list[Criterion]:
        """What ranks a method's blocks."""
        return self.criteria.get(method) or list(METHODS[method].criteria[:1])


NOT_OF_PEERS = ("routing", "pool_over", "router_rank", "router_learning_rate")
"""Fields of `Training` that say something about BUDDY's router only."""

NOT_OF_GATES = (*NOT_OF_PEERS, "epochs", "learning_rate", "kv", "lora_rank", "lora_alpha", "lora_dropout")
"""Fields of `Training` that FiRST's gates do not read: they have epochs and a rate of their own (section `first`), and learn
at full depth without LoRA."""


_READ_BY_THE_FIT = ("examples", "max_length", "kv", "lora_rank", "router_rank")


def unread_by_tuned(lora_rank: int) -> frozenset[str]:
    """Fields of `Training` that the router's tuned recipe does not read: no gradient reaches the router, what it reads is
    said in the section `router`, and without LoRA nothing is trained after the fit."""
    return frozenset(
        {"router_learning_rate", "pool_over"} if lora_rank else set(Training.model_fields) - {*_READ_BY_THE_FIT, "data"}
    )


class Limits(Settings):
    """What jobs ask Slurm for: the time that they take on a device, and as much again for safety."""

    device: Literal[tuple(DEVICES)] = Field(  # type: ignore[valid-type]
        "a100", description="what the jobs run on; where they differ, the slowest"
    )
    safety: float = Field(
        3.0, description="time limit of a first try, in multiples of the time that it should take", ge=1
    )


class Tracking(Settings):
    """W&B: a view on the results, never a condition for them."""

    project: Text = Field("buddy", description="W&B project")
    entity: Text | None = Field(None, description="W&B user or team")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, offline without; WANDB_MODE overrides"
    )
