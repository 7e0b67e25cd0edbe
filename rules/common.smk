# The study in typed form, its jobs, and where its files are.
import json
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from buddy.data.catalogue import check_corpus
from buddy.errors import UserError, unknown
from buddy.methods import METHODS, of_kind
from buddy.settings import INDICATORS, PREDICTOR_PRESETS
from buddy.storage import gpus
from buddy.storage.files import write_json
from buddy.study import config as buddy_config
from buddy.study import devices, layout, planned_figures, results
from buddy.study.estimates import Estimates
from buddy.study.jobs import Jobs, corpora

CONFIGFILES = [os.path.relpath(file) for file in workflow.overwrite_configfiles]  # as they were given
ORIGIN = " with ".join(str(file) for file in ["config.yaml", *CONFIGFILES])
STUDY = checked(buddy_config.parse, config, ORIGIN)

RESULTS = f"results/{STUDY.study.name}"
# The records behind tables and figures: those that the rules measure, or those that the study names (study.records).
RECORDS = checked(layout.records_folder, STUDY, RESULTS, ORIGIN)
MEASURES = STUDY.study.records is None
JOBS = Jobs(STUDY, RESULTS)
# What jobs take, for their limits; those of the study that ran on the same device correct the arithmetic.
ESTIMATES = Estimates(JOBS, Path(RESULTS), devices.device(STUDY.limits.device), lambda: results.of_study(JOBS))
TABLES_OF_STUDY = STUDY.measured_tables()

CORPORA = corpora(STUDY)
_RANKED_ON = [("orders.corpora", corpus) for corpus in CORPORA.values()]
_RANKED_ON += [("importance.corpus", STUDY.importance.corpus)] if STUDY.importances() else []
_RANKED_ON += [("peers.corpus", STUDY.peers.corpus)] if {*of_kind("static")} & {*STUDY.study.methods} else []
for _key, _corpus in _RANKED_ON if MEASURES else ():
    checked(check_corpus, _corpus, f"{ORIGIN}: {_key}")

# Jobs find the interpreter and the tools that Snakemake itself runs with; a conda environment brings its own.
ENVIRONMENT = {"WANDB_PROJECT": STUDY.tracking.project, "WANDB_DIR": f"{RESULTS}/wandb"}
if STUDY.tracking.entity:
    ENVIRONMENT["WANDB_ENTITY"] = STUDY.tracking.entity
if STUDY.tracking.mode != "auto" and "WANDB_MODE" not in os.environ:
    ENVIRONMENT["WANDB_MODE"] = STUDY.tracking.mode
# On a machine with several GPUs, as many as may be in use at a time, each job takes one of them.
GPUS = workflow.global_resources.get("gpu")
GPUS = int(GPUS.value or 1) if GPUS is not None else 1
if GPUS > 1 and workflow.local_exec:
    ENVIRONMENT[gpus.VARIABLE] = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(GPUS)))
PREFIX = "".join(f"export {name}={shlex.quote(value)}; " for name, value in ENVIRONMENT.items())
if not workflow.deployment_settings.deployment_method:
    PREFIX += f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"; '
shell.prefix(PREFIX)


def any_of(names):
    """A wildcard constraint that lets through these names and nothing else."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def runs_of(among):
    """The runs that rules train or measure, of the methods that are among these; with records given, there are none."""
    return any_of([path for path, run in JOBS.runs.items() if MEASURES and among(METHODS[run.method])])


wildcard_constraints:
    backbone=any_of(STUDY.backbones),
    run=runs_of(lambda method: True),
    routed=runs_of(lambda method: method.kind == "routed"),
    peer=runs_of(lambda method: method.trained and method.kind != "routed"),
    static_peer=any_of(of_kind("static")),
    criterion="[a-z_]+",
    seed="[0-9]+",
    indicator=any_of(INDICATORS),
    corpus=any_of(CORPORA),
    preset=any_of(PREDICTOR_PRESETS),
    dataset="[a-z0-9_]+",
    table=any_of(TABLES_OF_STUDY),
    figure=any_of(planned_figures.NAMES),


def table_files(name):
    return [f"{RESULTS}/tables/{name}.{kind}" for kind in ("csv", "md", "tex")]


def figure_files(name):
    return [f"{RESULTS}/figures/{name}.{kind}" for kind in ("pdf", "png")]


def table_records(name):
    return results.table_records(JOBS, name, RECORDS)


def figure_records(name):
    return results.figure_records(JOBS, name, RECORDS)


def dense_records():
    """Scores of the backbones as they are: several may be the one that the paper means (`buddy.reporting.compare`)."""
    return results.dense_records(JOBS, RECORDS)


def reads_flags(wildcards, input):
    """The records behind a table or figure, for W&B's lineage; records given are not of this study."""
    return " ".join(f"--reads {shlex.quote(path)}" for path in input) if MEASURES else ""


def no_such_result(wildcards):
    """Refuse a result that there is not with those that there are."""
    names = [*TABLES_OF_STUDY, *planned_figures.planned(STUDY)]
    raise WorkflowError(str(unknown("result", wildcards.misnamed, names)))
