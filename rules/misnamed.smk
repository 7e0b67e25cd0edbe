# A result that there is not, such as `snakemake tabel2` or `table99`, is refused with the list of those that there are.


localrules:
    misnamed,


rule misnamed:
    input:
        no_such_result,
    output:
        "{misnamed}",
    wildcard_constraints:
        misnamed="[tf][a-z]{1,9}[_-]?[0-9]{1,3}",
