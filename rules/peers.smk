# The peers: which blocks a static method removes (once per backbone, for all depths), and a run per method and depth.


rule calibrate:
    input:
        backbone=f"{RESULTS}/backbones/{{backbone}}/backbone.json",
        corpus=lambda w: corpus_input(STUDY.peers.corpus),
    output:
        f"{RESULTS}/records/calibration/backbone~{{backbone}}/method~{{static_peer}}/criterion~{{criterion}}.json",
    log:
        f"{RESULTS}/logs/calibrate/backbone~{{backbone}}/method~{{static_peer}}/criterion~{{criterion}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/calibrate/backbone~{{backbone}}/method~{{static_peer}}/criterion~{{criterion}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("calibrate"),
    params:
        backbone=lambda w, input: parent(input.backbone),
        corpus=corpus_path,
        settings=section(STUDY.peers, "corpus", "criteria", "protect"),
        protect=protected,
        removed=lambda w: max(STUDY.removed(w.backbone)),
        study=STUDY.study.name,
    shell:
        "python -m buddy calibrate --backbone {params.backbone:q} --corpus {params.corpus:q} --method {wildcards.static_peer:q} "
        "--criterion {wildcards.criterion:q} --removed {params.removed:q} {params.protect} {params.settings} "
        "--study {params.study:q} --out {output:q} > {log:q} 2>&1"


rule pool:
    input:
        backbone=f"{RESULTS}/backbones/{{backbone}}/backbone.json",
        tasks=[f"{RESULTS}/data/{task}/data.json" for task in STUDY.pudding.tasks],
    output:
        f"{RESULTS}/records/calibration/backbone~{{backbone}}/method~pudding.json",
    log:
        f"{RESULTS}/logs/pool/backbone~{{backbone}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pool/backbone~{{backbone}}.tsv"
    retries: 1
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("pool"),
    params:
        backbone=lambda w, input: parent(input.backbone),
        tasks=lambda w, input: parent(parent(input.tasks[0])),
        settings=flags({name: getattr(STUDY.pudding, name) for name in ("tasks", "criteria", "pool_items")}),
        removed=lambda w: max(STUDY.removed(w.backbone)),
        study=STUDY.study.name,
    shell:
        "python -m buddy pool --backbone {params.backbone:q} --data {params.tasks:q} --removed {params.removed:q} "
        "{params.settings} --study {params.study:q} --out {output:q} > {log:q} 2>&1"


rule adapt:
    input:
        backbone=lambda w: f"{RESULTS}/backbones/{RUNS[w.peer].backbone}/backbone.json",
        data=training_data,
        calibration=calibration_record,
        tasks=router_tasks,
        encoder=router_encoder,
    output:
        run=f"{RESULTS}/runs/{{peer}}/run.json",
        record=f"{RESULTS}/records/training/{{peer}}.json",
    log:
        f"{RESULTS}/logs/adapt/{{peer}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/adapt/{{peer}}.tsv"
    retries: 2
    conda:
        "../envs/buddy.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=mem_mb,
        runtime=minutes("adapt"),
    params:
        backbone=lambda w, input: parent(input.backbone),
        data=lambda w, input: parent(input.data),
        inputs=peer_inputs,
        axes=peer_flags,
        settings=section(STUDY.training, "data", *NOT_OF_PEERS),
        study=STUDY.study.name,
        folder=lambda w, output: parent(output.run),
    shell:
        "python -m buddy adapt --backbone {params.backbone:q} --data {params.data:q} {params.inputs} {params.axes} "
        "{params.settings} --study {params.study:q} --out {params.folder:q} --record {output.record:q} > {log:q} 2>&1"
