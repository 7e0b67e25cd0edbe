"""``buddy generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.settings import MOST_SEED


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
    from buddy.commands._options import choice, within
    from buddy.errors import UserError
    from buddy.settings import ENGINES, KV_POLICIES

    choice("--engine", engine, ("auto", *ENGINES))
    if kv:
        choice("--kv", kv, KV_POLICIES)
    within("--temperature", temperature, 0, 1e6)
    fraction, every = _budget(budget), _decode(decode)
    text = _text(prompt)
    model = runs.load(run, backbone=backbone, kv=kv or None, device=device)
    tokenizer = model.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"--chat: {run} has no chat template; leave --chat out")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise UserError("prompt: it is empty")
    _check_room(model, inputs.input_ids.shape[1], max_new_tokens)
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
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - start
    if trace:
        print(strip(model.trace, ids.shape[1] - inputs.input_ids.shape[1], seconds))


def _text(prompt: str) -> str:
    """The prompt, or what standard input holds.

    Raises:
        UserError: it is not UTF-8.
    """
    from buddy.errors import UserError

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
    from buddy.commands._options import within
    from buddy.errors import UserError

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
    from buddy.errors import UserError
    from buddy.settings import DECODE_MODES

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
    from buddy.errors import UserError

    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and prompt + new > longest:
        raise UserError(
            f"--max-new-tokens: {new} after a prompt of {prompt} tokens is more than the context of {longest} tokens"
        )


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
