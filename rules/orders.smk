# In which order blocks would be removed: on other corpora (Figures 7 and 8), and at several context lengths (Figure 2).
# What is measured on the study's own corpus, for Figure 1 and for the routers' priors, is rule importance.


rule corpus_orders:
    input:
        backbone=f"{RESULTS}/backbones/{{backbone}}/backbone.json",
        corpus=lambda w: corpus_input(CORPORA[w.corpus]),
    output:
        f"{RESULTS}/records/importance/backbone~{{backbone}}/corpus~{{corpus}}/indicator~{{indicator}}.json",
    log:
        f"{RESULTS}/logs/corpus_orders/backbone~{{backbone}}/corpus~{{corpus}}/indicator~{{indicator}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/corpus_orders/backbone~{{backbone}}/corpus~{{corpus}}/indicator~{{indicator}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("corpus_orders"),
    params:
        backbone=lambda w, input: parent(input.backbone),
        corpus=corpus_path,
        settings=flags({"samples": STUDY.orders.samples, "length": STUDY.importance.length}),
        study=STUDY.study.name,
    shell:
        "python -m buddy importance --backbone {params.backbone:q} --corpus {params.corpus:q} --indicator {wildcards.indicator:q} "
        "{params.settings} --study {params.study:q} --out {output:q} > {log:q} 2>&1"


if STUDY.orders.lengths:

    # One job for all lengths: loading a backbone takes longer than ranking its blocks at one of them.
    rule length_orders:
        input:
            backbone=f"{RESULTS}/backbones/{{backbone}}/backbone.json",
            corpus=lambda w: corpus_input(STUDY.importance.corpus),
        output:
            [
                f"{RESULTS}/records/importance/backbone~{{backbone}}/length~{length}/indicator~{{indicator}}.json"
                for length in STUDY.orders.lengths
            ],
        log:
            f"{RESULTS}/logs/length_orders/backbone~{{backbone}}/indicator~{{indicator}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/length_orders/backbone~{{backbone}}/indicator~{{indicator}}.tsv"
        retries: 1
        conda:
            "../envs/buddy.yaml"
        threads: 4
        resources:
            gpu=1,
            mem_mb=mem_mb,
            runtime=minutes("length_orders"),
        params:
            backbone=lambda w, input: parent(input.backbone),
            corpus=corpus_path,
            settings=flags({"samples": STUDY.orders.samples, "length": STUDY.orders.lengths}),
            study=STUDY.study.name,
            folder=lambda w: f"{RESULTS}/records/importance/backbone~{w.backbone}",
        shell:
            "python -m buddy importance --backbone {params.backbone:q} --corpus {params.corpus:q} --indicator {wildcards.indicator:q} "
            "{params.settings} --study {params.study:q} --out {params.folder:q} > {log:q} 2>&1"
