"""Summaries of dialogues against those that people wrote: ROUGE with a path kept or chosen anew (the paper's Figure 5).

The paper does not say how ROUGE is computed. Here it is the `rouge-score` package without stemming: F1 over lower-case
words of letters and digits, of single words (ROUGE-1) and of the longest common subsequence (ROUGE-L). The whole generated
text counts, up to the token that ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from buddy.evaluation import traces
from buddy.resampling import mean_interval
from buddy.routing.model import RoutedModel
from buddy.settings import Summaries

MEASURES = ("rouge1", "rougeL")
INTERVAL = ("mean", "low", "high")
"""What is recorded of a measure beside its values: its 95 % interval over the dialogues."""


def measure(
    model: RoutedModel, pairs: Sequence[tuple[str, str]], budget: float, decode: str, settings: Summaries
) -> dict[str, Any]:
    """Summarise dialogues at one budget and compare the summaries with the given ones.

    Args:
        model: the run, in evaluation mode.
        pairs: prompt and right summary of each dialogue.
        budget: fraction of blocks.
        decode: ``reuse`` keeps the prompt's path, ``recompute`` chooses one at every step.
        settings: the section `summaries` of the study.

    Returns:
        ``metrics`` of a record of kind ``rouge``: per measure mean, low and high (95 % interval over resampled prompts)
        and the values prompt by prompt, fractions; prompts, new_tokens, decode; ``tokens_mean`` per summary; what ran
        (executed_mean, changed_steps_mean, as `buddy.evaluation.traces.summary` has them); the package's version.
    """
    prompts = [prompt for prompt, _ in pairs]
    answers = traces.answers(model, prompts, budget, decode, settings.new_tokens, settings.batch_size)
    texts = model.tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
    found = scores(texts, [summary for _, summary in pairs])
    ran = traces.summary([answer.routes for answer in answers], round(budget * model.blocks))
    return {
        "prompts": len(pairs),
        "new_tokens": settings.new_tokens,
        "decode": decode,
        **{
            name: {**dict(zip(INTERVAL, mean_interval(values), strict=True)), "values": values}
            for name, values in found.items()
        },
        "tokens_mean": sum(len(answer.tokens) for answer in answers) / len(answers),
        "executed_mean": ran["executed_mean"],
        "changed_steps_mean": ran["changed_steps_mean"],
        "rouge_score": metadata.version("rouge_score"),
    }


def scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F1 of each text against its reference, by measure."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(MEASURES), use_stemmer=False)
    found = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: [float(one[name].fmeasure) for one in found] for name in MEASURES}
