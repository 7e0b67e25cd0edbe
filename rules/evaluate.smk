# Accuracy: one job per run, all its budgets and tasks in it, so that the backbone is loaded once.


def model_flags(wildcards):
    """Which study and backbone it is; a dense model has no run folder that could say so, and skips no block."""
    run = RUNS[wildcards.run]
    if run.method == "dense":
        return section(STUDY.evaluation, "kv") + " " + flags({"study": STUDY.study.name, "name": run.backbone})
    return section(STUDY.evaluation)


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
    params:
        model=lambda w: folder_of(RUNS[w.run]),
        data=f"{RESULTS}/data",
        settings=model_flags,
        removed=lambda w: ",".join(map(str, depths_of(RUNS[w.run]))),
    retries: 2
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes(0.5),
    conda:
        "../envs/buddy.yaml"
    shell:
        "{BUDDY} evaluate --run {params.model} --data {params.data} --removed {params.removed} {params.settings} "
        "--out {output} > {log} 2>&1"
