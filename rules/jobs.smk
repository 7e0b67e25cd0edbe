# Every job behind the tables: a rule for each stage of buddy.study.jobs, where stands what a job reads, makes and is told.
from buddy.study.jobs import STAGES

# Stages that load no model fetch from the network, where Snakemake runs; all other jobs keep away from the Hub.
FETCHED = [stage for stage in STAGES.values() if stage.command != "report" and not stage.cost]
ON_A_MODEL = [stage for stage in STAGES.values() if stage.cost and stage.patterns(STUDY)]


def job(stage, wildcards):
    """The job of these wildcards."""
    return JOBS(stage.name, **dict(wildcards.items()))


def reads(stage):
    return lambda wildcards: job(stage, wildcards).inputs()


def makes(stage):
    paths = [f"{RESULTS}/{pattern}" for pattern in stage.patterns(STUDY)]
    return [directory(path) for path in paths] if stage.folder else paths


def place(stage):
    """Where the logs and benchmarks of a stage are, below the folder of either, without ending."""
    return f"{stage.name}/{stage.place}" if stage.place else stage.name


def told(stage):
    return lambda wildcards: job(stage, wildcards).shell()


def memory(stage):
    """Host memory of a job in MB: for the backbone that it loads, more at each retry."""

    def of_attempt(wildcards, attempt):
        return ESTIMATES.host_mb(job(stage, wildcards), attempt)

    return of_attempt


MINUTES_AT_MOST = {}  # by rule, once the session has asked the cluster: a retry gets no more than its partition grants


def minutes(stage):
    """Time limit of a job: some times what it should take, more at each retry."""

    def of_attempt(wildcards, attempt):
        return ESTIMATES.minutes(job(stage, wildcards), attempt, MINUTES_AT_MOST.get(stage.name))

    return of_attempt


COMMAND = "{params.command} > {log:q} 2>&1"


for _stage in FETCHED:

    rule:
        name:
            _stage.name
        output:
            makes(_stage),
        log:
            f"{RESULTS}/logs/{place(_stage)}.log",
        retries: _stage.retries
        conda:
            "../envs/buddy.yaml"
        resources:
            mem_mb=memory(_stage),
            runtime=_stage.minutes,
        params:
            command=told(_stage),
        shell:
            COMMAND


for _stage in ON_A_MODEL:

    rule:
        name:
            _stage.name
        input:
            unpack(reads(_stage)),
        output:
            makes(_stage),
        log:
            f"{RESULTS}/logs/{place(_stage)}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{place(_stage)}.tsv"
        retries: _stage.retries
        conda:
            "../envs/buddy.yaml"
        threads: 4
        resources:
            gpu=1,
            mem_mb=memory(_stage),
            runtime=minutes(_stage),
        params:
            command=told(_stage),
        shell:
            COMMAND
