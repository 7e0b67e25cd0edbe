"""How long a study's jobs take on a device and what they hold there: by arithmetic, corrected by the jobs that ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from buddy.study import devices, progress, shapes, texts
from buddy.study.costs import Demand, Sizes
from buddy.study.devices import Device
from buddy.study.jobs import Job, Jobs

SHORTEST = 15
"""Minutes that every job gets at least: loading a backbone takes some, however small the work."""
ELSEWHERE_S = 60.0
"""A job without a model: fetching, a table, a figure."""


@dataclass(frozen=True)
class Correction:
    """What jobs of a stage took that ran on the device, against what arithmetic says of them."""

    jobs: int
    factor: float


class Estimates:
    """Time and memory of a study's jobs.

    Args:
        jobs: the study's.
        folder: its folder, where data, backbones, records and benchmarks may be.
        device: what they run on.
        among: asked for jobs that may have run and correct the arithmetic; none leaves it as it is.
    """

    def __init__(
        self, jobs: Jobs, folder: Path, device: Device, among: Callable[[], Iterable[Job]] = lambda: ()
    ) -> None:
        self.jobs = jobs
        self.folder = folder
        self.device = device
        self._among = among
        self._shapes: dict[str, shapes.Shape] = {}
        self._texts: dict[str, texts.Text] = {}

    def shape(self, backbone: str) -> shapes.Shape:
        """The shape of one of the study's backbones."""
        if backbone not in self._shapes:
            definition = self.jobs.study.backbones[backbone]
            self._shapes[backbone] = shapes.of_backbone(definition, self.folder / "backbones" / backbone)
        return self._shapes[backbone]

    def text(self, name: str) -> texts.Text:
        """A data set of the study."""
        if name not in self._texts:
            self._texts[name] = texts.text(name, self.jobs.study.data.source, self.folder / "data" / name)
        return self._texts[name]

    def demand(self, job: Job) -> Demand | None:
        """What a job asks of the device; None of one that loads no model."""
        if job.kind.cost is None or job.work.backbone is None:
            return None
        return job.kind.cost(job, Sizes(self.shape(job.work.backbone), self.text))

    def seconds(self, job: Job) -> float:
        """Time that a job takes, as far as is known."""
        correction = self.corrections.get(job.stage)
        return self._counted(job) * (correction.factor if correction else 1.0)

    def _counted(self, job: Job) -> float:
        demand = self.demand(job)
        return ELSEWHERE_S if demand is None else demand.seconds(self.device)

    def minutes(self, job: Job, attempt: int = 1, at_most: int | None = None) -> int:
        """Time limit of a job: what it takes times ``limits.safety``, or what its backbone's ``hours`` say.

        Args:
            job: it.
            attempt: 1 for the first try; the second gets twice the time, the third three times.
            at_most: the limit of the partition for a retry; the first try asks for what it needs.
        """
        study = self.jobs.study
        hours = study.backbones[job.work.backbone].hours if job.work.backbone else None
        needed = 60 * hours if hours is not None else self.seconds(job) * study.limits.safety / 60
        wanted = max(SHORTEST, math.ceil(needed)) * attempt
        return wanted if at_most is None or attempt == 1 else min(wanted, at_most)

    def host_mb(self, job: Job, attempt: int = 1) -> int:
        """Host memory of a job, half as much more at each retry; or what its backbone's ``mem_gb`` says."""
        demand = self.demand(job)
        if demand is None:
            return 4000
        given = self.jobs.study.backbones[str(job.work.backbone)].mem_gb
        first = 1000 * given if given is not None else demand.host(self.device) / 1e6
        return math.ceil(first * (1 + 0.5 * (attempt - 1)))

    @cached_property
    def corrections(self) -> dict[str, Correction]:
        """By stage what its jobs took that ran on this device: their benchmarks, else their records."""
        found: dict[str, list[tuple[float, float]]] = {}
        for job in self._among():
            if job.kind.cost is None or not all((self.folder / output).exists() for output in job.outputs):
                continue
            ran = devices.named(progress.ran_on(job, self.folder))
            hours, _ = progress.spent(job, self.folder)
            if ran is not None and ran.name == self.device.name and hours > 0:
                found.setdefault(job.stage, []).append((3600 * hours, self._counted(job)))
        return {
            stage: Correction(len(pairs), sum(took for took, _ in pairs) / sum(counted for _, counted in pairs))
            for stage, pairs in found.items()
        }
