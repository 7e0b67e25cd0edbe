"""The threshold of FiRST's gates for a depth: chosen on prompts, by passes along the routes that it gives.

A block's input depends on which blocks before it ran, so probabilities recorded on one route do not say what another
threshold would do. But a pass at one threshold says exactly for which others it would have gone the same way: for those
down to the nearest probability below it, and up to the nearest above. The mean depth is constant on such a *plateau*. The
search brackets the depth asked for between two plateaus and looks at what was observed between them, until they touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from buddy.policies.first import FirstPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.padding import leading, padded
from buddy.routing.types import CausalLM

MOST_PASSES = 40
"""Passes over the prompts at most; about ten are the rule."""


@dataclass(frozen=True)
class Calibration:
    """A threshold, and the mean number of blocks that the prompts execute with it."""

    threshold: float
    executed_mean: float


@dataclass(frozen=True)
class Plateau:
    """Thresholds in (below, above], all of which send each prompt along the same route.

    Attributes:
        below, above: the nearest observed probabilities; 0 and 1 where there is none.
        executed_mean: mean number of blocks executed.
        observed: all mean probabilities that gates gave, ascending.
    """

    below: float
    above: float
    executed_mean: float
    observed: tuple[float, ...]

    @property
    def middle(self) -> float:
        """A threshold as far as possible from both ends: rounding on another machine should change no route."""
        return (self.below + self.above) / 2


def calibrate(
    backbone: CausalLM, policy: FirstPolicy, prompts: Sequence[Sequence[int]], removed: int, batch_size: int
) -> Calibration:
    """Find the threshold whose mean depth over the prompts is nearest to ``blocks - removed``.

    A higher threshold need not always give less depth, so the mean may cross it several times; this finds one crossing,
    and takes the nearest of all plateaus seen, the deeper one of two that are equally near.

    Args:
        backbone: causal language model.
        policy: gates; its own thresholds are left alone.
        prompts: token ids.
        removed: number of blocks to leave out.
        batch_size: prompts per pass.
    """
    target = policy.blocks - removed
    seen: list[Plateau] = []
    with tqdm(desc=f"threshold for {target} blocks", unit="pass") as bar:

        def look(threshold: float) -> Plateau:
            seen.append(plateau(backbone, policy, prompts, removed, threshold, batch_size))
            bar.set_postfix(executed=f"{seen[-1].executed_mean:.2f}")
            bar.update()
            return seen[-1]

        many, few = look(0.0), look(1.0)
        while len(seen) < MOST_PASSES and many.executed_mean > target > few.executed_mean:
            guess = _between(many, few, target)
            if guess is None:
                break
            found = look(guess)
            many, few = (found, few) if found.executed_mean >= target else (many, found)
    best = min(seen, key=lambda found: (abs(found.executed_mean - target), -found.executed_mean))
    return Calibration(best.middle, best.executed_mean)


def achieved(
    backbone: CausalLM,
    policy: FirstPolicy,
    prompts: Sequence[Sequence[int]],
    removed: int,
    threshold: float,
    batch_size: int,
) -> Calibration:
    """What a given threshold does; arguments as in `calibrate`."""
    found = plateau(backbone, policy, prompts, removed, threshold, batch_size)
    return Calibration(threshold, found.executed_mean)


def _between(many: Plateau, few: Plateau, target: float) -> float | None:
    """The next threshold to look at, between two plateaus; None if they touch."""
    low, high = many.above, few.below
    if low >= high:
        return None
    inside = sorted(value for value in {*many.observed, *few.observed} if low < value <= high)
    if not inside:
        return (low + high) / 2
    # What was observed tells how the decisions in between are spread: interpolate, but always rule out a fifth of them.
    share = (many.executed_mean - target) / (many.executed_mean - few.executed_mean)
    return inside[int(min(max(share, 0.2), 0.8) * (len(inside) - 1))]


@torch.no_grad()
def plateau(
    backbone: CausalLM,
    policy: FirstPolicy,
    prompts: Sequence[Sequence[int]],
    removed: int,
    threshold: float,
    batch_size: int,
) -> Plateau:
    """Run the prompts at a threshold; arguments as in `calibrate`."""
    decoder, training, before = backbone.get_decoder(), backbone.training, policy.thresholds
    backbone.eval()
    policy.thresholds = {**before, removed: threshold}
    policy.to(backbone.device)
    executed, observed = 0, []
    try:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            batch = [prompts[i] for i in order[start : start + batch_size]]
            ids = padded(batch)
            mask = leading([*map(len, batch)], ids.shape[1]).long()
            with routed(backbone, Routing(policy, (policy.blocks - removed) / policy.blocks)) as routing:
                decoder(input_ids=ids.to(backbone.device), attention_mask=mask.to(backbone.device), use_cache=False)
            assert routing.state is not None
            executed += int(routing.trace.executed().sum())
            observed.append(routing.state.policy_state.probability[:, 1:-1].flatten().cpu())
    finally:
        policy.thresholds = before
        backbone.train(training)
    values = torch.cat(observed).sort().values
    lower, upper = values[values < threshold], values[values >= threshold]
    return Plateau(
        below=lower[-1].item() if len(lower) else 0.0,
        above=upper[0].item() if len(upper) else 1.0,
        executed_mean=executed / len(prompts),
        observed=tuple(values.tolist()),
    )
