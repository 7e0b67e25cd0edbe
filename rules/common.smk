# The study in typed form, where its files are, and what a job of each backbone needs.
import json
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from buddy.data.catalogue import check_corpus
from buddy.errors import UserError, unknown
from buddy.settings import INDICATORS, PREDICTOR_PRESETS, READ_BY_PRESET, STATIC_PEERS, corpus_name
from buddy.storage.files import write_json
from buddy.study import config as buddy_config
from buddy.study import limits
from buddy.study import layout, planned_figures
from buddy.study.records import find as find_records
from buddy.study.settings import NOT_OF_PEERS

CONFIGFILES = [os.path.relpath(file) for file in workflow.overwrite_configfiles]  # as they were given
ORIGIN = " with ".join(str(file) for file in ["config.yaml", *CONFIGFILES])
STUDY = checked(buddy_config.parse, config, ORIGIN)
# Defaults come from the typed study: filling them in here would mix the keys of alternative backbone sources.
validate(config, "../workflow/schemas/config.schema.json", set_default=False)

RESULTS = f"results/{STUDY.study.name}"
# The records behind tables and figures: those that the rules measure, or those that the study names (study.records).
RECORDS = checked(layout.records_folder, STUDY, RESULTS, ORIGIN)
MEASURES = STUDY.study.records is None
TABLES_OF_STUDY = STUDY.measured_tables()
RUNS = {run.path: run for run in STUDY.runs()}
ROUTED = [path for path, run in RUNS.items() if run.method == "buddy"]
PEERS = [path for path, run in RUNS.items() if run.method not in ("dense", "buddy")]

# What blocks are ranked on besides the study's own corpus, by its name in paths.
CORPORA = {corpus_name(corpus): corpus for corpus in STUDY.orders.corpora} if STUDY.ordered_backbones() else {}
_RANKED_ON = [("orders.corpora", corpus) for corpus in CORPORA.values()]
_RANKED_ON += [("importance.corpus", STUDY.importance.corpus)] if STUDY.importances() else []
_RANKED_ON += [("peers.corpus", STUDY.peers.corpus)] if {*STATIC_PEERS} & {*STUDY.study.methods} else []
for _key, _corpus in _RANKED_ON if MEASURES else ():
    checked(check_corpus, _corpus, f"{ORIGIN}: {_key}")

# What a budget predictor is evaluated on; several data sets have a record together, too.
HELD_OUT = [*STUDY.predictor.datasets, *(["all"] if len(STUDY.predictor.datasets) > 1 else [])]

# Jobs find the interpreter and the tools that Snakemake itself runs with; a conda environment brings its own.
ENVIRONMENT = {"WANDB_PROJECT": STUDY.tracking.project, "WANDB_DIR": f"{RESULTS}/wandb"}
if STUDY.tracking.entity:
    ENVIRONMENT["WANDB_ENTITY"] = STUDY.tracking.entity
if STUDY.tracking.mode != "auto" and "WANDB_MODE" not in os.environ:
    ENVIRONMENT["WANDB_MODE"] = STUDY.tracking.mode
PREFIX = "".join(f"export {name}={shlex.quote(value)}; " for name, value in ENVIRONMENT.items())
if not workflow.deployment_settings.deployment_method:
    PREFIX += f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"; '
shell.prefix(PREFIX)


def any_of(names):
    """A wildcard constraint that lets through these names and nothing else."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


wildcard_constraints:
    backbone=any_of(STUDY.backbones),
    run=any_of(RUNS if MEASURES else []),  # with records given, no rule trains or measures anything
    routed=any_of(ROUTED if MEASURES else []),
    peer=any_of(PEERS if MEASURES else []),
    static_peer=any_of(STATIC_PEERS),
    criterion="[a-z_]+",
    indicator=any_of(INDICATORS),
    corpus=any_of(CORPORA),
    preset=any_of(PREDICTOR_PRESETS),
    dataset="[a-z0-9_]+",
    table=any_of(TABLES_OF_STUDY),
    figure=any_of(planned_figures.NAMES),


def parent(path):
    """The folder of a file: commands take folders, rules promise a file in each."""
    return str(Path(path).parent)


def flags(settings):
    """Settings as command-line flags: {"batch_size": 8} is --batch-size 8; None is left to the default.

    The text is quoted for the shell here, word by word; everything else that a rule puts into its command is quoted by
    `:q` there.
    """
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if value is True or value is False:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words.append(f"--{option} {shlex.quote(text)}")
    return " ".join(words)


def section(model, *leave_out):
    """A settings section as flags, without the fields that the rule passes in another way."""
    return flags(model.model_dump(exclude=set(leave_out)))


def section_of(model, *fields):
    """These fields of a settings section as flags."""
    return flags(model.model_dump(include=set(fields)))


def folders_flag(files):
    """The folders of these files, a flag each."""
    return " ".join(f"--data {shlex.quote(parent(file))}" for file in files)


def source_flags(wildcards):
    """Where a backbone comes from."""
    return flags(STUDY.backbones[wildcards.backbone].source.model_dump())


def backbone_of(wildcards):
    for kind in ("run", "routed", "peer"):
        if kind in wildcards.keys():
            return STUDY.backbones[RUNS[wildcards[kind]].backbone]
    return STUDY.backbones[wildcards.backbone]


def mem_mb(wildcards, attempt):
    """Host memory of a job that loads the backbone; more at each retry."""
    return int(1000 * backbone_of(wildcards).mem_gb * (1 + 0.5 * (attempt - 1)))


MINUTES_AT_MOST = {}  # by rule, once the session has asked the cluster: a retry gets no more than its partition grants


def minutes(name, times=1):
    """Time limit of a rule's jobs, from the hours of the backbone; more at each retry."""
    return lambda wildcards, attempt: limits.minutes(
        name, backbone_of(wildcards).hours, attempt, times, MINUTES_AT_MOST.get(name)
    )


def model_file(run):
    """The file that says a run's model is complete: the run itself, or the backbone of a dense one."""
    if run.method == "dense":
        return f"{RESULTS}/backbones/{run.backbone}/backbone.json"
    return f"{RESULTS}/runs/{run.path}/run.json"


def profiled_model(wildcards):
    """The run itself, or the one made of it that has a budget predictor, whose cost is then profiled, too."""
    run = RUNS[wildcards.run]
    predictors = [path for path in STUDY.predictors() if path.startswith(f"{run.path}/")]
    return f"{RESULTS}/predictors/{predictors[-1]}/run.json" if predictors else model_file(run)


def depths_flag(wildcards):
    """Numbers of removed blocks at which a run is measured."""
    return ",".join(map(str, STUDY.depths(RUNS[wildcards.run])))


def shown(folders):
    """Folders of records as inputs: as the rules promise them, or the files that are there among records given."""
    if MEASURES:
        return folders
    return [str(file) for folder in folders for file in find_records(folder)]


def accuracy_records(runs):
    """Folders of accuracy records, one per run: removed~N.json."""
    return shown([f"{RECORDS}/accuracy/{run.path}" for run in runs])


def likelihood_records(runs):
    """Folders of likelihoods, one per run: kv~KV/decode~MODE/removed~N.json."""
    return shown([f"{RECORDS}/likelihood/{run.path}" for run in runs])


def latency_records(runs):
    """Folders of latency records, one per run and data set: batch~B/engine~E/execution~X/removed~N.json."""
    return shown([f"{RECORDS}/latency/{run.path}/dataset~{name}" for run in runs for name in STUDY.latency.datasets])


def breakdown_records(backbone):
    """The folder of breakdown records: removed~N.json."""
    return shown([f"{RECORDS}/breakdown/{STUDY.main_run(backbone).path}"])


def generation_records():
    """Folders of generated answers, one per run of the backbones that answer: removed~N.json."""
    runs = [run for backbone in STUDY.answering_backbones() for run in STUDY.answering_runs(backbone)]
    return shown([f"{RECORDS}/generation/{run.path}" for run in runs])


def training_records():
    """The records of every training, each a file."""
    return shown_files(f"{RECORDS}/training/{path}.json" for path in [*ROUTED, *PEERS])


def trace_records(backbone):
    """Folders of traces, one per run and data set: removed~N.json."""
    runs = STUDY.answering_runs(backbone)
    return shown([f"{RECORDS}/trace/{run.path}/dataset~{name}" for run in runs for name in STUDY.trace.datasets])


def corpus_input(corpus):
    """A calibration corpus: a data set of the study, or a text file of the user's."""
    return corpus if Path(corpus).is_file() else f"{RESULTS}/data/{corpus}/data.json"


def corpus_path(wildcards, input):
    return parent(input.corpus) if Path(input.corpus).name == "data.json" else input.corpus


def prior_record(wildcards):
    """The importance record a run fuses; none for the variant without a prior."""
    run = RUNS[wildcards.routed]
    prior = run.variant["prior"]
    if prior == "none":
        return []
    return f"{RESULTS}/records/importance/backbone~{run.backbone}/indicator~{prior}.json"


def training_data(wildcards):
    """The data set that a run is trained on: as it was fetched, or with its prompts answered by the run's backbone."""
    run = RUNS[wildcards.get("routed") or wildcards.get("peer")]
    answered = f"answered_by~{run.backbone}/" if STUDY.data.answers == "backbone" else ""
    return f"{RESULTS}/data/{answered}{STUDY.training.data}/data.json"


def variant_flags(wildcards):
    """The run's own axes, and the settings that its recipe reads; the prior is an input."""
    return flags(STUDY.training_options(RUNS[wildcards.routed]))


def protected(wildcards):
    """Blocks that a static peer never removes, where the study says so."""
    blocks = STUDY.peers.protect.get(wildcards.static_peer)
    return "" if blocks is None else "--protect=" + (",".join(map(str, blocks)) or "none")


def calibration_record(wildcards):
    """The record that a peer's choice of blocks comes from; none for one that needs none."""
    run = RUNS[wildcards.peer]
    folder = f"{RESULTS}/records/calibration/backbone~{run.backbone}/method~{run.method}"
    if run.method in STATIC_PEERS:
        return f"{folder}/criterion~{run.variant['criterion']}.json"
    return f"{folder}.json" if run.method == "pudding" else []


def router_tasks(wildcards):
    """The data sets that PuDDing's router learns from."""
    tasks = STUDY.pudding.tasks if RUNS[wildcards.peer].method == "pudding" else []
    return [f"{RESULTS}/data/{task}/data.json" for task in tasks]


def router_encoder(wildcards):
    """The encoder that PuDDing's router reads prompts with, where that is not the backbone."""
    named = RUNS[wildcards.peer].method == "pudding" and STUDY.pudding.encoder != "backbone"
    return f"{RESULTS}/encoder/encoder.json" if named else []


def peer_inputs(wildcards, input):
    """What a peer is given beside backbone and instruction data."""
    given = {"calibration": input.get("calibration") or None}
    if input.get("tasks"):
        encoder = parent(input.encoder) if input.get("encoder") else "backbone"
        given |= {"tasks": parent(parent(input.tasks[0])), "pudding_encoder": encoder}
    return flags(given)


def peer_flags(wildcards):
    """A peer's method and axes, and the settings that only it reads."""
    run = RUNS[wildcards.peer]
    axes = {axis: value for axis, value in run.axes if axis != "criterion"}
    not_routers = {"criteria", "pool_items", "encoder"}
    own = {"pudding": STUDY.pudding.model_dump(exclude=not_routers), "first": STUDY.first.model_dump()}
    settings = {f"{run.method}_{name}": value for name, value in own.get(run.method, {}).items()}
    return flags({"method": run.method, **axes, "seed": run.seed, **settings})


def model_flags(wildcards, settings, *leave_out):
    """A section as flags, and which study and backbone it is; a dense model has no run folder that could say so, and
    skips no block."""
    run = RUNS[wildcards.run]
    fields = settings.model_dump(exclude={"backbones", "datasets", *leave_out})
    if run.method == "dense":
        fields = {name: value for name, value in fields.items() if name not in ("kv", "routing", "decode")}
        fields |= {"study": STUDY.study.name, "name": run.backbone}
    if run.method != "buddy":
        fields.pop("slack", None)  # the peers do not score single blocks
    return flags(fields)


def score_flags(wildcards):
    """The settings of scoring. A dense model has all its modes in one pass, and a record of each like any other run."""
    run = RUNS[wildcards.run]
    whose = {"study": STUDY.study.name, "name": run.backbone} if run.method == "dense" else {}
    return flags({**STUDY.likelihood.model_dump(exclude={"backbones", "datasets"}), **whose})


def trace_flags(wildcards):
    """The settings of a trace; after a task's prompts nothing is generated."""
    prompts_only = {"new_tokens": 1} if wildcards.dataset in STUDY.trace.tasks else {}
    return model_flags(wildcards, STUDY.trace.model_copy(update=prompts_only), "tasks")


def executions_flag(wildcards):
    """What is timed: of a peer, whose path is fixed at the prompt, itself beside the dense model."""
    chosen = STUDY.latency.executions if RUNS[wildcards.run].method == "buddy" else ["dense", "reuse"]
    return flags({"executions": chosen})


def predictor_data(wildcards):
    """The data sets that a preset of the budget predictor learns from."""
    names = STUDY.predictor.data if wildcards.preset == "paper" else STUDY.predictor.tuned_data
    return [f"{RESULTS}/data/{name}/data.json" for name in names]


def predictor_flags(wildcards):
    """The settings that a preset of the budget predictor reads."""
    return section_of(STUDY.predictor, *READ_BY_PRESET[wildcards.preset])


def predictor_records():
    """Training records of the study's budget predictors."""
    return shown_files(f"{RECORDS}/training/{path}.json" for path in STUDY.predictors())


def budget_records():
    """Records of the study's budget predictors on held-out inputs, one per data set."""
    return shown_files(
        f"{RECORDS}/budget/{path}/dataset~{name}.json" for path in STUDY.predictors() for name in HELD_OUT
    )


def predicted_records():
    """Scores at the depths that the study's budget predictors choose, and those of the whole models beside them."""
    if not STUDY.predictor.tasks:
        return []
    predicted = shown_files(f"{RECORDS}/predicted/{path}/auto.json" for path in STUDY.predictors())
    whole = ("dense", "dense_lora")
    runs = [run for name in STUDY.predicting_backbones() for run in STUDY.compared_runs(name) if run.method in whole]
    return predicted + accuracy_records(runs)


def shown_files(files):
    """Records as inputs: as the rules promise them, or those that are there among records given."""
    return [file for file in files if MEASURES or Path(file).is_file()]


def table_files(name):
    return [f"{RESULTS}/tables/{name}.{kind}" for kind in ("csv", "md", "tex")]


def figure_files(name):
    return [f"{RESULTS}/figures/{name}.{kind}" for kind in ("pdf", "png")]


def table_records(name):
    """The records that a table shows, and those that say whether its routers take more than one path."""
    found = measured_records(TABLES_OF_STUDY[name])
    return [*found, *router_records(shown_runs(TABLES_OF_STUDY[name]))] if found else []


def measured_records(table):
    """The records behind the figures of a table."""
    if table.kind == "training_cost":
        return training_records() + predictor_records()
    if table.kind == "generation":
        return generation_records()
    if table.kind == "properties":
        return trace_records(table.backbone)
    if table.kind == "likelihood":
        return likelihood_records(shown_runs(table))
    if table.kind == "breakdown":
        return breakdown_records(table.backbone)
    return (latency_records if table.kind in ("latency", "peer_latency") else accuracy_records)(shown_runs(table))


def shown_runs(table):
    """The runs that a table shows; of what training costs, all are records of trainings already."""
    if table.kind == "ablation":
        return STUDY.ablation_runs(STUDY.ablation(table.ablation))
    if table.kind in ("latency", "breakdown"):
        return [STUDY.main_run(table.backbone)]
    if table.kind == "peer_latency":
        return STUDY.timed_runs(table.backbone)
    if table.kind == "generation":
        return [run for backbone in STUDY.answering_backbones() for run in STUDY.answering_runs(backbone)]
    if table.kind == "properties":
        return STUDY.answering_runs(table.backbone)
    if table.kind == "likelihood":
        return STUDY.scored_runs()
    return [] if table.kind == "training_cost" else STUDY.compared_runs(table.backbone)


def router_records(runs):
    """Training records of BUDDY's among these runs."""
    return shown_files(f"{RECORDS}/training/{run.path}.json" for run in runs if run.method == "buddy")


def path_records(names):
    """Folders of the traces of BUDDY's main runs on these data sets and tasks."""
    traced = STUDY.traced_backbones() if "buddy" in STUDY.study.methods else []
    runs = [STUDY.main_run(backbone) for backbone in traced]
    return shown([f"{RECORDS}/trace/{run.path}/dataset~{name}" for run in runs for name in names])


def there(kind):
    """Records of a kind that were measured without a rule having been asked for them."""
    return [str(file) for file in find_records(f"{RECORDS}/{kind}")]


def figure_records(name):
    """The records that a figure shows."""
    if name == "latency":
        return latency_records([STUDY.main_run(backbone) for backbone in STUDY.timed_backbones()])
    if name in planned_figures.ORDERS:
        planned = planned_figures.orders(STUDY, name)
        return shown_files(f"{RECORDS}/importance/{file}" for file in planned) if planned else there("importance")
    if name == "figure4":
        return path_records(STUDY.trace.datasets)
    if name in planned_figures.HEAT_MAPS:
        return path_records([*STUDY.trace.datasets, *STUDY.trace.tasks])
    if name == "figure5":
        planned = [f"{RECORDS}/rouge/{run.path}/dataset~samsum" for run in STUDY.summarising_runs()]
        return shown(planned) if planned else there("rouge")
    if name == "figure12":
        return predictor_records()
    if name == "figure13":
        return budget_records() + predicted_records()
    if name == "ablation":
        return accuracy_records(
            {run: None for ablation in STUDY.study.ablations for run in STUDY.ablation_runs(ablation)}
        )
    return accuracy_records([run for backbone in STUDY.study.backbones for run in STUDY.compared_runs(backbone)])


def measurements(kind):
    """The settings that say which records of a kind enter, and how they are shown."""
    return {
        "latency": STUDY.latency.model_dump(exclude={"backbones"}),
        "peer_latency": STUDY.latency.model_dump(exclude={"backbones"}),
        "breakdown": STUDY.breakdown.model_dump(exclude={"backbones"}),
        "generation": STUDY.generation.model_dump(),
        "likelihood": [STUDY.likelihood.model_dump(), STUDY.study.model_dump(include={"main", "recipes", "ablations"})],
        **dict.fromkeys(("properties", "figure4"), STUDY.trace.model_dump(exclude={"backbones", "tasks"})),
        **dict.fromkeys(planned_figures.HEAT_MAPS, STUDY.trace.model_dump(exclude={"backbones"})),
        "figure5": STUDY.summaries.model_dump(exclude={"backbones"}),
        "figure12": STUDY.predictor.presets,
        "figure13": [STUDY.predictor.presets, STUDY.predictor.datasets, STUDY.predictor.tasks],
        **dict.fromkeys(planned_figures.ORDERS, [STUDY.importance.corpus, *CORPORA]),
    }.get(kind, STUDY.evaluation.tasks)


def table_settings(wildcards):
    """What the study says of a table: its entry, and the budgets and runs behind its rows and columns."""
    table = TABLES_OF_STUDY[wildcards.table]
    backbones = [STUDY.ablation(table.ablation).backbone] if table.ablation else [table.backbone]
    if table.kind == "generation":
        backbones = STUDY.answering_backbones()
    elif table.kind == "likelihood":
        backbones = STUDY.scored_backbones()
    elif table.kind == "training_cost":
        backbones = STUDY.study.backbones
    return {
        "table": table.model_dump(),
        "removed": [STUDY.removed(backbone) for backbone in backbones],
        "records": table_records(wildcards.table),
        "measurements": measurements(table.kind),
    }


def figure_settings(wildcards):
    """What the study says of a figure: the budgets on its axes, and which records it draws."""
    return {
        "removed": {backbone: STUDY.removed(backbone) for backbone in STUDY.study.backbones},
        "measurements": measurements(wildcards.figure),
    }


# What tables and figures are about, the parts of the report in the order of the paper.
SECTIONS = {
    "1 Properties of the method": ["properties", "figure4", "figure5", *planned_figures.HEAT_MAPS],
    "2 Accuracy and likelihood against budget": ["accuracy", "generation", "accuracy_vs_budget", "likelihood"],
    "3 Speed": ["latency", "peer_latency", "breakdown"],
    "4 Ablations": ["ablation", "figure1", "figure2", "figure7", "figure8"],
    "5 Budget predictor": ["figure12", "figure13"],
    "6 Cost of training": ["training_cost"],
}
SECTION_OF = {kind: section for section, kinds in SECTIONS.items() for kind in kinds}


def depths_text(backbones):
    """Removed blocks of each backbone: `8, 16 of 32`."""
    return "; ".join(
        f"{', '.join(map(str, STUDY.removed(name)))} of {STUDY.backbones[name].blocks}" for name in backbones
    )


def table_section(wildcards):
    return SECTION_OF[TABLES_OF_STUDY[wildcards.table].kind]


def figure_section(wildcards):
    return SECTION_OF[wildcards.figure]


def table_labels(wildcards):
    """A table's parameters, as columns of the report's list."""
    table = TABLES_OF_STUDY[wildcards.table]
    named = STUDY.ablation(table.ablation).backbone if table.ablation else table.backbone
    shown_in = {"generation": STUDY.answering_backbones, "likelihood": STUDY.scored_backbones}
    several = shown_in[table.kind]() if table.kind in shown_in else STUDY.study.backbones
    backbones = [named] if named else several
    return {
        "result": wildcards.table.replace("table", "Table ").capitalize(),
        "shows": table.ablation or table.kind.replace("_", " "),
        "backbone": ", ".join(backbones),
        "removed blocks": depths_text(backbones),
    }


def figure_labels(wildcards):
    """A figure's parameters, as columns of the report's list."""
    number = wildcards.figure.removeprefix("figure")
    return {
        "result": f"Figure {number}" if number.isdigit() else "Figure",
        "shows": SECTION_OF[wildcards.figure][2:].lower() if number.isdigit() else number.replace("_", " "),
        "backbone": ", ".join(STUDY.study.backbones),
        "removed blocks": depths_text(STUDY.study.backbones),
    }


def reads(wildcards, input):
    """The records behind a table or figure, for W&B's lineage; records given are not of this study."""
    return " ".join(f"--reads {shlex.quote(path)}" for path in input) if MEASURES else ""


def no_such_result(wildcards):
    """Refuse a result that there is not with those that there are."""
    names = [*TABLES_OF_STUDY, *planned_figures.planned(STUDY)]
    raise WorkflowError(str(unknown("result", wildcards.misnamed, names)))
