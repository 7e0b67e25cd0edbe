# Accuracy: one job per run, all its budgets and tasks in it, so that the backbone is loaded once.


rule evaluate:
    input:
        model=lambda w: model_file(RUNS[w.run]),
        data=[f"{RESULTS}/data/{task}/data.json" for task in STUDY.evaluation.tasks],
    output:
        directory(f"{RESULTS}/records/accuracy/{{run}}"),
    log:
        f"{RESULTS}/logs/evaluate/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate/{{run}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("evaluate"),
    params:
        model=lambda w, input: parent(input.model),
        data=lambda w, input: parent(parent(input.data[0])),
        settings=lambda w: model_flags(w, STUDY.evaluation),
        removed=depths_flag,
    shell:
        "python -m buddy evaluate --run {params.model:q} --data {params.data:q} --removed {params.removed:q} {params.settings} "
        "--out {output:q} > {log:q} 2>&1"
