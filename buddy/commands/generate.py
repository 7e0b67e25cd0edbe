"""``buddy generate``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from buddy import runs
from buddy.chat import in_template
from buddy.commands import _arguments as arg
from buddy.commands import _strip
from buddy.commands._options import choice, within
from buddy.commands._run import default_run, fetch_backbone
from buddy.errors import UserError
from buddy.settings import DECODE_MODES, ENGINES, KV_POLICIES, MOST_SEED


def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads it from standard input")],
    run: Annotated[
        Path | None,
        typer.Option(
            help="run folder (see `buddy runs`), or a backbone folder for the dense model; by default the newest BUDDY run "
            "of --results, else the one that is shipped, whose backbone is fetched on first use"
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="fraction of blocks to execute, in (0, 1]; auto leaves it to the run's budget predictor, auto:PRICE at "
            "that price, from 0 (only quality counts) to 1 (only depth counts)"
        ),
    ] = "1",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate at most", min=1)] = 64,
    decode: Annotated[
        str, typer.Option(help="recompute (a new path at every step), reuse, or a number of steps")
    ] = "recompute",
    engine: Annotated[
        str, typer.Option(help="eager, graph (captured CUDA graphs) or auto (graphs on a GPU, for long generations)")
    ] = "auto",
    kv: Annotated[str, typer.Option(help="K/V of skipped blocks: zero, mask or project; the run's by default")] = "",
    chat: Annotated[bool, typer.Option(help="put the prompt into the backbone's chat template")] = False,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling", min=0, max=MOST_SEED)] = 0,
    backbone: Annotated[Path | None, typer.Option(help="backbone folder, where it has moved")] = None,
    device: arg.Device = "auto",
    trace: Annotated[bool, typer.Option(help="print which blocks each step executed")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON: text, tokens, and the route of each step")
    ] = False,
    results: Annotated[Path, typer.Option(help="folder that holds the studies, for the default run")] = Path("results"),
) -> None:
    """Generate text within a budget and show which blocks each step executed.

    Below the text stands a strip: a line per block, a column per token, the prompt's route first; blocks that differ
    between steps are marked.

    \b
    Examples:
      buddy generate --budget 0.75 "The capital of France is"
      buddy generate --run RUN --budget 0.5 --decode reuse --chat "How do magnets work?"
      buddy generate --run RUN --budget auto:0.3 --json "The capital of France is"
      buddy generate --run results/demo/backbones/smollm2-135m "Once upon a time"
    """

    import torch
    from transformers import TextStreamer

    choice("--engine", engine, ("auto", *ENGINES))
    if kv:
        choice("--kv", kv, KV_POLICIES)
    within("--temperature", temperature, 0, 1e6)
    fraction, every = _budget(budget), _decode(decode)
    text = _text(prompt)
    run = default_run(results) if run is None else run
    if backbone is None:
        fetch_backbone(run, results)
    model = runs.load(run, backbone=backbone, kv=kv or None, device=device)
    tokenizer = model.tokenizer
    if chat:
        text = in_template(tokenizer, text, str(run))
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    asked = inputs.input_ids.shape[1]
    if asked == 0:
        raise UserError("prompt: it is empty")
    _check_room(model, asked, max_new_tokens)
    sampling: dict[str, Any] = {"temperature": temperature} if temperature > 0 else {}
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = model.generate(
        inputs.input_ids,
        inputs.attention_mask,
        budget=fraction,
        decode=every,
        engine=engine,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - start
    new, routes = ids[0, asked:].tolist(), model.trace.routes(0)
    if as_json:
        said = {
            "run": str(run),
            "backbone": model.origin.info.backbone,
            "budget": budget,
            "decode": decode,
            "prompt": text,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": [{"id": token, "text": tokenizer.decode([token])} for token in new],
            **_strip.facts(routes),
            "seconds": seconds,
        }
        print(json.dumps(said, ensure_ascii=False, indent=1))
    elif trace:
        marks = _strip.marks_in(sys.stdout.encoding)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"\n{_strip.legend(marks)}\n")
        print(_strip.draw(routes, shutil.get_terminal_size().columns, marks, colour))
        print(f"\n{_summary(_strip.facts(routes), len(new), seconds)}")


def _text(prompt: str) -> str:
    """The prompt, or what standard input holds.

    Raises:
        UserError: it is not UTF-8.
    """

    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        prompt.encode("utf-8")  # the system hands on bytes that are none as lone surrogates
    except UnicodeError as error:
        where = "standard input" if prompt == "-" else "prompt"
        raise UserError(f"{where}: not UTF-8 ({error}); convert it, such as with iconv -f latin1 -t utf-8") from None
    return prompt


def _budget(text: str) -> float | str:
    """A fraction, or what asks the predictor.

    Raises:
        UserError: neither, before anything is loaded.
    """

    if text.partition(":")[0] == "auto":
        return text
    try:
        fraction = float(text)
    except ValueError:
        raise UserError(f"--budget: {text!r} is not a number in (0, 1], auto or auto:PRICE") from None
    if fraction == 0:
        raise UserError("--budget: 0 is not a number in (0, 1]")
    return within("--budget", fraction, 0, 1)


def _decode(text: str) -> int | str:
    """A mode, or a number of steps.

    Raises:
        UserError: neither.
    """

    if text in DECODE_MODES:
        return text
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text) > 0):
        raise UserError(f"--decode: {text!r} is not recompute, reuse or a number of steps from 1")
    return int(text)


def _check_room(model: Any, prompt: int, new: int) -> None:
    """Refuse more tokens than the backbone has positions for.

    Raises:
        UserError: prompt and answer together are longer than its context.
    """

    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and prompt + new > longest:
        raise UserError(
            f"--max-new-tokens: {new} after a prompt of {prompt} tokens is more than the context of {longest} tokens"
        )


def _summary(ran: dict[str, Any], tokens: int, seconds: float) -> str:
    least, most = min(ran["executed"]), max(ran["executed"])
    depth = f"{least}" if least == most else f"{least} to {most}"
    differ = ", ".join(map(str, ran["differ"])) or "none"
    return (
        f"{tokens} tokens, {tokens / seconds:.1f} tokens/s; {depth} of {ran['blocks']} blocks in every step; "
        f"distinct paths: {ran['distinct_paths']}; blocks that differ between steps: {differ}"
    )
