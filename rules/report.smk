# Tables and figures, from records alone: no GPU, no model, no network.

# What `all` builds: all that the study measures, or of records given what they can show.
TABLES = [name for name in STUDY.measured_tables() if table_records(name)]
FIGURES = [name for name in ("accuracy_vs_budget", "latency") if figure_records(name)]


rule table:
    input:
        lambda w: table_records(w.table),
    output:
        [f"{RESULTS}/tables/{{table}}.{kind}" for kind in ("csv", "md", "tex")],
    log:
        f"{RESULTS}/logs/table/{{table}}.log",
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=2000,
        runtime=15,
    params:
        study=STUDY.study.name,
        settings=table_settings,
    shell:
        "python -m buddy report --results results --study {params.study} --table {wildcards.table} --track > {log} 2>&1"


rule figure:
    input:
        lambda w: figure_records(w.figure),
    output:
        [f"{RESULTS}/figures/{{figure}}.{kind}" for kind in ("pdf", "png")],
    log:
        f"{RESULTS}/logs/figure/{{figure}}.log",
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=2000,
        runtime=15,
    params:
        study=STUDY.study.name,
        settings=figure_settings,
    shell:
        "python -m buddy report --results results --study {params.study} --figure {wildcards.figure} --track > {log} 2>&1"


# `snakemake table2` and so on: the paper's names as targets, for those that the study measures.
for _name in STUDY.measured_tables():

    rule:
        name:
            _name
        input:
            table_files(_name),
