#!/usr/bin/env python3
"""The study's data from a folder of real items: what is trained on, and what is scored, kept apart.

    python make_data.py ITEMS OUT

ITEMS holds, one JSON object a line and gzipped, the columns that lm-evaluation-harness reads: alpaca, instructions_t0
(instruction, output), gsm8k_train, gsm8k_test, samsum, dialogsum_dev, wikitext2_valid, ptb_valid, lambada_openai,
the tasks, and below train/ other items of the tasks. OUT becomes a source of data for `data.source` of a study:

  pairs.train         prompts and responses of all kinds, without a template where their source has none: what every
                      method is trained on
  calibration.txt     prose that importance and static peers are calibrated on
  alpaca, gsm8k, samsum, wikitext2, ptb      items that none of them has seen, for likelihoods
  the tasks           for accuracies; their train/ items for PuDDing, and in pairs
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

from buddy.data.templates import prompts

TASKS = {
    "piqa": "validation",
    "arc_easy": "test",
    "hellaswag": "validation",
    "winogrande": "validation",
    "siqa": "validation",
}
WORDS = (80, 50)
"""Words of prose in a prompt, and in its continuation."""


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a gzipped file."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write(out: Path, name: str, content: list[dict[str, Any]]) -> None:
    """Write rows, one a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    (out / f"{name}.jsonl").write_text(text, encoding="utf-8")


def continuations(texts: list[str], each: int, rng: random.Random) -> list[tuple[str, str]]:
    """Passages of prose, cut in two."""
    found, length = [], sum(WORDS)
    for text in texts:
        words = text.split(" ")
        places = range(0, len(words) - length, length)
        starts = rng.sample(places, min(each, len(places)))
        found += [
            (" ".join(words[at : at + WORDS[0]]), " " + " ".join(words[at + WORDS[0] : at + length])) for at in starts
        ]
    return found


def answered(folder: Path, task: str, count: int) -> list[tuple[str, str]]:
    """Questions of a task with their right answers."""
    found = []
    for row in rows(folder / "train", task)[:count]:
        if task.startswith("arc"):
            right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
            found.append((f"Question: {row['question']}\nAnswer:", f" {right}"))
        elif task == "openbookqa":
            right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
            found.append((row["question_stem"], f" {right}"))
        elif task == "piqa":
            found.append((f"Question: {row['goal']}\nAnswer:", f" {row[('sol1', 'sol2')[int(row['label'])]]}"))
        elif task == "siqa":
            right = row["answer" + "ABC"[int(row["label"]) - 1]]
            found.append((f"Q: {row['context']} {row['question']}\nA:", f" {right}"))
        elif task == "hellaswag":
            context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}"
            found.append((context, f" {row['endings'][int(row['label'])]}"))
        elif task == "boolq":
            found.append(
                (f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", f" {('no', 'yes')[int(row['label'])]}")
            )
    return found


def main() -> None:
    """Command line."""
    items, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    alpaca, gsm8k = rows(items, "alpaca"), rows(items, "gsm8k_train")
    dialogues = [rows(items, name) for name in ("samsum", "dialogsum_dev")]
    wiki, ptb = ([row["text"] for row in rows(items, name)] for name in ("wikitext2_valid", "ptb_valid"))
    t0 = [row for row in rows(items, "instructions_t0") if len(row["output"]) > 15]
    lambada = [row["text"].split() for row in rows(items, "lambada_openai")]

    training = prompts("alpaca", alpaca[:600]) + prompts("gsm8k", gsm8k[:400])
    training += prompts("samsum", [row for part in dialogues for row in part[:50]])
    training += [(f"{row['instruction']}\n", row["output"]) for row in t0[:700]]
    prose = continuations(wiki[:38], 12, rng) + continuations(ptb[:44], 4, rng)
    prose += [(" ".join(words[:-30]), " " + " ".join(words[-30:])) for words in lambada[:200] if len(words) > 50]
    for task in ("piqa", "arc_easy", "arc_challenge", "openbookqa", "siqa", "hellaswag", "boolq"):
        training += answered(items, task, 100)
    pairs = [{"prompt": prompt, "response": response} for prompt, response in training]
    pairs += [{"prompt": prompt, "response": response, "cut": True} for prompt, response in prose]
    rng.shuffle(pairs)
    write(out, "pairs.train", pairs)
    (out / "calibration.txt").write_text("".join(wiki[:38]), encoding="utf-8")

    write(out, "alpaca.train", alpaca[600:])
    write(out, "gsm8k.test", rows(items, "gsm8k_test"))
    write(out, "gsm8k.train", gsm8k[400:])
    write(out, "samsum.test", [row for part in dialogues for row in part[50:]])
    write(out, "wikitext2.validation", [{"text": text} for text in wiki[40:]])
    write(out, "ptb.validation", [{"text": text} for text in ptb[46:]])
    for task, split in TASKS.items():
        write(out, f"{task}.{split}", rows(items, task))
        if (items / "train" / f"{task}.jsonl.gz").exists():
            write(out, f"{task}.train", rows(items / "train", task))
    print(f"{out}: {len(pairs)} pairs to train on")


if __name__ == "__main__":
    main()
