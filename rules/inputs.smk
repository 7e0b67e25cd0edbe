# What every other job reads: backbones, data sets, block importance.
# Fetching runs where Snakemake runs, which has the network; all other jobs keep away from the Hub.


rule backbone:
    output:
        f"{RESULTS}/backbones/{{backbone}}/backbone.json",
    log:
        f"{RESULTS}/logs/backbone/{{backbone}}.log",
    retries: 1
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=mem_mb,
        runtime=240,
    params:
        source=source_flags,
        blocks=lambda w: STUDY.backbones[w.backbone].blocks,
        dtype=lambda w: STUDY.backbones[w.backbone].dtype,
        study=STUDY.study.name,
        folder=lambda w, output: parent(output[0]),
    shell:
        "python -m buddy backbone {params.source} --blocks {params.blocks:q} --dtype {params.dtype:q} --out {params.folder:q} --study {params.study:q} "
        "> {log:q} 2>&1"


rule data:
    output:
        f"{RESULTS}/data/{{dataset}}/data.json",
    log:
        f"{RESULTS}/logs/data/{{dataset}}.log",
    retries: 1
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        source=lambda w: STUDY.data.source,  # a function: braces in a plain string would be wildcards
        study=STUDY.study.name,
        folder=lambda w, output: parent(output[0]),
    shell:
        "python -m buddy data --name {wildcards.dataset:q} --source {params.source:q} --out {params.folder:q} --study {params.study:q} > {log:q} 2>&1"


rule answers:
    input:
        data=f"{RESULTS}/data/{{dataset}}/data.json",
        backbone=f"{RESULTS}/backbones/{{backbone}}/backbone.json",
    output:
        f"{RESULTS}/data/answered_by~{{backbone}}/{{dataset}}/data.json",
    log:
        f"{RESULTS}/logs/answers/answered_by~{{backbone}}/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/answers/answered_by~{{backbone}}/{{dataset}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("answers"),
    params:
        data=lambda w, input: parent(input.data),
        backbone=lambda w, input: parent(input.backbone),
        settings=section_of(STUDY.data, "new_tokens", "batch_size"),
        examples=section_of(STUDY.training, "examples"),
        study=STUDY.study.name,
        folder=lambda w, output: parent(output[0]),
    shell:
        "python -m buddy data --name {wildcards.dataset:q} --source {params.data:q} --answers-by {params.backbone:q} "
        "{params.settings} {params.examples} --out {params.folder:q} --study {params.study:q} > {log:q} 2>&1"


rule encoder:
    output:
        f"{RESULTS}/encoder/encoder.json",
    log:
        f"{RESULTS}/logs/encoder.log",
    retries: 1
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        source=lambda w: STUDY.pudding.encoder,
        folder=lambda w, output: parent(output[0]),
    shell:
        "python -m buddy encoder --source {params.source:q} --out {params.folder:q} > {log:q} 2>&1"


rule importance:
    input:
        backbone=f"{RESULTS}/backbones/{{backbone}}/backbone.json",
        corpus=lambda w: corpus_input(STUDY.importance.corpus),
    output:
        f"{RESULTS}/records/importance/backbone~{{backbone}}/indicator~{{indicator}}.json",
    log:
        f"{RESULTS}/logs/importance/backbone~{{backbone}}/indicator~{{indicator}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/importance/backbone~{{backbone}}/indicator~{{indicator}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("importance"),
    params:
        backbone=lambda w, input: parent(input.backbone),
        corpus=corpus_path,
        settings=section(STUDY.importance, "corpus"),
        study=STUDY.study.name,
    shell:
        "python -m buddy importance --backbone {params.backbone:q} --corpus {params.corpus:q} --indicator {wildcards.indicator:q} "
        "{params.settings} --study {params.study:q} --out {output:q} > {log:q} 2>&1"
