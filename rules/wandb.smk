# W&B, on demand: these run where Snakemake runs, which has network and key, and none is part of `all`.


rule wandb:  # sends the runs, makes the report, and ends with its link
    log:
        f"{RESULTS}/logs/wandb.log",
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        mem_mb=1000,
        runtime=75,
    params:
        study=STUDY.study.name,
    shell:
        "set -o pipefail; {{ python -m buddy wandb-sync --results results --study {params.study:q} --workers {threads} && "
        "python -m buddy wandb-report --results results --study {params.study:q}; }} 2>&1 | tee {log:q}"


rule wandb_sync:
    log:
        f"{RESULTS}/logs/wandb_sync.log",
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        study=STUDY.study.name,
    shell:
        "set -o pipefail; python -m buddy wandb-sync --results results --study {params.study:q} --workers {threads} 2>&1 | tee {log:q}"


rule wandb_report:
    log:
        f"{RESULTS}/logs/wandb_report.log",
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        study=STUDY.study.name,
    shell:
        "set -o pipefail; python -m buddy wandb-report --results results --study {params.study:q} 2>&1 | tee {log:q}"
