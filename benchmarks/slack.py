"""What a bound on the blocks that a batch calls costs in quality, and what it gains in speed: one plot.

    python benchmarks/slack.py RUN --data DIR[,DIR] --removed 15 --out OUT [--batch-sizes 8,16] [--slack 0,2,4]

For each batch size, with sequences on their own and under each bound: NLL, divergence from the whole model and greedy
agreement with it, of held-out text item by item (as `buddy score` has them, every token under the route that decoding
would have given it beside its batch), and decode speed of the same run, all bounds in turns within a repeat. Both on the
run's own routes: a router that takes one path has nothing to share, and the blocks called say so.

OUT/quality/batch~B.json and OUT/speed/batch~B.json are written as they are measured, and not measured again.
OUT/slack.md is the table, OUT/slack.png and .pdf the plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from buddy import runs
from buddy.commands._common import check_depths, provenance
from buddy.commands._options import counts
from buddy.data import inputs
from buddy.errors import UserError
from buddy.evaluation import latency, likelihood, passages
from buddy.evaluation.likelihood import MEASURES, Mode
from buddy.routing.model import RoutedModel
from buddy.settings import Latency
from buddy.storage.files import write_json
from buddy.study.records import Stopwatch

INDEPENDENT = "independent"


def label(slack: int | None) -> str:
    """A bound in words."""
    return INDEPENDENT if slack is None else f"slack {slack}"


# ---- measuring -------------------------------------------------------------------------------------------------------


def quality(model: RoutedModel, sets: Sequence[Any], wanted: Sequence[Mode], batch_size: int) -> dict[str, Any]:
    """Under each bound the means over the data sets with their intervals, and the values item by item."""
    items = [item for one in sets for item in one.items]
    found = likelihood.measure(model, runs.untouched(model), items, wanted, batch_size)
    result = {}
    for mode in wanted:
        scores, start, values = found[mode], 0, {}
        for one in sets:
            part = scores[start : start + len(one.items)]
            values[one.name] = {name: [getattr(score, name) for score in part] for name in MEASURES}
            start += len(part)
        means = {name: likelihood.interval([of[name] for of in values.values()]) for name in MEASURES}
        result[label(mode.slack)] = {**means, "items": values}
    return result


def speed(
    model: RoutedModel, prompts: Sequence[str], removed: int, slack: Sequence[int | None], settings: Latency
) -> dict[str, Any]:
    """Under each bound decode speed, its ratio to the dense model and to sequences on their own, and what a step called."""
    size = settings.batch_sizes[0]
    entries = [latency.Entry("dense", (0,) * size)]
    entries += [latency.Entry("recompute", (removed,) * size, bound) for bound in slack]
    work = latency.batches(model, prompts, size, settings.new_tokens)
    rounds = (latency.warmups("eager", settings) + settings.repeats) * len(work)
    with tqdm(total=rounds, desc=f"speed, batch {size}", unit="batch") as bar:
        found = latency.run(entries, model, "eager", work, settings, bar)
    tokens = size * len(work) * settings.new_tokens
    dense, free = (
        [lap["decode"] for lap in found[entry].laps] for entry in (entries[0], entries[1 + slack.index(None)])
    )
    result = {"dense": {"decode_tok_s": latency.spread([tokens / seconds for seconds in dense])}}
    for entry in entries[1:]:
        own = [lap["decode"] for lap in found[entry].laps]
        result[label(entry.slack)] = {
            "decode_tok_s": latency.spread([tokens / seconds for seconds in own]),
            "decode_speedup": latency.spread([other / seconds for other, seconds in zip(dense, own, strict=True)]),
            "decode_of_independent": latency.spread([other / one for other, one in zip(free, own, strict=True)]),
            "called_mean": found[entry].mean("called"),
            "paths_mean": found[entry].mean("paths"),
            "executed_mean": found[entry].mean("executed") / size,
        }
    return result


def kept(path: Path, asked: dict[str, Any], measure: Any, model: RoutedModel) -> dict[str, Any]:
    """What a file says, measured and written first if it is not there.

    Raises:
        UserError: it was measured with other settings.
    """
    if path.exists():
        found = json.loads(path.read_text())
        if found["asked"] != asked:
            raise UserError(f"{path}: measured with other settings; remove it, or choose another --out")
        return found["found"]
    watch = Stopwatch(str(model.device))
    found = measure()
    write_json(path, {"asked": asked, "found": found, **provenance(model, watch)})
    return found


# ---- what it says ----------------------------------------------------------------------------------------------------


def table(measured: dict[int, tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """A line per batch size and bound."""
    head = (
        "batch",
        "routes",
        "NLL",
        "agreement",
        "KL",
        "paths",
        "called",
        "decode tok/s",
        "of independent",
        "speed-up",
    )
    lines = [" | ".join(["", *head, ""]).strip(), "|--:|---|" + "--:|" * 8]
    for size, (good, fast) in measured.items():
        for name, one in good.items():
            quick = fast[name]
            cells = [
                f"{one[of]['mean']:.4f} [{one[of]['low']:.4f}, {one[of]['high']:.4f}]"
                for of in ("nll", "agreement", "kl")
            ]
            cells += [f"{quick['paths_mean']:.1f}", f"{quick['called_mean']:.1f}"]
            for of, form in (
                ("decode_tok_s", "{:.1f}"),
                ("decode_of_independent", "{:.2f}"),
                ("decode_speedup", "{:.2f}"),
            ):
                cells.append(form.format(quick[of]["median"]))
            lines.append(f"| {size} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(measured: dict[int, tuple[dict[str, Any], dict[str, Any]]], out: Path, removed: int) -> None:
    """Throughput against likelihood: a line per batch size, a point per bound; up and right is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    for size, (good, fast) in measured.items():
        x = [fast[name]["decode_tok_s"]["median"] for name in good]
        y = [-one["nll"]["mean"] for one in good.values()]
        low = [one["nll"]["mean"] - one["nll"]["low"] for one in good.values()]
        high = [one["nll"]["high"] - one["nll"]["mean"] for one in good.values()]
        (drawn,) = axes.plot(x, y, marker="o", label=f"batch {size}")
        axes.errorbar(x, y, yerr=[high, low], fmt="none", ecolor=drawn.get_color(), alpha=0.4)
        for name, *place in zip(good, x, y, strict=True):
            axes.annotate(name, place, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xlabel("decode, tokens/s")
    axes.set_ylabel("log-likelihood per token, nats")
    axes.set_title(f"{removed} blocks removed", fontsize=9)
    axes.legend(frameon=False)
    for kind in ("png", "pdf"):
        figure.savefig(out / f"slack.{kind}", dpi=200)
    pyplot.close(figure)


def main() -> None:
    """Measure, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of BUDDY")
    parser.add_argument("--data", required=True, help="data set folders from `buddy data`; prompts are the first one's")
    parser.add_argument("--removed", type=int, required=True, help="removed blocks")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is measured")
    parser.add_argument("--batch-sizes", default="8,16", help="sequences that share a step")
    parser.add_argument("--slack", default="0,2,4", help="bounds, besides sequences on their own")
    parser.add_argument("--items", type=int, default=64, help="items of each data set that are scored")
    parser.add_argument("--max-length", type=int, default=256, help="longest item, tokens")
    parser.add_argument("--prompts", type=int, default=16, help="prompts that are continued for the speed")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens after each prompt")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    try:
        measure(parser.parse_args())
    except UserError as error:
        print(f"slack.py: {error}", file=sys.stderr)
        sys.exit(2)


def measure(options: argparse.Namespace) -> None:
    """What the command does."""
    bounds: list[int | None] = [*sorted(set(counts(options.slack, "--slack"))), None]
    sizes = counts(options.batch_sizes, "--batch-sizes")
    model = runs.load(options.run, device=options.device)
    check_depths(model, [options.removed])
    folders = [Path(part) for part in options.data.split(",")]
    trained = model.origin.info.training
    sets = [passages.read(folder, model.tokenizer, options.items, options.max_length, trained) for folder in folders]
    prompts = [prompt for prompt, _ in inputs.pairs(folders[0])][: options.prompts]
    budget = (model.blocks - options.removed) / model.blocks
    wanted = [Mode(budget, model.kv, "recompute", bound) for bound in bounds]
    said = {"run": str(options.run), "data": options.data, "removed": options.removed, "slack": options.slack}
    measured = {}
    for size in sizes:
        settings = Latency(
            prompts=len(prompts), new_tokens=options.new_tokens, batch_sizes=[size], repeats=options.repeats
        )
        good = kept(
            options.out / "quality" / f"batch~{size}.json",
            {**said, "items": options.items, "max_length": options.max_length},
            lambda size=size: quality(model, sets, wanted, size),
            model,
        )
        fast = kept(
            options.out / "speed" / f"batch~{size}.json",
            {**said, "prompts": options.prompts, "new_tokens": options.new_tokens, "repeats": options.repeats},
            lambda settings=settings: speed(model, prompts, options.removed, bounds, settings),
            model,
        )
        measured[size] = (good, fast)
    text = table(measured)
    (options.out / "slack.md").write_text(text)
    plot(measured, options.out, options.removed)
    print(text)


if __name__ == "__main__":
    main()
