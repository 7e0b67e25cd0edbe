# The budget predictor: trained on a finished run, which it leaves as it is, and held against every constant budget.


rule predictor:
    input:
        run=f"{RESULTS}/runs/{{routed}}/run.json",
        data=predictor_data,
    output:
        run=f"{RESULTS}/predictors/{{routed}}/preset~{{preset}}/run.json",
        record=f"{RESULTS}/records/training/{{routed}}/preset~{{preset}}.json",
    log:
        f"{RESULTS}/logs/predictor/{{routed}}/preset~{{preset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/predictor/{{routed}}/preset~{{preset}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("predictor"),
    params:
        run=lambda w, input: parent(input.run),
        data=lambda w, input: folders_flag(input.data),
        settings=predictor_flags,
        folder=lambda w, output: parent(output.run),
    shell:
        "python -m buddy predictor --run {params.run:q} {params.data} --preset {wildcards.preset:q} {params.settings} "
        "--out {params.folder:q} --record {output.record:q} > {log:q} 2>&1"


rule evaluate_auto:
    input:
        run=f"{RESULTS}/predictors/{{routed}}/preset~{{preset}}/run.json",
        data=[f"{RESULTS}/data/{task}/data.json" for task in STUDY.predictor.tasks],
    output:
        f"{RESULTS}/records/predicted/{{routed}}/preset~{{preset}}/auto.json",
    log:
        f"{RESULTS}/logs/evaluate_auto/{{routed}}/preset~{{preset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate_auto/{{routed}}/preset~{{preset}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("evaluate_auto"),
    params:
        run=lambda w, input: parent(input.run),
        data=lambda w, input: parent(parent(input.data[0])),
        tasks=",".join(STUDY.predictor.tasks),
        settings=section(STUDY.evaluation, "tasks"),
        folder=lambda w, output: parent(output[0]),
    shell:
        "python -m buddy evaluate --run {params.run:q} --data {params.data:q} --budget auto --tasks {params.tasks:q} "
        "{params.settings} --out {params.folder:q} > {log:q} 2>&1"


rule budget_eval:
    input:
        run=f"{RESULTS}/predictors/{{routed}}/preset~{{preset}}/run.json",
        data=[f"{RESULTS}/data/{name}/data.json" for name in STUDY.predictor.datasets],
    output:
        [f"{RESULTS}/records/budget/{{routed}}/preset~{{preset}}/dataset~{name}.json" for name in HELD_OUT],
    log:
        f"{RESULTS}/logs/budget_eval/{{routed}}/preset~{{preset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/budget_eval/{{routed}}/preset~{{preset}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("budget_eval"),
    params:
        run=lambda w, input: parent(input.run),
        data=lambda w, input: folders_flag(input.data),
        settings=section_of(STUDY.predictor, "max_length", "table_batch", "limit"),
        folder=lambda w, output: parent(output[0]),
    shell:
        "python -m buddy budget-eval --run {params.run:q} {params.data} {params.settings} --out {params.folder:q} > {log:q} 2>&1"
