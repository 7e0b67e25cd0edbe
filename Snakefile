# BUDDY: from backbones to paper-ready tables. `snakemake --profile slurm -j 64` runs the study of config.yaml.
from snakemake.utils import min_version

min_version("9.20")


include: "rules/checked.smk"


configfile: "config.yaml"


include: "rules/container.smk"
include: "rules/common.smk"
include: "rules/jobs.smk"
include: "rules/session.smk"
include: "rules/report.smk"
include: "rules/wandb.smk"
include: "rules/misnamed.smk"


localrules:
    all,
    backbone,
    data,
    encoder,
    table,
    figure,
    wandb,
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
