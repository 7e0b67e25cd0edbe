# Likelihoods: held-out text scored under every run, all its depths, K/V policies and decode modes in one job, so that the
# whole model takes each item once.


rule score:
    input:
        model=lambda w: model_file(RUNS[w.run]),
        data=[f"{RESULTS}/data/{name}/data.json" for name in STUDY.likelihood.datasets],
    output:
        directory(f"{RESULTS}/records/likelihood/{{run}}"),
    log:
        f"{RESULTS}/logs/score/{{run}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/score/{{run}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("score"),
    params:
        model=lambda w, input: parent(input.model),
        data=lambda w, input: folders_flag(input.data),
        settings=score_flags,
        removed=depths_flag,
    shell:
        "python -m buddy score --run {params.model:q} {params.data} --removed {params.removed:q} {params.settings} "
        "--out {output:q} > {log:q} 2>&1"
