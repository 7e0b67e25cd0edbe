"""The study: its sections together, checked against each other, and the grid of runs it spans.

``config.yaml`` and its overlays are read into `Config`; unknown keys and illegal values are refused with one line that
names file, key, value and what is allowed. No torch is imported here.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from buddy.errors import UserError, choices, short, unknown
from buddy.methods import METHODS
from buddy.settings import (
    SOURCES,
    Breakdown,
    Evaluation,
    First,
    Generation,
    Importance,
    Latency,
    Likelihood,
    Name,
    Predictor,
    Pudding,
    Router,
    Settings,
    Summaries,
    Trace,
    Training,
)
from buddy.study.settings import (
    Ablation,
    Backbone,
    Data,
    Limits,
    Orders,
    Peers,
    StudyPlan,
    Table,
    Tracking,
    Variant,
    unread_by_tuned,
)

UNSAID = {"recipe": "paper"}
"""Values of BUDDY's axes that a path and an older record leave out: all was so before there was such an axis, and what was
measured then keeps its place."""


@dataclass(frozen=True, order=True)
class Run:
    """One artefact of the study, trained or not: a backbone, a method, its variant, a seed."""

    backbone: str
    method: str
    axes: tuple[tuple[str, Any], ...]
    seed: int

    @cached_property
    def path(self) -> str:
        """Folder of the run below ``results/<study>/runs``: ``axis~value`` levels that say what made it."""
        said = [(axis, value) for axis, value in self.axes if UNSAID.get(axis) != value]
        parts = [("backbone", self.backbone), ("method", self.method), *said, ("seed", self.seed)]
        return "/".join(f"{axis}~{_text(value)}" for axis, value in parts)

    @property
    def variant(self) -> dict[str, Any]:
        """The axes as a dictionary."""
        return dict(self.axes)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def peer_axes(criterion: str | None, removed: int, lora: str) -> tuple[tuple[str, Any], ...]:
    """A peer's axes; only static ones have a criterion."""
    axes: tuple[tuple[str, Any], ...] = (("removed", removed), ("lora", lora))
    return axes if criterion is None else (("criterion", criterion), *axes)


class Config(Settings):
    """A whole study file."""

    study: StudyPlan
    backbones: dict[Name, Backbone]
    data: Data = Data()
    importance: Importance = Importance()
    orders: Orders = Orders()
    peers: Peers = Peers()
    pudding: Pudding = Pudding()
    first: First = First()
    router: Router = Router()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    generation: Generation = Generation()
    trace: Trace = Trace()
    summaries: Summaries = Summaries()
    likelihood: Likelihood = Likelihood()
    predictor: Predictor = Predictor()
    latency: Latency = Latency()
    breakdown: Breakdown = Breakdown()
    limits: Limits = Limits()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        defined = list(self.backbones)
        for where, names in (
            ("study.backbones", self.study.backbones),
            ("study.removed", self.study.removed),
            ("study.peers_removed", self.study.peers_removed),
            ("orders.backbones", self.orders.backbones or []),
            ("generation.backbones", self.generation.backbones or []),
            ("trace.backbones", self.trace.backbones or []),
            ("summaries.backbones", self.summaries.backbones or []),
            ("likelihood.backbones", self.likelihood.backbones or []),
            ("predictor.backbones", self.predictor.backbones or []),
            ("latency.backbones", self.latency.backbones or []),
            ("breakdown.backbones", self.breakdown.backbones or []),
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
        for name, table in self.study.tables.items():
            # An overlay may leave out what a table of the file below it is about; a slip of the pen it may not.
            for key, given, known in (("backbone", table.backbone, defined), ("ablation", table.ablation, names)):
                slip = key == "backbone" or difflib.get_close_matches(str(given), known, n=1)
                if given is not None and given not in known and slip:
                    raise ValueError(f"study.tables.{name}: " + str(unknown(key, given, known)))
        for name, removed in self.study.removed.items():
            Backbone.model_validate({**self.backbones[name].model_dump(), "removed": removed})
        for name, removed in self.study.peers_removed.items():
            if not removed or not set(removed) <= set(self.removed(name)):
                raise ValueError(f"study.peers_removed: {removed} is not among the {self.removed(name)} of {name}")
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
        runs = [run for backbone in self.study.backbones for run in self.compared_runs(backbone)]
        runs += [run for ablation in self.study.ablations for run in self.ablation_runs(ablation)]
        return list(dict.fromkeys(runs))

    def compared_runs(self, backbone: str) -> list[Run]:
        """The runs of a backbone's accuracy table: every method of the study, with every seed."""
        methods = [method for method in METHODS if method in self.study.methods]
        return [run for method in methods for run in self.method_runs(backbone, method)]

    def method_runs(self, backbone: str, method: str) -> list[Run]:
        """The runs of one method on a backbone; a peer is another run at each depth, BUDDY one for all."""
        seeds, loras = self.study.seeds, self.study.lora
        if not METHODS[method].trained:
            return [Run(backbone, method, (), seeds[0])]
        if METHODS[method].kind == "whole":
            return [Run(backbone, method, (), seed) for seed in seeds if "trained" in loras]
        if METHODS[method].kind == "routed":
            main = self.study.main.model_dump()
            return [
                self.buddy_run(backbone, {**main, "recipe": recipe}, seed, lora)
                for recipe in self.study.compared_recipes()
                for lora in loras
                for seed in seeds
            ]
        criteria = self.peers.criteria_of(method) if METHODS[method].kind == "static" else [None]
        return [
            Run(backbone, method, peer_axes(criterion, removed, lora), seed)
            for criterion in criteria
            for removed in self.study.peers_removed.get(backbone, self.removed(backbone))
            for lora in loras
            for seed in (seeds if lora == "trained" or criterion is None else seeds[:1])
        ]

    @staticmethod
    def buddy_run(backbone: str, variant: Mapping[str, Any], seed: int, lora: str = "trained") -> Run:
        """A BUDDY run; without a prior omega has no effect and is written as 0, so that equal runs share a path."""
        omega = 0.0 if variant["prior"] == "none" else float(variant["omega"])
        axes = {**variant, "omega": omega}
        named = tuple((axis, axes[axis]) for axis in Variant.model_fields)
        return Run(backbone, "buddy", named if lora == "trained" else (*named, ("lora", lora)), seed)

    def training_of(self, backbone: str) -> Training:
        """How the runs of a backbone are trained."""
        own = self.backbones[backbone].gradient_checkpointing
        return self.training if own is None else self.training.model_copy(update={"gradient_checkpointing": own})

    def training_options(self, run: Run) -> dict[str, Any]:
        """What `buddy train` is told of a run of BUDDY besides its files: its axes and just the settings that it reads.

        The paper's recipe, which is the command's default, goes without saying; a run without LoRA has rank 0.
        """
        axes = {axis: value for axis, value in run.axes if axis not in ("prior", "lora", "recipe")}
        training = self.training_of(run.backbone).model_dump(exclude={"data"})
        training |= {"lora_rank": 0} if run.variant.get("lora") == "none" else {}
        given = {**axes, "seed": run.seed, **training}
        if run.variant["recipe"] == "paper":
            return given
        router = {f"router_{name}": value for name, value in self.router.model_dump().items()}
        read = {name: value for name, value in given.items() if name not in unread_by_tuned(training["lora_rank"])}
        return {**read, "recipe": "tuned", "depths": self.removed(run.backbone), **router}

    def depths(self, run: Run) -> list[int]:
        """Numbers of removed blocks at which a run is measured: none of a dense one, a peer's own, BUDDY's all."""
        depths = {"whole": [0], "routed": self.removed(run.backbone)}
        return depths.get(METHODS[run.method].kind) or [run.variant["removed"]]

    def timed_runs(self, backbone: str) -> list[Run]:
        """The runs that are timed: BUDDY's main variant, and those of the dynamic peers that `latency.methods` names."""
        return [run for method in self.latency.methods for run in self._shown(backbone, method)]

    def answering_runs(self, backbone: str) -> list[Run]:
        """The runs that answer problems by generation: those of the accuracy table, with the first seed, and of BUDDY the
        main variant alone."""
        return [run for method in METHODS for run in self._shown(backbone, method)]

    def main_run(self, backbone: str) -> Run:
        """BUDDY's main variant with the first seed, with LoRA if the study has it: the run that is timed and profiled."""
        return self.buddy_run(backbone, self.study.main.model_dump(), self.study.seeds[0], self._shown_lora)

    @property
    def _shown_lora(self) -> str:
        return "trained" if "trained" in self.study.lora else "none"

    def _shown(self, backbone: str, method: str) -> list[Run]:
        """A method's runs with the first seed, with LoRA if the study has it, where one of each is enough."""
        if method not in self.study.methods:
            return []
        if method == "buddy":
            return [self.main_run(backbone)]
        lora = self._shown_lora
        runs = [run for run in self.method_runs(backbone, method) if run.seed == self.study.seeds[0]]
        return [run for run in runs if run.variant.get("lora", lora) == lora]

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

    def ablation(self, name: str) -> Ablation:
        """The ablation of that name."""
        for ablation in self.study.ablations:
            if ablation.name == name:
                return ablation
        raise unknown("ablation", name, [ablation.name for ablation in self.study.ablations] or ["(none defined)"])

    def timed_backbones(self) -> list[str]:
        """Backbones of the study that the latency benchmark runs on."""
        return self._routed(self.latency.backbones)

    def profiled_backbones(self) -> list[str]:
        """Backbones of the study whose passes are profiled."""
        return self._routed(self.breakdown.backbones)

    def answering_backbones(self) -> list[str]:
        """Backbones of the study that answer problems by generation."""
        return self._of_study(self.generation.backbones)

    def traced_backbones(self) -> list[str]:
        """Backbones of the study whose paths are traced."""
        return self._of_study(self.trace.backbones)

    def traced_runs(self) -> list[Run]:
        """The runs whose paths figures show: BUDDY's main variant with the first seed."""
        return [self.main_run(backbone) for backbone in self._routed(self.trace.backbones)]

    def predictors(self) -> list[str]:
        """Paths of the budget predictors: the run that each is trained on, and its preset."""
        return [f"{run.path}/preset~{preset}" for run in self.predicting_runs() for preset in self.predictor.presets]

    def summarising_runs(self) -> list[Run]:
        """The runs that summarise dialogues: BUDDY's main variant with the first seed."""
        return [self.main_run(backbone) for backbone in self._routed(self.summaries.backbones)]

    def ordered_backbones(self) -> list[str]:
        """Backbones of the study whose blocks are ranked to look at the order of their removal."""
        return self._of_study(self.orders.backbones) if self.orders.indicators else []

    def importances(self) -> list[tuple[str, str]]:
        """Backbone and indicator of every importance on the study's corpus: those that runs fuse, those looked at."""
        fused = [(run.backbone, run.variant.get("prior", "none")) for run in self.runs()]
        shown = [(name, indicator) for name in self.ordered_backbones() for indicator in self.orders.indicators]
        return [pair for pair in dict.fromkeys([*fused, *shown]) if pair[1] != "none"]

    def predicting_backbones(self) -> list[str]:
        """Backbones of the study that get a budget predictor."""
        return self._routed(self.predictor.backbones)

    def predicting_runs(self) -> list[Run]:
        """The runs that get one: BUDDY's main variant, with every seed."""
        main = self.study.main.model_dump()
        return [
            self.buddy_run(backbone, main, seed)
            for backbone in self.predicting_backbones()
            for seed in self.study.seeds
        ]

    def predicted_only(self) -> list[str]:
        """The tasks that are scored at predicted depths and not with the methods that are compared."""
        return [task for task in self.predictor.tasks if task not in self.evaluation.tasks]

    def scored_backbones(self) -> list[str]:
        """Backbones of the study whose runs score held-out text."""
        return self._of_study(self.likelihood.backbones) if self.likelihood.datasets else []

    def scored_runs(self) -> list[Run]:
        """The runs that score it: all that are compared, and the variants of ablations."""
        chosen = self.scored_backbones()
        return [run for run in self.runs() if run.backbone in chosen]

    def _routed(self, chosen: list[str] | None) -> list[str]:
        """Those whose run of BUDDY is measured; none in a study without it."""
        return self._of_study(chosen) if "buddy" in self.study.methods else []

    def _of_study(self, chosen: list[str] | None) -> list[str]:
        return [name for name in self.study.backbones if chosen is None or name in chosen]

    def measured_tables(self) -> dict[str, Table]:
        """The tables that this study measures: the paper's in the order of their numbers, then that of likelihoods."""
        ablations = {ablation.name for ablation in self.study.ablations}

        def measured(table: Table) -> bool:
            if table.kind == "ablation":
                return table.ablation in ablations
            if table.kind == "generation":
                return bool(self.answering_backbones())
            if table.kind == "likelihood":
                return bool(self.scored_backbones())
            if table.kind == "training_cost":
                return any(METHODS[method].trained for method in self.study.methods)
            if table.kind == "peer_latency":
                return table.backbone in self._of_study(self.latency.backbones)
            measured_on = {
                "latency": self.timed_backbones,
                "breakdown": self.profiled_backbones,
                "properties": self.traced_backbones,
            }
            return table.backbone in measured_on.get(table.kind, lambda: self.study.backbones)()

        tables = {name: table for name, table in self.study.tables.items() if measured(table)}
        ordered = dict(sorted(tables.items(), key=lambda item: int("".join(filter(str.isdigit, item[0])) or 0)))
        own = Table(kind="likelihood")
        return {**ordered, **({"likelihood": own} if measured(own) else {})}


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
    first = min(error.errors(), key=lambda item: item["type"] == "missing")
    # Pydantic adds which alternative was meant: ..., source, random, random is the key `random` of a source.
    location = [part for at, part in enumerate(first["loc"]) if first["loc"][at - 1 : at] != ("source",)]
    where = ".".join(str(part) for part in location if part != "[key]")
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        key = location[-1]
        legal = _section(first["loc"][:-1])
        return str(unknown(f"unknown key in {'.'.join(map(str, location[:-1])) or 'the study'}", key, legal))
    if first["type"] == "missing":
        return f"{where}: missing"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(found, dict | BaseModel) else f"{short(found)} is not allowed: "
    return f"{where + ': ' if where else ''}{shown}{message[0].lower() + message[1:]}"


def _section(location: Iterable[Any]) -> list[str]:
    """Legal keys of the section at ``location``."""
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        if part in SOURCES and model in SOURCES.values():
            model = SOURCES[str(part)]
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
        part = read_file(file)
        content = merge(content, part)
    return parse(content, " + ".join(str(file) for file in files))


LARGEST_FILE = 2**20
"""Bytes of a study file: the paper's has 8 KiB."""
MOST_NODES = 20_000
"""Values in a study file, with all that its aliases stand for: the paper's has some 300."""


def read_file(file: str | Path) -> dict[str, Any]:
    """The sections of one study file or overlay, as they stand there.

    Raises:
        UserError: it cannot be read, is not YAML, has a key twice, or is larger than any study.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if len(text) > LARGEST_FILE:
        raise UserError(f"{file}: {len(text)} characters are more than the {LARGEST_FILE} of a study file")
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping of sections, found {type(content).__name__}")
    if _too_many(content):
        raise UserError(f"{file}: with its aliases written out it holds more than {MOST_NODES} values")
    return content


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that a mapping has twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, once its keys are known to differ."""
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is there twice, first in line {seen[key].line + 1}", key_node.start_mark
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)


def _too_many(content: Any) -> bool:
    """Whether a value, aliases written out, has more parts than `MOST_NODES`; ends soon after so many."""
    left, waiting = MOST_NODES, [content]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            return True
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    return False


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
