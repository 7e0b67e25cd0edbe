# What a routed pass spends its time on: one job per profiled run, all its depths in it.


rule breakdown:
    input:
        model=profiled_model,
        data=f"{RESULTS}/data/{min(STUDY.latency.datasets)}/data.json",  # alpaca, as in the paper, where it is timed
    output:
        directory(f"{RESULTS}/records/breakdown/{{run}}"),
    log:
        f"{RESULTS}/logs/breakdown/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/breakdown/{{run}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("breakdown"),
    params:
        model=lambda w, input: parent(input.model),
        data=lambda w, input: parent(input.data),
        settings=section(STUDY.breakdown, "backbones"),
        removed=depths_flag,
    shell:
        "python -m buddy breakdown --run {params.model:q} --data {params.data:q} --removed {params.removed:q} "
        "{params.settings} --out {output:q} > {log:q} 2>&1"
