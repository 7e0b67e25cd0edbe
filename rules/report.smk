# Tables and figures, from records alone: no GPU, no model, no network.

FIGURES = ["accuracy_vs_budget"] + (["latency"] if STUDY.timed_backbones() else [])


def table_files(name):
    return [f"{RESULTS}/tables/{name}.{kind}" for kind in ("csv", "md", "tex")]


def figure_files(name):
    return [f"{RESULTS}/figures/{name}.{kind}" for kind in ("pdf", "png")]


def table_records(name):
    """The records that a table shows."""
    table = STUDY.study.tables[name]
    if table.kind == "ablation":
        return accuracy_records(STUDY.ablation_runs(STUDY.ablation(table.ablation)))
    if table.kind == "latency":
        return latency_records(table.backbone)
    return accuracy_records(main_runs(table.backbone))


def figure_records(name):
    """The records that a figure shows."""
    if name == "latency":
        return [folder for backbone in STUDY.timed_backbones() for folder in latency_records(backbone)]
    return accuracy_records([run for backbone in STUDY.study.backbones for run in main_runs(backbone)])


def table_settings(wildcards):
    """What the study says of a table: its entry, and the budgets and runs behind its rows and columns."""
    table = STUDY.study.tables[wildcards.table]
    backbone = table.backbone or STUDY.ablation(table.ablation).backbone
    return {"table": table.model_dump(), "removed": STUDY.removed(backbone), "records": table_records(wildcards.table)}


rule table:
    input:
        records=lambda w: table_records(w.table),
        study=ancient(rules.study.output),
    output:
        [f"{RESULTS}/tables/{{table}}.{kind}" for kind in ("csv", "md", "tex")],
    log:
        f"{RESULTS}/logs/table/{{table}}.log",
    params:
        study=RESULTS,
        settings=table_settings,
    resources:
        mem_mb=2000,
        runtime=15,
    conda:
        "../envs/buddy.yaml"
    shell:
        "{BUDDY} report --study {params.study} --table {wildcards.table} > {log} 2>&1"


rule figure:
    input:
        records=lambda w: figure_records(w.figure),
        study=ancient(rules.study.output),
    output:
        [f"{RESULTS}/figures/{{figure}}.{kind}" for kind in ("pdf", "png")],
    log:
        f"{RESULTS}/logs/figure/{{figure}}.log",
    params:
        study=RESULTS,
        removed=lambda w: {backbone: STUDY.removed(backbone) for backbone in STUDY.study.backbones},
    resources:
        mem_mb=2000,
        runtime=15,
    conda:
        "../envs/buddy.yaml"
    shell:
        "{BUDDY} report --study {params.study} --figure {wildcards.figure} > {log} 2>&1"


# `snakemake table2` and so on: the paper's names as targets, for those that the study measures.
for _name in STUDY.measured_tables():

    rule:
        name:
            _name
        input:
            table_files(_name),
