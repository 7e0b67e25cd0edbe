# Speed: one job per timed run and data set; dense, sliced and routed take turns in one process, batch size by batch size.


rule latency:
    input:
        model=lambda w: model_file(RUNS[w.run]),
        data=f"{RESULTS}/data/{{dataset}}/data.json",
    output:
        directory(f"{RESULTS}/records/latency/{{run}}/dataset~{{dataset}}"),
    log:
        f"{RESULTS}/logs/latency/{{run}}/dataset~{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/latency/{{run}}/dataset~{{dataset}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("latency", times=len(STUDY.latency.batch_sizes)),
    params:
        model=lambda w, input: parent(input.model),
        data=lambda w, input: parent(input.data),
        settings=section(STUDY.latency, "backbones", "methods", "datasets", "executions"),
        executions=executions_flag,
        removed=depths_flag,
    shell:
        "python -m buddy latency --run {params.model:q} --data {params.data:q} --removed {params.removed:q} {params.settings} "
        "{params.executions} "
        "--out {output:q} > {log:q} 2>&1"
