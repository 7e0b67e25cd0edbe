"""``buddy generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads it from standard input")],
    run: Annotated[Path, typer.Option(help="run folder (see `buddy runs`), or a backbone folder for the dense model")],
    budget: Annotated[
        str,
        typer.Option(
            help="fraction of blocks to execute, in (0, 1]; auto leaves it to the run's budget predictor, auto:PRICE at "
            "that price, from 0 (only quality counts) to 1 (only depth counts)"
        ),
    ] = "1",
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate at most")] = 64,
    decode: Annotated[
        str, typer.Option(help="recompute (a new path at every step), reuse, or a number of steps")
    ] = "recompute",
    engine: Annotated[
        str, typer.Option(help="eager, graph (captured CUDA graphs) or auto (graphs on a GPU, for long generations)")
    ] = "auto",
    kv: Annotated[str, typer.Option(help="K/V of skipped blocks: zero, mask or project; the run's by default")] = "",
    chat: Annotated[bool, typer.Option(help="put the prompt into the backbone's chat template")] = False,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    backbone: Annotated[Path | None, typer.Option(help="backbone folder, where it has moved")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    trace: Annotated[bool, typer.Option(help="print which blocks each step executed")] = True,
) -> None:
    """Generate text within a budget and show which blocks each step executed.

    \b
    Examples:
      buddy generate --run results/demo/runs/.../seed~0 --budget 0.75 "The capital of France is"
      buddy generate --run RUN --budget 0.5 --decode reuse --chat "How do magnets work?"
      buddy generate --run RUN --budget auto:0.3 "The capital of France is"
      buddy generate --run results/demo/backbones/smollm2-135m "Once upon a time"
    """
    import time

    import torch
    from transformers import TextStreamer

    from buddy import runs
    from buddy.commands._options import choice
    from buddy.settings import ENGINES

    choice("--engine", engine, ("auto", *ENGINES))
    text = sys.stdin.read() if prompt == "-" else prompt
    model = runs.load(run, backbone=backbone, kv=kv or None, device=device)
    tokenizer = model.tokenizer
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    if inputs.input_ids.shape[1] == 0:
        from buddy.errors import UserError

        raise UserError("prompt: it is empty")
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = model.generate(
        inputs.input_ids,
        inputs.attention_mask,
        budget=_budget(budget),
        decode=int(decode) if decode.isdigit() else decode,
        engine=engine,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id,
        **({"temperature": temperature} if temperature > 0 else {}),
    )
    seconds = time.perf_counter() - start
    if trace:
        print(strip(model.trace, ids.shape[1] - inputs.input_ids.shape[1], seconds))


def _budget(text: str) -> float | str:
    """A fraction, or what asks the predictor; anything else is left to the model to refuse."""
    try:
        return float(text)
    except ValueError:
        return text


def strip(trace: Any, new_tokens: int, seconds: float) -> str:
    """The routes of one sequence as text: a line per step, a mark per block.

    Steps that take the same path as the one before are folded into a count.
    """
    routes = trace.routes(0)
    blocks = routes.shape[1]
    lines = [f"\nblocks 1 to {blocks} (█ executed, · skipped)"]
    first = 0
    for step in range(1, len(routes) + 1):
        if step < len(routes) and bool((routes[step] == routes[first]).all()) and first > 0:
            continue
        label = "prefill" if first == 0 else f"step {first}" if step - first == 1 else f"steps {first}-{step - 1}"
        marks = "".join("█" if ran else "·" for ran in routes[first].tolist())
        lines.append(f"{label:>13}  {marks}  {int(routes[first].sum())}/{blocks}")
        first = step
    lines.append(f"{new_tokens} tokens, {new_tokens / seconds:.1f} tokens/s, {trace.distinct_paths(0)} distinct paths")
    return "\n".join(lines)
