# The study in typed form, where its files are, and what a job of each backbone needs.
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from buddy import config as buddy_config
from buddy.errors import UserError
from buddy.records import find as find_records
from buddy.records import write_json
from buddy.reporting import source
from buddy.settings import PRIORS


def checked(ask, *arguments):
    """What `ask` answers; a user's mistake is one line that names file, key, value and what is allowed."""
    try:
        return ask(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


ORIGIN = " with ".join(str(file) for file in ["config.yaml", *workflow.overwrite_configfiles])
STUDY = checked(buddy_config.parse, config, ORIGIN)
# Defaults come from the typed study: filling them in here would mix the keys of alternative backbone sources.
validate(config, "../workflow/schemas/config.schema.json", set_default=False)

RESULTS = f"results/{STUDY.study.name}"
# The records behind tables and figures: those that the rules measure, or those that the study names (study.records).
RECORDS = checked(source.records_folder, STUDY, RESULTS, ORIGIN)
MEASURES = STUDY.study.records is None
RUNS = {run.path: run for run in STUDY.runs()}

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
    indicator=any_of(PRIORS[1:]),
    dataset="[a-z0-9_]+",
    table="table[0-9]+",
    figure="[a-z0-9_]+",


def parent(path):
    """The folder of a file: commands take folders, rules promise a file in each."""
    return str(Path(path).parent)


def flags(settings):
    """Settings as command-line flags: {"batch_size": 8} is --batch-size 8; None is left to the default."""
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


def source_flags(wildcards):
    """Where a backbone comes from."""
    return flags(STUDY.backbones[wildcards.backbone].source.model_dump())


def backbone_of(wildcards):
    return STUDY.backbones[(RUNS[wildcards.run].backbone if "run" in wildcards.keys() else wildcards.backbone)]


def mem_mb(wildcards, attempt):
    """Host memory of a job that loads the backbone; more at each retry."""
    return int(1000 * backbone_of(wildcards).mem_gb * (1 + 0.5 * (attempt - 1)))


def minutes(share):
    """Time limit of a job: a share of the backbone's training hours, more at each retry."""
    return lambda wildcards, attempt: max(15, int(60 * backbone_of(wildcards).hours * share * attempt))


def model_file(run):
    """The file that says a run's model is complete: the run itself, or the backbone of a dense one."""
    if run.method == "dense":
        return f"{RESULTS}/backbones/{run.backbone}/backbone.json"
    return f"{RESULTS}/runs/{run.path}/run.json"


def depths_of(run):
    """Numbers of removed blocks at which a run is measured; the dense model removes none."""
    return [0] if run.method == "dense" else STUDY.removed(run.backbone)


def shown(folders):
    """Folders of records as inputs: as the rules promise them, or the files that are there among records given."""
    if MEASURES:
        return folders
    return [str(file) for folder in folders for file in find_records(folder)]


def accuracy_records(runs):
    """Folders of accuracy records, one per run: removed~N.json."""
    return shown([f"{RECORDS}/accuracy/{run.path}" for run in runs])


def latency_records(backbone):
    """Folders of latency records, one per data set: batch~B/engine~E/execution~X/removed~N.json."""
    run = timed_run(backbone)
    return shown([f"{RECORDS}/latency/{run.path}/dataset~{name}" for name in STUDY.latency.datasets])


def breakdown_records(backbone):
    """The folder of breakdown records: removed~N.json."""
    return shown([f"{RECORDS}/breakdown/{timed_run(backbone).path}"])


def main_runs(backbone):
    """Runs of an accuracy table: the dense model and the main variant with every seed."""
    runs = [run for run in RUNS.values() if run.backbone == backbone]
    main = {STUDY.buddy_run(backbone, STUDY.study.main.model_dump(), seed).path for seed in STUDY.study.seeds}
    return [run for run in runs if run.method == "dense" or run.path in main]


def timed_run(backbone):
    """The run that is timed and profiled: the main variant with the first seed."""
    return STUDY.buddy_run(backbone, STUDY.study.main.model_dump(), STUDY.study.seeds[0])


def corpus_input(wildcards):
    """The calibration corpus: a data set of the study, or a text file of the user's."""
    corpus = STUDY.importance.corpus
    return corpus if Path(corpus).is_file() else f"{RESULTS}/data/{corpus}/data.json"


def corpus_path(wildcards, input):
    return parent(input.corpus) if Path(input.corpus).name == "data.json" else input.corpus


def prior_record(wildcards):
    """The importance record a run fuses; none for the variant without a prior."""
    run = RUNS[wildcards.run]
    prior = run.variant["prior"]
    if prior == "none":
        return []
    return f"{RESULTS}/records/importance/backbone~{run.backbone}/indicator~{prior}.json"


def variant_flags(wildcards):
    """The run's own axes; the prior is an input."""
    axes = {axis: value for axis, value in RUNS[wildcards.run].axes if axis != "prior"}
    return flags({**axes, "seed": RUNS[wildcards.run].seed})


def model_flags(wildcards):
    """Which study and backbone it is; a dense model has no run folder that could say so, and skips no block."""
    run = RUNS[wildcards.run]
    if run.method == "dense":
        settings = STUDY.evaluation.model_dump(exclude={"kv", "routing"})
        return flags({**settings, "study": STUDY.study.name, "name": run.backbone})
    return section(STUDY.evaluation)


def table_files(name):
    return [f"{RESULTS}/tables/{name}.{kind}" for kind in ("csv", "md", "tex")]


def figure_files(name):
    return [f"{RESULTS}/figures/{name}.{kind}" for kind in ("pdf", "png")]


def table_records(name):
    """The records that a table shows."""
    table = STUDY.study.tables[name]
    if table.kind == "ablation":
        return accuracy_records(STUDY.ablation_runs(STUDY.ablation(table.ablation)))
    if table.kind == "latency":
        return latency_records(table.backbone)
    if table.kind == "breakdown":
        return breakdown_records(table.backbone)
    return accuracy_records(main_runs(table.backbone))


def figure_records(name):
    """The records that a figure shows."""
    if name == "latency":
        return [folder for backbone in STUDY.timed_backbones() for folder in latency_records(backbone)]
    return accuracy_records([run for backbone in STUDY.study.backbones for run in main_runs(backbone)])


def measurements(kind):
    """The settings that say which records of a kind enter, and how they are shown."""
    return {
        "latency": STUDY.latency.model_dump(exclude={"backbones"}),
        "breakdown": STUDY.breakdown.model_dump(exclude={"backbones"}),
    }.get(kind, STUDY.evaluation.tasks)


def table_settings(wildcards):
    """What the study says of a table: its entry, and the budgets and runs behind its rows and columns."""
    table = STUDY.study.tables[wildcards.table]
    backbone = table.backbone or STUDY.ablation(table.ablation).backbone
    return {
        "table": table.model_dump(),
        "removed": STUDY.removed(backbone),
        "records": table_records(wildcards.table),
        "measurements": measurements(table.kind),
    }


def figure_settings(wildcards):
    """What the study says of a figure: the budgets on its axes, and which records it draws."""
    return {
        "removed": {backbone: STUDY.removed(backbone) for backbone in STUDY.study.backbones},
        "measurements": measurements(wildcards.figure),
    }
