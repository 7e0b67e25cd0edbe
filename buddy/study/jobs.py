"""The jobs of a study: one table of stages, and of each job what it reads, what it makes and what its command is told.

The workflow's rules are made of this table, `buddy status` and `buddy check` look for its outputs, and `buddy plan` and the
limits of time and memory count what its jobs cost. A stage is a function below: its name is the rule's, its parameters are the job and
the wildcards of its paths, and what it answers is what such a job reads and is told. Jobs know each other, so the jobs of a study are what its tables and
figures show (`buddy.study.results`) and all that these need in turn. Nothing heavy is imported here.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from buddy.methods import METHODS
from buddy.settings import READ_BY_GATES, READ_BY_PRESET, corpus_name
from buddy.study import costs
from buddy.study.config import Config, Run
from buddy.study.settings import NOT_OF_GATES, NOT_OF_PEERS

Read: TypeAlias = "Job | str | Sequence[Job]"
"""What a job reads: another job's output, those of several, or a file of the user's."""


@dataclass(frozen=True)
class Work:
    """What one job does.

    Attributes:
        reads: by role the jobs whose outputs it reads, or a file of the user's.
        told: options of its command; see `words`.
        backbone: the backbone whose size says how much memory and time it needs.
        spared: options that hand over what the command makes itself without them, the same: what it made before there was a
            stage for that stands (`buddy.study.provenance`).
    """

    reads: Mapping[str, Read]
    told: Mapping[str, Any]
    backbone: str | None = None
    spared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """What the jobs of one rule have in common.

    Attributes:
        name: the rule.
        command: the command of `buddy` that does its work.
        place: where below ``logs/{name}`` a job's log is, and below ``benchmarks/{name}`` its benchmark, without ending,
            wildcards in braces; "" where there is one job.
        patterns: what a job makes, below the study's folder, by the study; the first is complete when all is. None: this
            study has no such jobs.
        work: what a job of these wildcards does.
        folder: it makes a folder of records; else files.
        cost: what a job asks of a device; None for a stage that loads no model, runs where Snakemake runs and has
            ``minutes``.
        retries: how often a failed job is tried again.
        minutes: limit of a stage that loads no model.
    """

    name: str
    command: str
    place: str
    patterns: Callable[[Config], Sequence[str]] = field(repr=False)
    work: Callable[..., Work] = field(repr=False)
    folder: bool = False
    cost: costs.Cost | None = field(default=None, repr=False)
    retries: int = 1
    minutes: int = 60

    @property
    def wildcards(self) -> list[str]:
        """Names of the wildcards in its paths."""
        return list(inspect.signature(self.work).parameters)[1:]


STAGES: dict[str, Stage] = {}
"""Every stage by name, in the order in which a study comes to them."""


def stage(
    place: str,
    outputs: str | Sequence[str] | Callable[[Config], Sequence[str]],
    command: str | None = None,
    **more: Any,
) -> Callable[[Callable[..., Work]], Callable[..., Work]]:
    """Enter a function into the table; ``{place}`` in its outputs is its place, and its command has its own name unless
    another is given."""

    def enter(work: Callable[..., Work]) -> Callable[..., Work]:
        def patterns(study: Config) -> list[str]:
            found = outputs(study) if callable(outputs) else [outputs] if isinstance(outputs, str) else outputs
            return [pattern.replace("{place}", place) for pattern in found]

        name = work.__name__
        STAGES[name] = Stage(name, command or name.replace("_", "-"), place, patterns, work, **more)
        return work

    return enter


class Job:
    """One job of a study: a stage, and the values of its wildcards."""

    def __init__(self, jobs: Jobs, kind: Stage, wildcards: Mapping[str, str]) -> None:
        self.jobs = jobs
        self.study = jobs.study
        self.kind = kind
        self.stage = kind.name
        self.wildcards = dict(wildcards)
        self.name = kind.place.format(**wildcards)
        """Path of its log and of its benchmark below ``logs/{stage}`` and ``benchmarks/{stage}``, without ending."""
        self.outputs = [pattern.format(**wildcards) for pattern in kind.patterns(jobs.study)]
        """What it makes, below the study's folder; the first is there when all is."""

    def __repr__(self) -> str:
        return f"Job({self.stage} {self.name})"

    @property
    def place(self) -> str:
        """Path of its log below ``logs``, and of its benchmark below ``benchmarks``, without ending."""
        return f"{self.stage}/{self.name}" if self.name else self.stage

    @property
    def paths(self) -> list[str]:
        """What it makes, the study's folder in front."""
        return [f"{self.jobs.folder}/{output}" if self.jobs.folder else output for output in self.outputs]

    @property
    def path(self) -> str:
        """The output that is there when all is, the study's folder in front."""
        return self.paths[0]

    @property
    def parent(self) -> str:
        """The folder of that output: commands take folders, rules promise a file in each."""
        return str(Path(self.path).parent)

    @cached_property
    def work(self) -> Work:
        """What it does."""
        return self.kind.work(self, **self.wildcards)

    @property
    def needs(self) -> list[Job]:
        """The jobs whose outputs it reads."""
        return [job for read in self.work.reads.values() for job in _listed(read) if isinstance(job, Job)]

    def inputs(self) -> dict[str, str | list[str]]:
        """By role the files it reads, as the rules promise them: of each job the first output."""
        reads = self.work.reads
        paths = {role: [_path(one) for one in _listed(read)] for role, read in reads.items()}
        return {role: found[0] if isinstance(reads[role], Job | str) else found for role, found in paths.items()}

    def shell(self, without: Sequence[str] = ()) -> str:
        """Its command, quoted for a shell, with all that it is told or without some of it."""
        told = {name: value for name, value in self.work.told.items() if name not in without}
        return " ".join(["python -m buddy", self.kind.command, *words(told)])


def _listed(read: Read) -> Sequence[Job | str]:
    return [read] if isinstance(read, Job | str) else read


def _path(read: Job | str) -> str:
    return read if isinstance(read, str) else read.path


def words(told: Mapping[str, Any]) -> Iterator[str]:
    """Options as words of a command line, quoted for a shell: {"batch_size": 8} is --batch-size 8; None is left to the
    default, a list is one text with commas, and a tuple repeats its option."""
    for name, value in told.items():
        option = "--" + name.replace("_", "-")
        if value is True or value is False:
            yield option if value else option.replace("--", "--no-", 1)
        elif value is not None:
            for one in value if isinstance(value, tuple) else [value]:
                text = ",".join(map(str, one)) if isinstance(one, list) else str(one)
                # A text that begins with a dash would be taken for another option.
                yield f"{option}={shlex.quote(text)}" if text.startswith("-") else f"{option} {shlex.quote(text)}"


class Jobs:
    """The jobs of a study, each once.

    Args:
        study: its settings.
        folder: its folder, in front of every path that a command is given; none where only outputs are asked for.
    """

    def __init__(self, study: Config, folder: str = "") -> None:
        self.study = study
        self.folder = folder
        self.runs = {run.path: run for run in study.runs()}
        self._made: dict[tuple[str, ...], Job] = {}

    def __call__(self, stage: str, **wildcards: str) -> Job:
        """A stage's job with these wildcards."""
        kind = STAGES[stage]
        key = stage, *(wildcards[name] for name in kind.wildcards)
        if key not in self._made:
            self._made[key] = Job(self, kind, wildcards)
        return self._made[key]

    def data(self, names: Iterable[str]) -> list[Job]:
        """The jobs that fetch these data sets."""
        return [self("data", dataset=name) for name in names]

    def model(self, run: Run) -> Job:
        """The job that makes a run, or that fetches the backbone of a dense one."""
        if not METHODS[run.method].trained:
            return self("backbone", backbone=run.backbone)
        routed = METHODS[run.method].kind == "routed"
        return self("train", routed=run.path) if routed else self("adapt", peer=run.path)

    def predictors(self, stage: str) -> list[Job]:
        """A stage's jobs of the study's budget predictors."""
        presets = self.study.predictor.presets
        return [self(stage, routed=run.path, preset=one) for run in self.study.predicting_runs() for one in presets]


def closure(wanted: Iterable[Job]) -> list[Job]:
    """These jobs and all that they need, stage by stage."""
    found: dict[Job, None] = {}
    waiting = list(wanted)[::-1]
    while waiting:
        job = waiting.pop()
        if job not in found:
            found[job] = None
            waiting += job.needs[::-1]
    order = list(STAGES)
    return sorted(found, key=lambda job: order.index(job.stage))


# ---- inputs ----------------------------------------------------------------------------------------------------------


@stage("{backbone}", "backbones/{place}/backbone.json", minutes=240)
def backbone(job: Job, backbone: str) -> Work:
    """A backbone fetched, where Snakemake runs, which has the network."""
    one = job.study.backbones[backbone]
    told = {**one.source.model_dump(), "blocks": one.blocks, "dtype": one.dtype, **_out(job.parent, job)}
    return Work({}, told, backbone)


@stage("{dataset}", "data/{place}/data.json")
def data(job: Job, dataset: str) -> Work:
    """A data set fetched."""
    return Work({}, {"name": dataset, "source": job.study.data.source, **_out(job.parent, job)})


@stage("answered_by~{backbone}/{dataset}", "data/{place}/data.json", command="data", cost=costs.answering, retries=2)
def answers(job: Job, backbone: str, dataset: str) -> Work:
    """A data set's prompts answered by a backbone itself."""
    given, asked = job.jobs("data", dataset=dataset), job.jobs("backbone", backbone=backbone)
    told = {
        **{"name": dataset, "source": given.parent, "answers_by": asked.parent},
        **job.study.data.model_dump(include={"new_tokens", "batch_size"}),
        "examples": job.study.training.examples,
        **_out(job.parent, job),
    }
    return Work({"data": given, "backbone": asked}, told, backbone)


@stage("", "encoder/encoder.json")
def encoder(job: Job) -> Work:
    """The encoder that PuDDing's router reads prompts with, where that is not the backbone."""
    return Work({}, {"source": job.study.pudding.encoder, "out": job.parent})


def _out(path: str, job: Job) -> dict[str, str]:
    """Where a job's work goes, and of which study its record is; what a run measures takes that from the run."""
    return {"study": job.study.study.name, "out": path}


# ---- order of the blocks ---------------------------------------------------------------------------------------------


def _ranking(job: Job, backbone: str, corpus: str, out: str, **told: Any) -> Work:
    """Blocks of a backbone ranked on a corpus: a data set of the study, or a text file of the user's."""
    ranked = job.jobs("backbone", backbone=backbone)
    text = corpus if Path(corpus).is_file() else job.jobs("data", dataset=corpus)
    given = {"backbone": ranked.parent, "corpus": text if isinstance(text, str) else text.parent}
    return Work({"backbone": ranked, "corpus": text}, {**given, **told, **_out(out, job)}, backbone)


@stage("backbone~{backbone}/indicator~{indicator}", "records/importance/{place}.json", cost=costs.ranking)
def importance(job: Job, backbone: str, indicator: str) -> Work:
    """Blocks ranked on the study's own corpus: for the routers' priors, and for Figure 1."""
    settings = job.study.importance
    told = settings.model_dump(exclude={"corpus"})
    return _ranking(job, backbone, settings.corpus, job.path, indicator=indicator, **told)


@stage(
    "backbone~{backbone}/corpus~{corpus}/indicator~{indicator}",
    "records/importance/{place}.json",
    command="importance",
    cost=costs.ranking,
)
def corpus_orders(job: Job, backbone: str, corpus: str, indicator: str) -> Work:
    """Blocks ranked on another corpus (Figures 7 and 8)."""
    told = {"indicator": indicator, "samples": job.study.orders.samples, "length": job.study.importance.length}
    return _ranking(job, backbone, corpora(job.study)[corpus], job.path, **told)


def corpora(study: Config) -> dict[str, str]:
    """What blocks are ranked on besides the study's own corpus, by its name in paths."""
    chosen = study.orders.corpora if study.ordered_backbones() else []
    return {corpus_name(corpus): corpus for corpus in chosen}


def _lengths(study: Config) -> list[str]:
    place = "records/importance/backbone~{backbone}/length~%s/indicator~{indicator}.json"
    return [place % length for length in study.orders.lengths]


# One job for all lengths: loading a backbone takes longer than ranking its blocks at one of them.
@stage("backbone~{backbone}/indicator~{indicator}", _lengths, command="importance", cost=costs.ranking)
def length_orders(job: Job, backbone: str, indicator: str) -> Work:
    """Blocks ranked at several lengths of the context (Figure 2)."""
    settings = job.study.orders
    told = {"indicator": indicator, "samples": settings.samples, "length": settings.lengths}
    return _ranking(job, backbone, job.study.importance.corpus, str(Path(job.parent).parent), **told)


# ---- runs ------------------------------------------------------------------------------------------------------------


@stage(
    "backbone~{backbone}/method~{static_peer}/criterion~{criterion}",
    "records/calibration/{place}.json",
    cost=costs.ranking,
)
def calibrate(job: Job, backbone: str, static_peer: str, criterion: str) -> Work:
    """Which blocks a static peer removes: once per backbone, for all depths."""
    settings = job.study.peers
    protected = settings.protect.get(static_peer)
    told = {
        **{"method": static_peer, "criterion": criterion, "removed": max(job.study.removed(backbone))},
        "protect": protected if protected is None else ",".join(map(str, protected)) or "none",
        **settings.model_dump(exclude={"corpus", "criteria", "protect"}),
    }
    return _ranking(job, backbone, settings.corpus, job.path, **told)


@stage("backbone~{backbone}", "records/calibration/{place}/method~pudding.json", cost=costs.pool)
def pool(job: Job, backbone: str) -> Work:
    """The sets of blocks that PuDDing chooses from."""
    settings = job.study.pudding
    ranked, tasks = job.jobs("backbone", backbone=backbone), job.jobs.data(settings.tasks)
    told = {
        **{"backbone": ranked.parent, "data": _folder_of(tasks), "removed": max(job.study.removed(backbone))},
        **settings.model_dump(include={"tasks", "criteria", "pool_items"}),
        **_out(job.path, job),
    }
    return Work({"backbone": ranked, "tasks": tasks}, told, backbone)


def _folder_of(sets: Sequence[Job]) -> str:
    """The folder that holds these data sets."""
    return str(Path(sets[0].parent).parent)


def _pairs(job: Job, backbone: str) -> Job:
    """What a backbone's runs are trained on: as it was fetched, or with its prompts answered by the backbone."""
    name = job.study.training.data
    if job.study.data.answers == "backbone":
        return job.jobs("answers", backbone=backbone, dataset=name)
    return job.jobs("data", dataset=name)


def _kept(job: Job) -> dict[str, str]:
    """Where a training leaves its run and its record."""
    return {**_out(job.parent, job), "record": job.paths[1]}


@stage("{routed}", ("runs/{place}/run.json", "records/training/{place}.json"), cost=costs.training, retries=2)
def train(job: Job, routed: str) -> Work:
    """BUDDY's stage 1: one run per backbone, variant and seed. A killed job goes on from its checkpoint."""
    run = job.jobs.runs[routed]
    reads = {"backbone": job.jobs("backbone", backbone=run.backbone), "data": _pairs(job, run.backbone)}
    prior = {}
    if run.variant["prior"] != "none":
        reads["prior"] = job.jobs("importance", backbone=run.backbone, indicator=run.variant["prior"])
        prior = {"prior": reads["prior"].path}
    told = {
        **{"backbone": reads["backbone"].parent, "data": reads["data"].parent, **prior},
        **job.study.training_options(run),
        **{"most_removed": max(job.study.removed(run.backbone)), **_kept(job)},
    }
    return Work(reads, told, run.backbone)


@stage("backbone~{backbone}/seed~{seed}", "gates/{place}/run.json", cost=costs.gates, retries=2)
def gates(job: Job, backbone: str, seed: str) -> Work:
    """FiRST's gates, which know of no depth: trained once for all of them."""
    study = job.study
    opened = job.jobs("backbone", backbone=backbone)
    pairs = _pairs(job, backbone)
    told = {
        **{"backbone": opened.parent, "data": pairs.parent, "seed": seed},
        **{f"first_{name}": value for name, value in study.first.model_dump(include={*READ_BY_GATES}).items()},
        **study.training_of(backbone).model_dump(exclude={"data", *NOT_OF_GATES}),
        **_out(job.parent, job),
    }
    return Work({"backbone": opened, "data": pairs}, told, backbone)


@stage("{peer}", ("runs/{place}/run.json", "records/training/{place}.json"), cost=costs.peer, retries=2)
def adapt(job: Job, peer: str) -> Work:
    """A peer's run: its choice of blocks, and what it trains."""
    study, run = job.study, job.jobs.runs[peer]
    ranked, pairs = job.jobs("backbone", backbone=run.backbone), _pairs(job, run.backbone)
    reads, own = _of_peer(job, run)
    told = {
        **{"backbone": ranked.parent, "data": pairs.parent, **own, "method": run.method},
        **{axis: value for axis, value in run.axes if axis != "criterion"},
        **{
            "seed": run.seed,
            **study.training_of(run.backbone).model_dump(exclude={"data", *NOT_OF_PEERS}),
            **_kept(job),
        },
    }
    spared = tuple(name for name in ("gates",) if name in own)
    return Work({"backbone": ranked, "data": pairs, **reads}, told, run.backbone, spared)


def _of_peer(job: Job, run: Run) -> tuple[dict[str, Read], dict[str, Any]]:
    """What only this peer reads and is told."""
    study, jobs = job.study, job.jobs
    if METHODS[run.method].kind == "static":
        criterion = run.variant["criterion"]
        choice = jobs("calibrate", backbone=run.backbone, static_peer=run.method, criterion=criterion)
        return {"calibration": choice}, {"calibration": choice.path}
    if run.method == "first":
        trained = jobs("gates", backbone=run.backbone, seed=str(run.seed))
        told = {f"first_{name}": value for name, value in study.first.model_dump(exclude={"tasks"}).items()}
        told["gates"] = trained.parent
        if not study.first.tasks:
            return {"gates": trained}, told
        tasks = jobs.data(study.first.tasks)
        told |= {"first_tasks": study.first.tasks, "tasks": _folder_of(tasks)}
        return {"gates": trained, "tasks": tasks}, told
    if run.method != "pudding":
        return {}, {}
    choice, tasks = jobs("pool", backbone=run.backbone), jobs.data(study.pudding.tasks)
    named = {} if study.pudding.encoder == "backbone" else {"encoder": jobs("encoder")}
    own = study.pudding.model_dump(exclude={"criteria", "pool_items", "encoder"})
    told = {
        **{"calibration": choice.path, "tasks": _folder_of(tasks)},
        "pudding_encoder": named["encoder"].parent if named else "backbone",
        **{f"pudding_{name}": value for name, value in own.items()},
    }
    return {"calibration": choice, "tasks": tasks, **named}, told


# ---- the budget predictor --------------------------------------------------------------------------------------------

_PREDICTOR = "{routed}/preset~{preset}"


@stage(_PREDICTOR, ("predictors/{place}/run.json", "records/training/{place}.json"), cost=costs.predictor, retries=2)
def predictor(job: Job, routed: str, preset: str) -> Work:
    """A predictor trained on a finished run, which it leaves as it is."""
    settings, run = job.study.predictor, job.jobs.runs[routed]
    model, sets = job.jobs.model(run), job.jobs.data(settings.data if preset == "paper" else settings.tuned_data)
    told = {
        **{"run": model.parent, "data": tuple(one.parent for one in sets), "preset": preset},
        **settings.model_dump(include={*READ_BY_PRESET[preset]}),  # type: ignore[index]
        **{"out": job.parent, "record": job.paths[1]},
    }
    return Work({"run": model, "data": sets}, told, run.backbone)


def _predicting(job: Job, sets: Sequence[Job], **told: Any) -> Work:
    """A predictor's run measured on data sets."""
    made = job.jobs("predictor", **job.wildcards)
    told = {"run": made.parent, **told, "out": job.parent}
    return Work({"run": made, "data": sets}, told, job.jobs.runs[job.wildcards["routed"]].backbone)


@stage(_PREDICTOR, "records/predicted/{place}/auto.json", command="evaluate", cost=costs.evaluation, retries=2)
def evaluate_auto(job: Job, routed: str, preset: str) -> Work:
    """Accuracy at the depths that a predictor chooses."""
    tasks = job.jobs.data(job.study.predictor.tasks)
    told = {**job.study.evaluation.model_dump(), "tasks": job.study.predictor.tasks}
    return _predicting(job, tasks, data=_folder_of(tasks), budget="auto", **told)


@stage(_PREDICTOR, "records/solved/{place}/auto.json", command="solve", cost=costs.solving, retries=2)
def solve_auto(job: Job, routed: str, preset: str) -> Work:
    """Problems answered at the depths that a predictor chooses."""
    problems = job.study.predictor.problems
    sets = job.jobs.data(problems)
    told = {**job.study.generation.model_dump(exclude={"backbones"}), "tasks": problems}
    return _predicting(job, sets, data=_folder_of(sets), budget="auto", **told)


def _held_out(study: Config) -> list[str]:
    """A record for each data set; several have one together, too."""
    sets = study.predictor.datasets
    names = [*sets, *(["all"] if len(sets) > 1 else [])]
    return [f"records/budget/{_PREDICTOR}/dataset~{name}.json" for name in names]


@stage(_PREDICTOR, _held_out, cost=costs.constant_budgets)
def budget_eval(job: Job, routed: str, preset: str) -> Work:
    """A predictor held against every constant budget."""
    settings = job.study.predictor
    sets = job.jobs.data(settings.datasets)
    told = settings.model_dump(include={"max_length", "table_batch", "limit"})
    return _predicting(job, sets, data=tuple(one.parent for one in sets), **told)


# ---- measurements ----------------------------------------------------------------------------------------------------


def _measuring(job: Job, path: str, data: Job | Sequence[Job], model: Job | None = None, **told: Any) -> Work:
    """A run measured at all its depths.

    Args:
        job: the job.
        path: of the run.
        data: the tasks, or the one data set, that it is measured on.
        model: what is measured in place of the run itself.
        told: the settings of the measurement. A dense model has no run folder that could say which study and backbone it
            is: that is told, too.
    """
    run = job.jobs.runs[path]
    model = model or job.jobs.model(run)
    if not METHODS[run.method].trained:
        told |= {"study": job.study.study.name, "name": run.backbone}
    given = {"run": model.parent, "data": data.parent if isinstance(data, Job) else _folder_of(data)}
    told = {**given, "removed": job.study.depths(run), **told, "out": job.path}
    return Work({"model": model, "data": data}, told, run.backbone)


def _read_of(job: Job, path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that apply to a run: a dense model skips no block, and peers do not score single ones."""
    method = METHODS[job.jobs.runs[path].method]
    unread = [] if method.kind == "routed" else ["slack"]
    unread += [] if method.trained else ["kv", "routing", "decode"]
    return {name: value for name, value in settings.items() if name not in unread}


@stage("{run}", "records/accuracy/{place}", cost=costs.evaluation, retries=2, folder=True)
def evaluate(job: Job, run: str) -> Work:
    """Accuracy: one job per run, all its budgets and tasks in it, so that the backbone is loaded once."""
    settings = job.study.evaluation
    return _measuring(job, run, job.jobs.data(settings.tasks), **_read_of(job, run, settings.model_dump()))


@stage("{run}", "records/whole/{place}", command="evaluate", cost=costs.evaluation, retries=2, folder=True)
def evaluate_whole(job: Job, run: str) -> Work:
    """Accuracy of a whole model on the tasks that are scored at predicted depths and in no table."""
    tasks = job.study.predicted_only()
    settings = _read_of(job, run, job.study.evaluation.model_dump() | {"tasks": tasks})
    return _measuring(job, run, job.jobs.data(tasks), **settings)


@stage("{run}", "records/generation/{place}", cost=costs.solving, retries=2, folder=True)
def solve(job: Job, run: str) -> Work:
    """Problems answered by generation."""
    settings = job.study.generation
    told = _read_of(job, run, settings.model_dump(exclude={"backbones"}))
    return _measuring(job, run, job.jobs.data(settings.tasks), **told)


_ON_A_DATA_SET = "{run}/dataset~{dataset}"


@stage(_ON_A_DATA_SET, "records/trace/{place}", cost=costs.generating, folder=True)
def trace(job: Job, run: str, dataset: str) -> Work:
    """The paths that generations take; after a task's prompts nothing is generated."""
    settings = job.study.trace
    told = _read_of(job, run, settings.model_dump(exclude={"backbones", "datasets", "tasks"}))
    told |= {"new_tokens": 1} if dataset in settings.tasks else {}
    return _measuring(job, run, job.jobs("data", dataset=dataset), **told)


@stage("{routed}/dataset~{dataset}", "records/rouge/{place}", cost=costs.generating, folder=True)
def rouge(job: Job, routed: str, dataset: str) -> Work:
    """Summaries of dialogues."""
    settings = job.study.summaries.model_dump(exclude={"backbones"})
    return _measuring(job, routed, job.jobs("data", dataset=dataset), **settings)


@stage("{run}", "records/likelihood/{place}", cost=costs.scoring, retries=2, folder=True)
def score(job: Job, run: str) -> Work:
    """Held-out text scored at all depths, K/V policies and decode modes in one job, so that the whole model takes each item
    once; a variant that only an ablation shows in the mode that its table shows."""
    settings, one = job.study.likelihood, job.jobs.runs[run]
    sets = job.jobs.data(settings.datasets)
    told = settings.model_dump(exclude={"backbones", "datasets"})
    if one not in job.study.compared_runs(one.backbone):
        told |= {"kv": settings.kv[:1], "decode": settings.decode[:1]}
    work = _measuring(job, run, sets, **told)
    return replace(work, told={**work.told, "data": tuple(one.parent for one in sets)})


@stage(
    _ON_A_DATA_SET,
    "records/latency/{place}",
    cost=costs.timing,
    folder=True,
)
def latency(job: Job, run: str, dataset: str) -> Work:
    """Speed: dense, sliced and routed take turns in one process, batch size by batch size; a peer, whose path is fixed at
    the prompt, itself beside the dense model."""
    told = job.study.latency.model_dump(exclude={"backbones", "methods", "datasets"})
    if job.jobs.runs[run].method != "buddy":
        told["executions"] = ["dense", "reuse"]
    return _measuring(job, run, job.jobs("data", dataset=dataset), **told)


@stage("{run}", "records/breakdown/{place}", cost=costs.profiling, folder=True)
def breakdown(job: Job, run: str) -> Work:
    """What a routed pass spends its time on: of the run itself, or of the one made of it that has a budget predictor, whose
    cost is then profiled, too."""
    predictors = [one for one in job.jobs.predictors("predictor") if one.wildcards["routed"] == run]
    timed = job.jobs("data", dataset=min(job.study.latency.datasets))  # alpaca, as in the paper, where it is timed
    told = job.study.breakdown.model_dump(exclude={"backbones"})
    return _measuring(job, run, timed, predictors[-1] if predictors else None, **told)
