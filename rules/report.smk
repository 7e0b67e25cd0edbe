# Tables and figures, from records alone: no GPU, no model, no network. `snakemake --report results/NAME/report.html`
# puts them on one page that needs no other file.


report: "../workflow/report/workflow.rst"


# Asked by that page when it is made.
config["first_picture"] = lambda: results.first_picture(RESULTS)


# What `all` builds: all that the study measures, or of records given what they can show.
TABLES = [name for name in TABLES_OF_STUDY if table_records(name)]
# What `compare` reads: the paper has no likelihoods, and their own table compares them.
COMPARED = [name for name, table in TABLES_OF_STUDY.items() if table.kind != "likelihood"]
FIGURES = [name for name in planned_figures.planned(STUDY) if figure_records(name)]


localrules:
    compare,


rule table:
    input:
        lambda w: table_records(w.table),
    output:
        [f"{RESULTS}/tables/{{table}}.{kind}" for kind in ("csv", "md", "tex")],
        report(
            f"{RESULTS}/tables/{{table}}.html",
            caption="../workflow/report/table.rst",
            category=lambda w: results.SECTION_OF[TABLES_OF_STUDY[w.table].kind],
            labels=lambda w: results.table_labels(JOBS, w.table),
        ),
    log:
        f"{RESULTS}/logs/table/{{table}}.log",
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=2000,
        runtime=15,
    params:
        study=STUDY.study.name,
        settings=lambda w: results.table_settings(JOBS, w.table, RECORDS),
        reads=reads_flags,
    shell:
        "python -m buddy report --results results --study {params.study:q} --table {wildcards.table:q} --track {params.reads} "
        "> {log:q} 2>&1"


rule figure:
    input:
        lambda w: figure_records(w.figure),
    output:
        f"{RESULTS}/figures/{{figure}}.pdf",
        report(
            f"{RESULTS}/figures/{{figure}}.png",
            caption="../workflow/report/figure.rst",
            category=lambda w: results.SECTION_OF[w.figure],
            labels=lambda w: results.figure_labels(JOBS, w.figure),
        ),
    log:
        f"{RESULTS}/logs/figure/{{figure}}.log",
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=2000,
        runtime=15,
    params:
        study=STUDY.study.name,
        settings=lambda w: results.figure_settings(JOBS, w.figure),
        reads=reads_flags,
    shell:
        "python -m buddy report --results results --study {params.study:q} --figure {wildcards.figure:q} --track {params.reads} "
        "> {log:q} 2>&1"


# `snakemake table2` and so on: the paper's names as targets, for those that the study measures.
for _name in TABLES_OF_STUDY:

    rule:
        name:
            _name
        input:
            table_files(_name),


# `snakemake figure4` and so on, for any study: what it does not measure is a panel with the reason.
for _name in planned_figures.NAMES:
    if _name.startswith("figure"):

        rule:
            name:
                _name
            input:
                figure_files(_name),


rule compare:
    input:
        [file for name in COMPARED for file in table_records(name)],
        [file for file in dense_records() if not any(file in table_records(name) for name in COMPARED)],
    output:
        [f"{RESULTS}/tables/{name}.{kind}" for name in ("compare", "significance") for kind in ("csv", "md", "tex")],
    log:
        f"{RESULTS}/logs/compare.log",
    conda:
        "../envs/buddy.yaml"
    resources:
        mem_mb=2000,
        runtime=15,
    params:
        study=STUDY.study.name,
        tables=[TABLES_OF_STUDY[name].model_dump() for name in COMPARED],
        removed={backbone: STUDY.removed(backbone) for backbone in STUDY.study.backbones},
        reads=reads,
    shell:
        "python -m buddy report --results results --study {params.study:q} --compare --track {params.reads} > {log:q} 2>&1"
