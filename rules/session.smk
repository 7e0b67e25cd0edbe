# One call of Snakemake on one study: what it checks before its first job, and what it says of jobs that failed. Jobs on a
# cluster read this file, too, and refuse a study that was edited since they were submitted.
import logging

from snakemake.logging import logger
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent

from buddy import warm
from buddy.storage.digests import differences, digest
from buddy.study import preflight, progress, provenance, sessions
from buddy.study.failures import Failure, summary
from buddy.study.progress_line import ProgressLine, is_no_progress

FROZEN = "BUDDY_STUDY"  # digest of the study that jobs were submitted with, in their environment
THIS_STUDY = digest(STUDY.model_dump(mode="json"))


def refuse_another_study():
    """End a job that finds another study than the one it was submitted with."""
    if os.environ.get(FROZEN, THIS_STUDY) == THIS_STUDY:
        return
    try:
        before = json.loads(Path(f"{RESULTS}/study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    changed = "; ".join(differences(before, STUDY.model_dump(mode="json"))) or "it has changed more than once"
    raise WorkflowError(
        f"buddy: {ORIGIN}: the study was edited after this job was submitted ({changed}). "
        "Put it back, or stop Snakemake (Ctrl-C) and start it again."
    )


def begin_session():
    """Note this call, remove the locks of a killed one, and mark what has to be made again."""
    session = sessions.begin(STUDY.study.name)
    alive = [str(other.process) for other in sessions.others(session) if other.process.alive]
    if alive:
        logger.warning(f"Study {STUDY.study.name} is at work already: {'; '.join(alive)}.")
    for lock in sessions.stale_locks(session, Path(RESULTS)):
        lock.unlink(missing_ok=True)
        logger.warning(f"Removed {lock}: its Snakemake is gone.")
    if MEASURES and not alive:
        for output, problem in progress.damaged(STUDY, Path(RESULTS)):
            sessions.mark_incomplete(output)
            logger.warning(f"{output}: {problem}: made again.")
        jobs = results.of_study(JOBS)
        for output, run in provenance.recover(jobs).items():
            logger.info(f"{output}: taken from {run}, which was trained before its gates had a training of their own.")
        kept = provenance.keep(jobs, COMMAND)
        if kept:
            logger.info(
                f"{len(kept)} outputs stand: the rules are written anew, the commands that made them are the same."
            )
    os.environ[FROZEN] = THIS_STUDY
    return session


if workflow.is_main_process:
    SESSION = begin_session()
else:
    refuse_another_study()


def start():
    """Before the first job: refuse what would go wrong hours from now."""
    global SESSION
    problem = sessions.leftovers(SESSION, Path(RESULTS))
    if problem:
        raise WorkflowError(problem)
    run_name = getattr(getattr(workflow.scheduler, "_executor", None), "run_uuid", "")
    if run_name:
        SESSION = sessions.submits(SESSION, run_name)
        preflight_jobs()
    if workflow.local_exec and not workflow.deployment_settings.deployment_method:
        with_model = [job for job in workflow.dag.needrun_jobs() if job.resources.get("gpu")]
        if len(with_model) > 1:
            warm.start()


def preflight_jobs():
    """Hold the cluster's limits against what the jobs of this call ask for."""
    asked = [
        preflight.Asked(
            name=job.rule.name,
            minutes=int(job.resources.get("runtime") or 0),
            partition=str(job.resources.get("slurm_partition") or ""),
            account=str(job.resources.get("slurm_account") or ""),
            gpus=int(job.resources.get("gpu") or 0),
            gpu_model=str(job.resources.get("gpu_model") or ""),
        )
        for job in workflow.dag.needrun_jobs()
        if not job.is_local
    ]
    found = preflight.check(asked, workflow.nodes, workflow.executor_settings.status_command, Path(RESULTS))
    MINUTES_AT_MOST.update(found.minutes_at_most)
    for line in found.warnings:
        logger.warning(line)
    if found.errors:
        raise WorkflowError("\n".join(found.errors))


def planned_outputs():
    """All that the study's jobs make, records file by file or folder by folder: what is gone is made again."""
    return [f"{RESULTS}/{output}" for output in progress.outputs(STUDY)] if MEASURES else []


class Failures(logging.Handler):
    """Keeps the last error of each job until the job succeeds after all."""

    def __init__(self):
        super().__init__()
        self.by_job = {}

    def emit(self, record):
        try:
            self.note(record)
        except Exception:  # an error here must not end the thread that logs
            self.handleError(record)

    def note(self, record):
        event = getattr(record, "event", None)
        if event == LogEvent.JOB_FINISHED:
            self.by_job.pop(getattr(record, "job_id", None), None)
        if event != LogEvent.JOB_ERROR:
            return
        makes = [str(file) for file in record.output]
        failure = Failure(record.rule_name, ", ".join(makes), tuple(map(Path, record.log)), alone(makes))
        self.by_job[record.jobid] = failure
        if failure.by_mistake:
            self.give_up(record.jobid)

    def found(self):
        """The last failure of each job that has not succeeded after all."""
        return list(self.by_job.values())

    def give_up(self, number):
        """No other try for a job that failed by a mistake of the user's."""
        for job in list(workflow.scheduler.running):
            if workflow.dag.jobid(job) == number:
                # Not its setter, which forgets the resources that the scheduler is about to take back.
                job._attempt = job.restart_times + 1


def alone(makes):
    """The command that makes one thing as this call would."""
    words = ["snakemake", *makes[:1]]
    words += ["--profile", *PROFILE] if PROFILE else ["--cores", "1"]
    return shlex.join([*words, *(["--configfile", *CONFIGFILES] if CONFIGFILES else [])])


# The profile that this call was given, for the command above: --profile NAME or --profile=NAME.
PROFILE = [
    word.partition("=")[2] or following
    for word, following in zip(sys.argv, [*sys.argv[1:], ""])
    if word.split("=")[0] == "--profile"
]

FAILURES = Failures()
if workflow.is_main_process:
    logger.addHandler(FAILURES)
    # Who asks for silence about rules (--quiet rules) gets one line for all of them.
    if Quietness.RULES in (workflow.output_settings.quiet or ()) and not workflow.dryrun:
        for handler in logger.handlers:
            if handler.name == "DefaultStreamHandler":
                handler.addFilter(is_no_progress)
        logger.addHandler(ProgressLine(STUDY.study.name))
