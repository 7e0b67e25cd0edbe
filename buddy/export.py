"""A run at one depth as a plain Hugging Face folder, and as a GGUF file: blocks taken out, LoRA merged, nothing of this
package in it.

What leaves out the same blocks for every input is exported exactly. A policy that chooses by the input has the route that
it took most often over some prompts, and is told how often that was: the folder is the static model nearest to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from buddy.backbones import gguf_model
from buddy.errors import UserError
from buddy.evaluation import traces
from buddy.policies.static import StaticPolicy
from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced
from buddy.settings import Trace
from buddy.storage import folders
from buddy.storage.files import permitted

HOLDS = "an exported model"


@dataclass(frozen=True)
class Chosen:
    """The route that is exported.

    Attributes:
        route: boolean (L,), True where a block runs.
        steps, prompts: share of passes that took it, and of prompts all of whose passes did; 1 where every input does.
        paths: distinct routes seen.
        seen: prompts that were looked at; 0 where the route depends on none.
    """

    route: Tensor
    steps: float = 1.0
    prompts: float = 1.0
    paths: int = 1
    seen: int = 0

    @property
    def kept(self) -> list[int]:
        """Blocks that run, from 0, in order."""
        return self.route.nonzero().squeeze(1).tolist()

    @property
    def removed(self) -> list[int]:
        """Blocks that are left out."""
        return (~self.route).nonzero().squeeze(1).tolist()


def chosen(model: RoutedModel, removed: int, texts: Sequence[str] | None = None) -> Chosen:
    """The route to export.

    Args:
        model: a run, in evaluation mode.
        removed: number of blocks left out.
        texts: prompts, for a policy that chooses by them.

    Raises:
        UserError: a policy chooses by its input, and no prompts are given.
        BudgetError: the policy cannot leave out so many.
    """
    budget = (model.blocks - removed) / model.blocks
    if isinstance(model.policy, StaticPolicy):
        return Chosen(model.policy.begin(budget, 1, torch.device("cpu"))[0])
    if not texts:
        raise UserError(
            f"--data: needed: {model.origin.info.method} chooses blocks by the input, and its most frequent route is taken; "
            "give a data set folder with prompts"
        )
    return most_frequent(traces.collect(model, texts, budget, Trace()))


def most_frequent(routes: Sequence[Tensor]) -> Chosen:
    """Of the routes (passes, L) after each of some prompts the one that most passes took; of equal ones the first seen."""
    counts = Counter(tuple(row) for each in routes for row in each.tolist())
    best, steps = counts.most_common(1)[0]
    route = torch.tensor(best)
    whole = sum(bool((each == route).all()) for each in routes)
    return Chosen(route, steps / counts.total(), whole / len(routes), len(counts), len(routes))


@dataclass(frozen=True)
class Gguf:
    """A GGUF file beside the folder, or in it: where, of which type, and what it says of itself."""

    file: Path
    kind: str
    facts: gguf_model.Facts


def save(model: RoutedModel, kept: Sequence[int], folder: Path, card: str, gguf: Gguf | None = None) -> None:
    """Write config, weights, tokenizer, chat template and model card.

    Args:
        model: a run whose LoRA is merged.
        kept: blocks that run, from 0, in order.
        folder: absent, empty or an export that is replaced.
        card: text of its README.md.
        gguf: the same model once more, as one file.

    Raises:
        UserError: the folder holds something else, or the model has no place in a GGUF file. Nothing is written then.
    """
    folder = folder.resolve()
    plain = sliced(model.backbone, kept)
    with folders.fresh(folder, HOLDS) as new:
        plain.save_pretrained(new)
        model.tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")
        for file in new.glob("*.safetensors"):  # safetensors writes for its owner alone
            file.chmod(permitted(0o666))
        if gguf is not None:
            place = gguf.file.resolve()
            place = new / place.name if place.parent == folder else place
            gguf_model.write(plain, model.tokenizer, place, gguf.kind, gguf.facts)


def facts(name: str, model: RoutedModel, found: Chosen, licence: str, made: str) -> gguf_model.Facts:
    """What a GGUF file of the route says of itself; ``made`` says how the run was trained, the rest is as for `card`."""
    return gguf_model.Facts(name, f"{_what(model, found)} {made}", licence, model.blocks, found.removed)


def card(name: str, model: RoutedModel, found: Chosen, licence: str, said: Sequence[str]) -> str:
    """Text of the model card.

    Args:
        name: of the exported model.
        model: the run.
        found: the route that is exported.
        licence: the backbone's, as the Hub spells it; "" where it is not known.
        said: how the run was trained, and what was measured of it at this depth, a paragraph each.
    """
    source = model.origin.info.backbone_source or {}
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [pruned, depth-pruning, buddy]"]
    head += [f"base_model: {source['hub']}"] if "hub" in source else []
    head += [f"license: {licence}"] if licence else []
    top = "\n".join(["---", *head, "---"])
    return "\n\n".join([top, f"# {name}", _what(model, found), *said]) + "\n"


def _what(model: RoutedModel, found: Chosen) -> str:
    info = model.origin.info
    said = (
        f"{info.backbone} without {len(found.removed)} of its {model.blocks} blocks ({', '.join(map(str, found.removed))}; "
        f"counted from 0), which {info.method} left out."
    )
    if not found.seen:
        return said
    return (
        f"{said} {info.method} chooses blocks by the input: this route it took in {100 * found.steps:.1f} % of all steps "
        f"after {found.seen} prompts, and in every step after {100 * found.prompts:.1f} % of them ({found.paths} distinct "
        "routes in all). Where it takes another, this model differs from the run."
    )
