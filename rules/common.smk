# The study in typed form, where its files are, and what a job of each backbone needs.
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from buddy import config as buddy_config
from buddy.errors import UserError


def read_study():
    """The typed study; a mistake in it is one line that names file, key, value and what is allowed."""
    origin = " + ".join(str(file) for file in ["config.yaml", *workflow.overwrite_configfiles])
    try:
        return buddy_config.parse(config, origin)
    except UserError as error:
        raise WorkflowError(str(error)) from None


STUDY = read_study()
# Defaults come from the typed study: filling them in here would mix the keys of alternative backbone sources.
validate(config, "../workflow/schemas/config.schema.json", set_default=False)

RESULTS = f"results/{STUDY.study.name}"
BUDDY = "python -m buddy"
RUNS = {run.path: run for run in STUDY.runs()}
ROUTED = [run for run in RUNS.values() if run.method == "buddy"]

# Jobs find the interpreter and the tools that Snakemake itself runs with; a conda environment brings its own.
if not workflow.deployment_settings.deployment_method:
    shell.prefix(
        f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"; '
        f"export WANDB_PROJECT={shlex.quote(STUDY.tracking.project)} WANDB_DIR={shlex.quote(f'{RESULTS}/wandb')}; "
        + (f"export WANDB_ENTITY={shlex.quote(STUDY.tracking.entity)}; " if STUDY.tracking.entity else "")
        + ("" if STUDY.tracking.mode == "auto" else f'export WANDB_MODE="${{WANDB_MODE:-{STUDY.tracking.mode}}}"; ')
    )


def any_of(names):
    """A wildcard constraint that lets through these names and nothing else."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


wildcard_constraints:
    backbone=any_of(STUDY.backbones),
    run=any_of(RUNS),
    indicator="delta_ppl|cosine|taylor",
    dataset="[a-z0-9_]+",
    table="table[0-9]+",
    figure="[a-z0-9_]+",


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
    return STUDY.backbones[RUNS[wildcards.run].backbone if "run" in wildcards.keys() else wildcards.backbone]


def mem_mb(wildcards, attempt):
    """Host memory of a job that loads the backbone; more at each retry."""
    return int(1000 * backbone_of(wildcards).mem_gb * (1 + 0.5 * (attempt - 1)))


def minutes(share):
    """Time limit of a job: a share of the backbone's training hours, more at each retry."""
    return lambda wildcards, attempt: max(15, int(60 * backbone_of(wildcards).hours * share * attempt))


def folder_of(run):
    """Folder of a run's model: the run itself, or the backbone of a dense one."""
    return f"{RESULTS}/backbones/{run.backbone}" if run.method == "dense" else f"{RESULTS}/runs/{run.path}"


def model_file(run):
    """The file that says a run's model is complete."""
    return folder_of(run) + ("/backbone.json" if run.method == "dense" else "/run.json")


def depths_of(run):
    """Numbers of removed blocks at which a run is measured; the dense model removes none."""
    return [0] if run.method == "dense" else STUDY.removed(run.backbone)


def accuracy_records(runs):
    """Folders of accuracy records, one per run: removed~N.json."""
    return [f"{RESULTS}/records/accuracy/{run.path}" for run in runs]


def latency_records(backbone):
    """Folders of latency records, one per data set: execution~E/removed~N.json."""
    run = latency_run(backbone)
    return [f"{RESULTS}/records/latency/{run.path}/dataset~{name}" for name in STUDY.latency.datasets]


def main_runs(backbone):
    """Runs of an accuracy table: the dense model and the main variant with every seed."""
    runs = [run for run in RUNS.values() if run.backbone == backbone]
    main = {STUDY.buddy_run(backbone, STUDY.study.main.model_dump(), seed).path for seed in STUDY.study.seeds}
    return [run for run in runs if run.method == "dense" or run.path in main]


def latency_run(backbone):
    """The run that is timed: the main variant with the first seed."""
    return STUDY.buddy_run(backbone, STUDY.study.main.model_dump(), STUDY.study.seeds[0])
