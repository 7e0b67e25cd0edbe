"""The steps behind a study's tables as plain commands, for a machine without Snakemake: what rules/ wires, in order.

    python benchmarks/steps.py config.yaml benchmarks/smollm2.yaml --out results/smollm2-gpu [--tables latency]

prints one line per step that is still to be done, title and command separated by a tab. Steps whose files are in
``--out`` are left out, so a list that was cut short is made again and goes on. Needs no torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buddy.study import config
from buddy.study.config import Config, Run
from buddy.study.settings import Table


@dataclass
class Step:
    """One command, and the files that say it is done."""

    title: str
    command: str
    flags: dict[str, Any]
    outputs: list[Path] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every file is there: commands write theirs whole or not at all."""
        return all(path.exists() for path in self.outputs)

    def line(self) -> str:
        """Title and shell command."""
        return f"{self.title}\t{shlex.quote(sys.executable)} -m buddy {self.command} {flags(self.flags)}"


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as options, as the rules write them: {"batch_size": 8} is --batch-size 8; None is left to the default."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words.append(f"--{option} {shlex.quote(text)}")
    return " ".join(words)


@dataclass
class Plan:
    """The steps of a study in a folder.

    Args:
        study: the study.
        out: its folder, laid out as ``results/{study}``.
        kinds: kinds of tables to measure for (accuracy, latency, breakdown, ablation).
    """

    study: Config
    out: Path
    kinds: Sequence[str]

    def steps(self) -> Iterator[Step]:
        """Every step, done or not; what a step reads comes before it, the main variant before the ablations."""
        scored, timed, profiled = self._scored(), self._timed("latency"), self._timed("breakdown")
        runs = [run for run in self.study.runs() if run in {*scored, *timed, *profiled}]
        yield from (self._backbone(name) for name in dict.fromkeys(run.backbone for run in runs))
        yield from (self._data(name) for name in self._data_sets(runs, scored, timed, profiled))
        for run in runs:
            if run.method == "buddy":
                if run.variant["prior"] != "none":
                    yield self._importance(run)
                yield self._train(run)
            if run in timed:
                yield from (self._latency(run, name) for name in self.study.latency.datasets)
            if run in profiled:
                yield self._breakdown(run)
            if run in scored:
                yield self._evaluate(run)

    def _tables(self, kind: str) -> list[Table]:
        tables = self.study.measured_tables().values()
        return [table for table in tables if table.kind == kind and kind in self.kinds]

    def _scored(self) -> set[Run]:
        """Runs that accuracy and ablation tables show."""
        found: set[Run] = set()
        for table in self._tables("accuracy"):
            seeds = self.study.study.seeds
            main = {self._main(table.backbone, seed) for seed in seeds}
            found |= {
                run
                for run in self.study.runs()
                if run in main or (run.backbone == table.backbone and run.method == "dense")
            }
        for table in self._tables("ablation"):
            found |= set(self.study.ablation_runs(self.study.ablation(str(table.ablation))))
        return found

    def _timed(self, kind: str) -> set[Run]:
        """The main variant, first seed, of each backbone of a latency or breakdown table."""
        return {self._main(table.backbone, self.study.study.seeds[0]) for table in self._tables(kind)}

    def _main(self, backbone: str | None, seed: int) -> Run:
        return self.study.buddy_run(str(backbone), self.study.study.main.model_dump(), seed)

    def _data_sets(self, runs: list[Run], scored: set[Run], timed: set[Run], profiled: set[Run]) -> list[str]:
        study = self.study
        names: list[str] = []
        if any(run.method == "buddy" for run in runs):
            names.append(study.training.data)
        if any(run.variant.get("prior", "none") != "none" for run in runs):
            names.append(study.importance.corpus)
        if timed:
            names += study.latency.datasets
        if profiled:
            names.append(min(study.latency.datasets))
        if scored:
            names += study.evaluation.tasks
        return list(dict.fromkeys(names))

    def _backbone(self, name: str) -> Step:
        backbone = self.study.backbones[name]
        folder = self.out / "backbones" / name
        options = {**backbone.source.model_dump(), "blocks": backbone.blocks, "dtype": backbone.dtype, "out": folder}
        return Step(f"backbone {name}", "backbone", options, [folder / "backbone.json"])

    def _data(self, name: str) -> Step:
        folder = self.out / "data" / name
        options = {"name": name, "source": self.study.data.source, "out": folder}
        return Step(f"data {name}", "data", options, [folder / "data.json"])

    def _prior(self, run: Run) -> Path | None:
        prior = run.variant["prior"]
        folder = self.out / "records" / "importance" / f"backbone~{run.backbone}"
        return None if prior == "none" else folder / f"indicator~{prior}.json"

    def _importance(self, run: Run) -> Step:
        record = self._prior(run)
        assert record is not None
        options = {
            "backbone": self.out / "backbones" / run.backbone,
            "corpus": self.out / "data" / self.study.importance.corpus,
            "indicator": run.variant["prior"],
            **self.study.importance.model_dump(exclude={"corpus"}),
            "study": self.study.study.name,
            "out": record,
        }
        return Step(f"importance {run.backbone} {run.variant['prior']}", "importance", options, [record])

    def _train(self, run: Run) -> Step:
        folder, record = self._run_folder(run), self.out / "records" / "training" / f"{run.path}.json"
        options = {
            "backbone": self.out / "backbones" / run.backbone,
            "data": self.out / "data" / self.study.training.data,
            "prior": self._prior(run),
            **self.study.training_options(run),
            "most_removed": max(self.study.removed(run.backbone)),
            "study": self.study.study.name,
            "out": folder,
            "record": record,
        }
        return Step(f"train {run.path}", "train", options, [folder / "run.json", record])

    def _evaluate(self, run: Run) -> Step:
        """One job per run, for the depths that lack a record."""
        dense = run.method == "dense"
        folder = self.out / "records" / "accuracy" / run.path
        depths = [0] if dense else self.study.removed(run.backbone)
        missing = [depth for depth in depths if not (folder / f"removed~{depth}.json").exists()]
        options = {
            "run": self.out / "backbones" / run.backbone if dense else self._run_folder(run),
            "data": self.out / "data",
            "removed": missing,
            **self.study.evaluation.model_dump(exclude={"kv"} if dense else set()),
            **({"study": self.study.study.name, "name": run.backbone} if dense else {}),
            "out": folder,
        }
        return Step(
            f"evaluate {run.path}", "evaluate", options, [folder / f"removed~{depth}.json" for depth in missing]
        )

    def _latency(self, run: Run, dataset: str) -> Step:
        """One job per data set: what is compared is timed in one process, so all of it again if a part is missing."""
        folder = self.out / "records" / "latency" / run.path / f"dataset~{dataset}"
        removed = self.study.removed(run.backbone)
        options = {
            "run": self._run_folder(run),
            "data": self.out / "data" / dataset,
            "removed": removed,
            **self.study.latency.model_dump(exclude={"backbones", "methods", "datasets"}),
            "out": folder,
        }
        outputs = [folder / record for record in self._latency_records(removed)]
        return Step(f"latency {run.backbone} {dataset}", "latency", options, outputs)

    def _latency_records(self, removed: list[int]) -> Iterator[Path]:
        """Records of one data set that any machine leaves: without a GPU the engine graph is left out."""
        settings = self.study.latency
        engine = "eager" if "eager" in settings.engines else "graph"
        depths: dict[str, list[Any]] = {"dense": [0], "full": [0], "mixed": ["mixed"], "nested": ["mixed"]}
        for batch in settings.batch_sizes:
            for name in dict.fromkeys(["dense", *settings.executions]):
                if batch == 1 and name in ("mixed", "nested"):
                    continue
                bounds = [f"slack~{slack}" for slack in settings.slack] if name == "varied" and batch > 1 else []
                for bound in ["", *bounds]:
                    folder = Path(f"batch~{batch}", f"engine~{engine}", f"execution~{name}", bound)
                    yield from (folder / f"removed~{depth}.json" for depth in depths.get(name, removed))

    def _breakdown(self, run: Run) -> Step:
        folder, removed = self.out / "records" / "breakdown" / run.path, self.study.removed(run.backbone)
        options = {
            "run": self._run_folder(run),
            "data": self.out / "data" / min(self.study.latency.datasets),
            "removed": removed,
            **self.study.breakdown.model_dump(exclude={"backbones"}),
            "out": folder,
        }
        outputs = [folder / f"removed~{count}.json" for count in removed]
        return Step(f"breakdown {run.backbone}", "breakdown", options, outputs)

    def _run_folder(self, run: Run) -> Path:
        return self.out / "runs" / run.path


def main() -> None:
    """Print the steps that are still to be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="study file and overlays")
    parser.add_argument("--out", required=True, type=Path, help="the study's folder")
    parser.add_argument(
        "--tables", default="accuracy,latency,breakdown,ablation", help="kinds of tables to measure for"
    )
    arguments = parser.parse_args()
    plan = Plan(config.read(*arguments.files), arguments.out, arguments.tables.split(","))
    seen: set[str] = set()
    for step in plan.steps():
        line = step.line()
        if not step.done and line not in seen:  # runs share their priors
            seen.add(line)
            print(line)


if __name__ == "__main__":
    main()
