# A result that there is not, such as `snakemake tabel2` or `table99`, is refused with the list of those that there are.


def no_such_result(wildcards):
    names = [*TABLES_OF_STUDY, *planned_figures.planned(STUDY)]
    raise WorkflowError(str(unknown("result", wildcards.misnamed, names)))


localrules:
    misnamed,


rule misnamed:
    input:
        no_such_result,
    output:
        "{misnamed}",
    wildcard_constraints:
        misnamed="[tf][a-z]{1,9}[_-]?[0-9]{1,3}",
