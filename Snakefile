# BUDDY: from backbones to paper-ready tables. `snakemake --profile slurm -j 64` runs the study of config.yaml.
import os

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version, validate

from buddy.config import read_file
from buddy.errors import UserError

min_version("9.20")


def checked(ask, *arguments):
    """What `ask` answers; a user's mistake is one line that names file, key, value and what is allowed."""
    try:
        return ask(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


# Before Snakemake reads it, which would take the second of two equal keys, and tell a slip without file and line.
for _file in ("config.yaml", *workflow.overwrite_configfiles):
    checked(read_file, os.path.relpath(_file))


configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/session.smk"
include: "rules/inputs.smk"
include: "rules/orders.smk"
include: "rules/train.smk"
include: "rules/peers.smk"
include: "rules/predictor.smk"
include: "rules/evaluate.smk"
include: "rules/generate.smk"
include: "rules/score.smk"
include: "rules/latency.smk"
include: "rules/breakdown.smk"
include: "rules/report.smk"
include: "rules/wandb.smk"


localrules:
    all,
    backbone,
    data,
    encoder,
    table,
    figure,
    wandb_sync,
    wandb_report,


onstart:
    start()
    # Reports read the whole study from here. It is no rule's input: a knob must rerun what it changes and nothing else.
    write_json(f"{RESULTS}/study.json", STUDY.model_dump(mode="json"))


onerror:
    print(summary(FAILURES.found()), file=sys.stderr)


# A job tries once: whether it is tried again, and with how much time and memory, is for the call that submitted it.
if not workflow.is_main_process:
    for _rule in workflow.rules:
        _rule.restart_times = 0


rule all:
    default_target: True
    input:
        [table_files(name) for name in TABLES],
        [figure_files(name) for name in FIGURES],
        planned_outputs(),
