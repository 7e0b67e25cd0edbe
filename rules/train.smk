# Stage 1: one run per backbone, variant and seed. A killed job goes on from its checkpoint when it is run again.


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


rule train:
    input:
        backbone=lambda w: f"{RESULTS}/backbones/{RUNS[w.run].backbone}/backbone.json",
        data=f"{RESULTS}/data/{STUDY.training.data}/data.json",
        prior=prior_record,
    output:
        run=f"{RESULTS}/runs/{{run}}/run.json",
        record=f"{RESULTS}/records/training/{{run}}.json",
    log:
        f"{RESULTS}/logs/train/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train/{{run}}.tsv"
    params:
        backbone=lambda w: f"{RESULTS}/backbones/{RUNS[w.run].backbone}",
        data=f"{RESULTS}/data/{STUDY.training.data}",
        prior=lambda w, input: flags({"prior": input.get("prior") or None}),
        variant=variant_flags,
        most_removed=lambda w: max(STUDY.removed(RUNS[w.run].backbone)),
        settings=section(STUDY.training, "data"),
        study=STUDY.study.name,
        folder=f"{RESULTS}/runs/{{run}}",
    retries: 2
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes(1),
    conda:
        "../envs/buddy.yaml"
    shell:
        "{BUDDY} train --backbone {params.backbone} --data {params.data} {params.prior} {params.variant} "
        "--most-removed {params.most_removed} {params.settings} --study {params.study} "
        "--out {params.folder} --record {output.record} > {log} 2>&1"
