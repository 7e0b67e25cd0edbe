# Generated answers: problems solved by generation, the paths that generations take, and summaries of dialogues.


rule solve:
    input:
        model=lambda w: model_file(RUNS[w.run]),
        data=[f"{RESULTS}/data/{task}/data.json" for task in STUDY.generation.tasks],
    output:
        directory(f"{RESULTS}/records/generation/{{run}}"),
    log:
        f"{RESULTS}/logs/solve/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/solve/{{run}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("solve"),
    params:
        model=lambda w, input: parent(input.model),
        data=lambda w, input: parent(parent(input.data[0])),
        settings=lambda w: model_flags(w, STUDY.generation),
        removed=depths_flag,
    shell:
        "python -m buddy solve --run {params.model:q} --data {params.data:q} --removed {params.removed:q} {params.settings} "
        "--out {output:q} > {log:q} 2>&1"


rule trace:
    input:
        model=lambda w: model_file(RUNS[w.run]),
        data=f"{RESULTS}/data/{{dataset}}/data.json",
    output:
        directory(f"{RESULTS}/records/trace/{{run}}/dataset~{{dataset}}"),
    log:
        f"{RESULTS}/logs/trace/{{run}}/dataset~{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/trace/{{run}}/dataset~{{dataset}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("trace"),
    params:
        model=lambda w, input: parent(input.model),
        data=lambda w, input: parent(input.data),
        settings=trace_flags,
        removed=depths_flag,
    shell:
        "python -m buddy trace --run {params.model:q} --data {params.data:q} --removed {params.removed:q} {params.settings} "
        "--out {output:q} > {log:q} 2>&1"


rule rouge:
    input:
        model=lambda w: model_file(RUNS[w.routed]),
        data=f"{RESULTS}/data/{{dataset}}/data.json",
    output:
        directory(f"{RESULTS}/records/rouge/{{routed}}/dataset~{{dataset}}"),
    log:
        f"{RESULTS}/logs/rouge/{{routed}}/dataset~{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/rouge/{{routed}}/dataset~{{dataset}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("rouge"),
    params:
        model=lambda w, input: parent(input.model),
        data=lambda w, input: parent(input.data),
        settings=section(STUDY.summaries, "backbones"),
        removed=lambda w: flags({"removed": STUDY.depths(RUNS[w.routed])}),
    shell:
        "python -m buddy rouge --run {params.model:q} --data {params.data:q} {params.removed} {params.settings} "
        "--out {output:q} > {log:q} 2>&1"
