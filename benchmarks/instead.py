"""What a user would pick instead: this engine beside what people use, in one run, on the same prompts.

    python benchmarks/instead.py RUN --data results/demo/data/alpaca --out OUT [--gguf FILE] [--prompts 4] [--repeats 5]

One sequence at a time, greedy, as many new tokens for everyone. Each row is a process of its own, so that its memory is
its own; all of them are loaded first, and then they take turns, one pass over the prompts each, in an order that rotates.
A row whose package is not installed, or that does not run here, says why and is "not measured".

OUT/ROW.json has a row's passes, written after each: run the same again, and what is there is kept. OUT/instead.md and
OUT/instead.json are the table: tokens/s (median over passes, the prompt's time included), the most memory of the process
while it works, and *same start*: how many of the new tokens are those of the float32 model before the first that is not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from buddy.errors import UserError
from buddy.storage.files import write_json

BUDGETS = (1.0, 0.75, 0.5)
READY = "ready"
Generate = Callable[[list[int], int], list[int]]
"""(prompt, new tokens) to the new tokens."""


class Row(NamedTuple):
    """One way to generate: which, at which budget, and whether linear layers are int8."""

    way: str
    budget: float | None = None
    int8: bool = False

    @property
    def name(self) -> str:
        """As a file and in the table."""
        budget = "" if self.budget is None else f"-{self.budget:g}"
        return f"{self.way}{budget}{'-int8' if self.int8 else ''}"

    @classmethod
    def of(cls, name: str) -> Row:
        """The row of this name."""
        return next(row for row in ROWS if row.name == name)


ROWS = (
    Row("generate"),
    *(Row("buddy", budget) for budget in BUDGETS),
    Row("compiled"),
    Row("generate", int8=True),
    *(Row("buddy", budget, int8=True) for budget in BUDGETS),
    Row("compiled", int8=True),
    Row("llama.cpp"),
)
"""In the order of the table; the first is what the others are compared with."""
LABELS = {
    "generate": "Hugging Face generate",
    "compiled": "torch.compile, static cache",
    "buddy": "this engine",
    "llama.cpp": "llama.cpp",
}


# ---- the ways --------------------------------------------------------------------------------------------------------


def way(row: Row, options: argparse.Namespace) -> Generate:
    """Load what a row needs.

    Raises:
        UserError: it cannot be had here; says why.
    """
    if row.way == "llama.cpp":
        return llama_cpp(options.gguf, options.threads, options.context)
    import torch

    from buddy import runs

    if options.threads:
        torch.set_num_threads(options.threads)
    model = runs.load(options.run, device=options.device)
    if row.int8:
        from buddy.routing.quantised import int8

        int8(model.backbone)
    if row.way == "buddy":
        return routed(model, float(row.budget or 1))
    return compiled(model.backbone, options.context) if row.way == "compiled" else plain(model.backbone)


def routed(model: Any, budget: float) -> Generate:
    """This engine."""
    import torch

    def generate(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        mask = torch.ones_like(ids)
        return model.generate(ids, mask, budget=budget, **_exactly(new))[0, len(prompt) :].tolist()

    return generate


def plain(backbone: Any) -> Generate:
    """Hugging Face's generate, as it comes."""
    import torch

    @torch.no_grad()
    def generate(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt], device=backbone.device)
        found = backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **_exactly(new))
        return found[0, len(prompt) :].tolist()

    return generate


def compiled(backbone: Any, context: int) -> Generate:
    """Decode steps compiled over a static cache; the prompt's pass is the model's own."""
    import torch
    from transformers import StaticCache

    step = torch.compile(backbone.forward, fullgraph=False, dynamic=False)
    cache = StaticCache(config=backbone.config, max_cache_len=context)

    @torch.no_grad()
    def generate(prompt: list[int], new: int) -> list[int]:
        cache.reset()
        ids, found, forward = torch.tensor([prompt], device=backbone.device), [], backbone.forward
        position = torch.arange(len(prompt), device=backbone.device).unsqueeze(0)
        for _ in range(new):
            call = {"input_ids": ids, "position_ids": position, "past_key_values": cache, "logits_to_keep": 1}
            logits = forward(**call, use_cache=True).logits[:, -1]
            logits[:, _ends(backbone)] = -torch.inf
            ids = logits.argmax(-1, keepdim=True)
            found.append(ids)
            position, forward = position[:, -1:] + 1, step
        return torch.cat(found, 1)[0].tolist()

    return generate


def llama_cpp(gguf: Path | None, threads: int, context: int) -> Generate:
    """The same backbone as a GGUF, by whichever of its Python packages is installed."""
    if gguf is None:
        raise UserError("--gguf names no file")
    if not gguf.is_file():
        raise UserError(f"--gguf: no file {gguf}")
    if importlib.util.find_spec("llama_cpp"):
        return _llama_cpp_python(gguf, threads, context)
    if importlib.util.find_spec("xllamacpp"):
        return _xllamacpp(gguf, threads, context)
    raise UserError("neither llama-cpp-python nor xllamacpp is installed")


def _llama_cpp_python(gguf: Path, threads: int, context: int) -> Generate:
    from itertools import islice

    import llama_cpp

    count = threads or os.cpu_count()
    model = llama_cpp.Llama(str(gguf), n_ctx=context, n_threads=count, n_threads_batch=count, verbose=False)
    ends = {model.token_eos(): -float("inf")}

    def generate(prompt: list[int], new: int) -> list[int]:
        model.reset()
        barred = llama_cpp.LogitsProcessorList([lambda _, scores: _barred(scores, ends)])
        return list(islice(model.generate(prompt, temp=0.0, reset=True, logits_processor=barred), new))

    return generate


def _barred(scores: Any, ends: dict[int, float]) -> Any:
    for token, value in ends.items():
        scores[token] = value
    return scores


def _xllamacpp(gguf: Path, threads: int, context: int) -> Generate:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.warmup, params.verbosity = True, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or os.cpu_count()
    server = xllamacpp.Server(params)

    def generate(prompt: list[int], new: int) -> list[int]:
        asked = {"prompt": prompt, "n_predict": new, "temperature": 0.0, "top_k": 1, "ignore_eos": True}
        answer = server.handle_completions({**asked, "cache_prompt": False, "return_tokens": True, "verbose": True})
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        if "error" in answer:
            raise UserError(f"llama.cpp: {answer['error']}")
        return [int(token) for token in _tokens(answer)]

    return generate


def _tokens(answer: dict[str, Any]) -> Sequence[Any]:
    """The token ids of an answer, in llama.cpp's own form, which OpenAI's carries along when asked to be verbose."""
    found: Sequence[Any] = answer.get("__verbose", answer).get("tokens", [])
    return found


def _exactly(new: int) -> dict[str, Any]:
    """Greedy, and no end before that many tokens."""
    return {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}


def _ends(backbone: Any) -> list[int]:
    """Tokens that would end the text."""
    end = backbone.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


# ---- one row's process -----------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Load, warm up, say so; then a pass over the prompts for every line on standard input. Answers are JSON lines."""
    import torch

    from buddy.evaluation.memory import Peak

    prompts = json.loads(options.prompts_file.read_text())
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print what they like
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=said, flush=True)

    try:
        generate = way(Row.of(options.row), options)
        for prompt in (prompts[0], prompts[-1]):
            new = min(8, options.new_tokens)
            if (got := len(generate(prompt, new))) != new:
                raise UserError(f"it gives {got} tokens where {new} are asked for")
    except UserError as error:
        say({"reason": str(error)})
        return
    except Exception as error:  # whatever a compiler, a package or a machine lacks is what the table has to tell
        say({"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"})
        return
    say({READY: True})
    for _ in sys.stdin:
        peak = Peak(device)
        start = time.perf_counter()
        tokens = [generate(prompt, options.new_tokens) for prompt in prompts]
        seconds = time.perf_counter() - start
        say({"seconds": seconds, "tokens": tokens, "peak_memory_mb": peak.mb()})


class Worker:
    """A row's process, as seen from the one that tells it when to go."""

    def __init__(self, row: Row, arguments: Sequence[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--row", row.name]
        self.row = row
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, Any]:
        """The next line it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"reason": f"its process ended with {self.process.wait()}"}

    def go(self) -> dict[str, Any]:
        """One pass over the prompts."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Let it go."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


# ---- all of them -----------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, arguments: Sequence[str], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Passes of every row, as many as are asked for; those in ``out`` are kept."""
    found = {row.name: _kept(options.out / f"{row.name}.json", options.settings) for row in rows}
    missing = [row for row in rows if len(found[row.name].get("passes", [])) < options.repeats]
    workers = []
    try:
        for row in missing:
            print(f"loading {row.name}", file=sys.stderr, flush=True)
            worker = Worker(row, arguments)
            workers.append(worker)
            said = worker.answer()
            if READY not in said:
                _keep(options, row, found, {"reason": said["reason"]})
        able = [worker for worker in workers if "reason" not in found[worker.row.name]]
        for number in range(options.repeats):
            for worker in [*able[number % len(able) :], *able[: number % len(able)]] if able else ():
                kept = found[worker.row.name]
                if len(kept.get("passes", [])) > number or "reason" in kept:
                    continue
                said = worker.go()
                if "reason" in said:
                    _keep(options, worker.row, found, {"reason": said["reason"]})
                    continue
                _keep(options, worker.row, found, {"passes": [*kept.get("passes", []), said]})
                print(f"pass {number + 1}: {worker.row.name} {said['seconds']:.1f} s", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.end()
    return found


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run measured with the same settings; what could not be measured is tried again."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    if kept["settings"] != settings:
        raise UserError(f"{path}: measured with other settings; remove it, or choose another --out")
    return {"passes": kept["passes"]} if "passes" in kept else {}


def _keep(options: argparse.Namespace, row: Row, found: dict[str, dict[str, Any]], what: dict[str, Any]) -> None:
    found[row.name] = what
    write_json(options.out / f"{row.name}.json", {"row": row.name, "settings": options.settings, **what})


def table(found: dict[str, dict[str, Any]], new_tokens: int) -> list[dict[str, Any]]:
    """A line per row: its figures, or why it has none."""
    reference = next(iter(found.values())).get("passes")
    base = None if not reference else statistics.median(one["seconds"] for one in reference)
    lines = []
    for name, measured in found.items():
        row = Row.of(name)
        line: dict[str, Any] = {
            **{"row": name, "way": LABELS[row.way], "budget": row.budget},
            "weights": "Q4_1 GGUF" if row.way == "llama.cpp" else "int8" if row.int8 else "as loaded",
        }
        passes = measured.get("passes")
        if not passes:
            lines.append({**line, "reason": measured.get("reason", "not run")})
            continue
        tokens = len(passes[0]["tokens"]) * new_tokens
        seconds = [one["seconds"] for one in passes]
        peaks = [one["peak_memory_mb"] for one in passes if one["peak_memory_mb"] is not None]
        line |= {
            "tok_s": tokens / statistics.median(seconds),
            "tok_s_low": tokens / max(seconds),
            "tok_s_high": tokens / min(seconds),
            "speedup": None if base is None else base / statistics.median(seconds),
            "peak_memory_mb": max(peaks, default=None),
            "same_start": None if not reference else same_start(passes[0]["tokens"], reference[0]["tokens"]),
            "passes": len(passes),
        }
        lines.append(line)
    return lines


def same_start(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Mean share of new tokens that are those of the reference before the first that is not."""
    shares = []
    for one, other in zip(tokens, reference, strict=True):
        equal = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        shares.append((min(len(one), len(other)) if equal is None else equal) / max(len(other), 1))
    return statistics.mean(shares)


def markdown(lines: Sequence[dict[str, Any]], note: str) -> str:
    """The table for people."""
    text = ["| what | budget | weights | tok/s | of generate | peak MB | same start |", "|---|--:|---|--:|--:|--:|--:|"]
    for line in lines:
        budget = "" if line["budget"] is None else f"{line['budget']:g}"
        head = f"| {line['way']} | {budget} | {line['weights']} |"
        if "reason" in line:
            text.append(f"{head} not measured: {line['reason']} | | | |")
            continue
        cells = [f"{line['tok_s']:.1f} ({line['tok_s_low']:.1f} to {line['tok_s_high']:.1f})"]
        for name, form in (("speedup", "{:.2f}"), ("peak_memory_mb", "{:.0f}"), ("same_start", "{:.2f}")):
            cells.append("" if line[name] is None else form.format(line[name]))
        text.append(f"{head} {' | '.join(cells)} |")
    return "\n".join([*text, "", note, ""])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of BUDDY")
    parser.add_argument("--data", type=Path, required=True, help="prompts: a data set folder from `buddy data`")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is measured")
    parser.add_argument("--gguf", type=Path, help="the backbone as a GGUF file, for llama.cpp")
    parser.add_argument("--prompts", type=int, default=4, help="prompts")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each row")
    parser.add_argument("--rows", default="", help=f"some of {','.join(row.name for row in ROWS)}; all by default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; llama.cpp always runs on the CPU")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of each row; each library's own choice by default"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.prompts_file = options.out / "prompts.json"
    try:
        if not options.row:
            compare(options)
            return
    except UserError as error:
        print(f"instead.py: {error}", file=sys.stderr)
        sys.exit(2)
    options.context = max(map(len, json.loads(options.prompts_file.read_text()))) + options.new_tokens + 8
    work(options)


def compare(options: argparse.Namespace) -> None:
    """All rows, side by side."""
    wanted = [name for name in options.rows.split(",") if name] or [row.name for row in ROWS]
    unknown = [name for name in wanted if name not in {row.name for row in ROWS}]
    if unknown:
        raise UserError(f"--rows: {unknown[0]!r} is not one of {', '.join(row.name for row in ROWS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = _prompts(options)
    options.settings = {"run": str(options.run), "prompts": prompts, "new_tokens": options.new_tokens}
    options.settings |= {"device": options.device, "threads": options.threads}
    options.prompts_file.write_text(json.dumps(prompts))
    found = measure(options, sys.argv[1:], [row for row in ROWS if row.name in wanted])
    lines = table(found, options.new_tokens)
    packages = ("torch", "transformers", "torchao", "xllamacpp", "llama-cpp-python")
    versions = ", ".join(f"{name} {version}" for name in packages if (version := _version(name)))
    note = (
        f"Prompts: {len(prompts)}, of {min(map(len, prompts))} to {max(map(len, prompts))} tokens; {options.new_tokens} new "
        f"tokens after each, one sequence at a time; medians of {options.repeats} passes in turns; {versions}."
    )
    write_json(options.out / "instead.json", {"note": note, "rows": lines})
    (options.out / "instead.md").write_text(markdown(lines, note))
    print(markdown(lines, note))


def _prompts(options: argparse.Namespace) -> list[list[int]]:
    """Token ids, the same for every row."""
    from buddy import runs
    from buddy.data import inputs

    texts = [prompt for prompt, _ in inputs.pairs(options.data)][: options.prompts]
    tokenizer = runs.load(options.run, device="cpu").tokenizer
    return [tokenizer(text).input_ids for text in texts]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
