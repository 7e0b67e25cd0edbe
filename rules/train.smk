# Stage 1: one run per backbone, variant and seed. A killed job goes on from its checkpoint when it is run again.


rule train:
    input:
        backbone=lambda w: f"{RESULTS}/backbones/{RUNS[w.routed].backbone}/backbone.json",
        data=training_data,
        prior=prior_record,
    output:
        run=f"{RESULTS}/runs/{{routed}}/run.json",
        record=f"{RESULTS}/records/training/{{routed}}.json",
    log:
        f"{RESULTS}/logs/train/{{routed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train/{{routed}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("train"),
    params:
        backbone=lambda w, input: parent(input.backbone),
        data=lambda w, input: parent(input.data),
        prior=lambda w, input: flags({"prior": input.get("prior") or None}),
        variant=variant_flags,
        most_removed=lambda w: max(STUDY.removed(RUNS[w.routed].backbone)),
        study=STUDY.study.name,
        folder=lambda w, output: parent(output.run),
    shell:
        "python -m buddy train --backbone {params.backbone:q} --data {params.data:q} {params.prior} {params.variant} "
        "--most-removed {params.most_removed:q} --study {params.study:q} "
        "--out {params.folder:q} --record {output.record:q} > {log:q} 2>&1"
