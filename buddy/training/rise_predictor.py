"""Preset ``rise`` of the budget predictor: what each token says of how much depth its prediction needs.

A ridge regression from a token's state behind the source block to its rise at each depth (`buddy.training.rises`): the rise of
an input is a mean over tokens, so every token is a target, and the estimate for a prompt is that of its mean state. A few
hundred inputs have tens of thousands of targets; fitted to one number per input the same map would be noise.

Two numbers are chosen by cross-fitting, on inputs whose tokens a fit has not seen:

- the penalty, by the squared error of the inputs' rises within data sets: that sets differ is easy, and not what is wanted;
- a factor between 0 and 1 on all deviations from the mean, by the gain over constant depths within data sets, at equal mean
  depth, mean over sets. At 0 every prompt gets the best constant depth at each price. So a predictor that knows nothing
  costs nothing, but for the error of this choice itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buddy.errors import UserError
from buddy.frontiers import Table, area, interval
from buddy.policies.predictor import RisePredictor
from buddy.resampling import INTERVAL_RESAMPLES
from buddy.training.grpo import entropy
from buddy.training.rises import RiseTable

logger = logging.getLogger(__name__)

OnLog = Callable[[int, dict[str, float]], None]
Array = NDArray[np.float64]

FOLDS = 5
PENALTIES = tuple(10.0 ** (power / 2) for power in range(4, -8, -1))
"""Of the ridge, in units of the mean variance of a state's components; the largest first."""
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)
PRICES = tuple(round(place / 50, 2) for place in range(51))
"""At which frontiers are drawn: where rises are nearly proportional to the blocks left out, all depths change places within a
narrow range of prices."""
FEWEST = 2 * FOLDS


@dataclass(frozen=True)
class _Sums:
    """Of some tokens: how many, and sums of states (H,), rises (K,), and their products (H, H) and (H, K), in double precision."""

    count: int
    states: Tensor
    rises: Tensor
    squares: Tensor
    products: Tensor

    @classmethod
    def of(cls, states: Tensor, rises: Tensor) -> _Sums:
        x, y = states.double(), rises.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    def without(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count - other.count,
            self.states - other.states,
            self.rises - other.rises,
            self.squares - other.squares,
            self.products - other.products,
        )

    def weights(self, penalties: Sequence[float]) -> list[Tensor]:
        """Ridge regressions of rises on states, with an intercept that is not penalised: (H, K) each."""
        mean = self.states / self.count
        covariance = self.squares / self.count - torch.outer(mean, mean)
        shared = self.products / self.count - torch.outer(mean, self.rises / self.count)
        values, vectors = torch.linalg.eigh(covariance)
        turned = vectors.T @ shared
        typical = covariance.diagonal().mean()
        return [vectors @ (turned / (values.clamp(min=0) + one * typical).unsqueeze(-1)) for one in penalties]


def fit(
    predictor: RisePredictor,
    table: RiseTable,
    sets: Sequence[str],
    blocks: int,
    seed: int = 0,
    on_log: OnLog | None = None,
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """Fit a predictor in place; takes seconds, on the host.

    Args:
        predictor: fresh, on the host; its depths are the table's, the last one full depth.
        table: of the training inputs.
        sets: the data set of each input.
        blocks: number of blocks L.
        seed: of the folds.
        on_log: called with (step, values) for every penalty.

    Returns:
        A point per penalty, for inputs that the fit has not seen and a factor of 1: ``loss``, the squared error within sets
        as a share of the variance there, all depths together; reward, its negative; ``r2_within`` and ``r2``, of the
        shallowest depth, within sets and in all; entropy, mean_budget and histogram of the policy over `PRICES`; penalty.
        Which point was kept. And what else a record says: penalty, tokens, the ``factor``, mean ``gains`` by factor, and
        ``within``, by data set its inputs, and value, low and high (95 % over the set's inputs) of r2_within, of the gain
        with the factor that was taken, and of what an oracle gains; nats per token, at equal mean depth.

    Raises:
        UserError: too few inputs.
    """
    if len(table.contexts) < FEWEST:
        raise UserError(f"examples: {len(table.contexts)} inputs cannot be cross-fitted; take at least {FEWEST}")
    folds = torch.randperm(len(sets), generator=torch.Generator().manual_seed(seed)) % FOLDS
    parts = [_tokens(table, (folds == fold).nonzero().flatten()) for fold in range(FOLDS)]
    whole = parts[0]
    for part in parts[1:]:
        whole = _added(whole, part)
    rises = table.rises.numpy()
    unseen = _unseen(table, folds, whole, parts)
    groups = _groups(sets)
    errors = [_share_left(one, rises, groups) for one in unseen]
    kept = int(np.argmin(errors))

    predictor.nats.fill_(max(float(table.rises[:, 0].mean()), 1e-6))
    predictor.rise.copy_(table.rises.mean(0) / predictor.nats)
    predictor.mean.copy_(table.contexts.mean(0))
    curve = []
    for step, (penalty, deviations) in enumerate(zip(PENALTIES, unseen, strict=True)):
        curve.append({"step": step, "penalty": penalty, **_point(predictor, deviations, rises, groups, blocks)})
        if on_log is not None:
            on_log(step, {key: value for key, value in curve[-1].items() if isinstance(value, float)})
    gains = [
        {
            name: _gain(predictor, factor * unseen[kept][rows], rises[rows], blocks, 0)[0]
            for name, rows in groups.items()
        }
        for factor in FACTORS
    ]
    means = [float(np.mean(list(one.values()))) for one in gains]
    best = int(np.argmax(means))
    with torch.no_grad():
        weight = whole.weights(PENALTIES)[kept]
        predictor.weight.copy_(FACTORS[best] * weight / predictor.nats)
    logger.info("penalty %g, factor %g", PENALTIES[kept], FACTORS[best])
    within = {
        name: {
            "n": len(rows),
            "r2_within": interval(_explained(unseen[kept][rows], rises[rows], blocks)),
            "gain": interval(_gain(predictor, FACTORS[best] * unseen[kept][rows], rises[rows], blocks)),
            "oracle": interval(_over_frontier(predictor, _chosen(predictor, rises[rows]), rises[rows], blocks)),
        }
        for name, rows in groups.items()
    }
    said = {"factor": FACTORS[best], "gains": dict(zip(map(str, FACTORS), means, strict=True)), "within": within}
    return curve, kept, {**said, "penalty": PENALTIES[kept], "tokens": len(table.owner)}


def _tokens(table: RiseTable, inputs: Tensor) -> _Sums:
    """Sums over the tokens of these inputs."""
    mine = torch.isin(table.owner, inputs)
    return _Sums.of(table.states[mine], table.token_rises[mine])


def _added(one: _Sums, other: _Sums) -> _Sums:
    return _Sums(
        one.count + other.count,
        one.states + other.states,
        one.rises + other.rises,
        one.squares + other.squares,
        one.products + other.products,
    )


def _unseen(table: RiseTable, folds: Tensor, whole: _Sums, parts: Sequence[_Sums]) -> list[Array]:
    """Per penalty the deviations (N, K), nats, that fits without an input's fold estimate for it."""
    found = [np.zeros(table.rises.shape) for _ in PENALTIES]
    for fold, part in enumerate(parts):
        here = folds == fold
        contexts = table.contexts.double()
        offset = contexts[here] - contexts[~here].mean(0)
        for deviations, weight in zip(found, whole.without(part).weights(PENALTIES), strict=True):
            deviations[here.numpy()] = (offset @ weight).numpy()
    return found


def _groups(sets: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Rows by data set, of sets with at least two inputs."""
    names = np.array(sets)
    found = {name: np.flatnonzero(names == name) for name in dict.fromkeys(sets)}
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def _centred(values: Array, groups: dict[str, NDArray[np.int64]]) -> Array:
    """Less the mean of each set."""
    found = values - values.mean(0)
    for rows in groups.values():
        found[rows] = values[rows] - values[rows].mean(0)
    return found


def _share_left(deviations: Array, rises: Array, groups: dict[str, NDArray[np.int64]]) -> float:
    """Squared error within sets as a share of the variance there, mean over the depths at which there is any."""
    true = _centred(rises, groups)
    left = np.square(true - _centred(deviations, groups)).sum(0)
    there = np.square(true).sum(0)
    return float(np.mean(left[there > 0] / there[there > 0])) if (there > 0).any() else 1.0


def _r2(estimated: Array, true: Array) -> float:
    """Share of the variance (n,) that an estimate explains; its mean need not be right."""
    variance = float(np.var(true))
    return 1 - float(np.var(true - estimated)) / variance if variance > 0 else 0.0


def _chosen(predictor: RisePredictor, losses: Array) -> NDArray[np.int64]:
    """Places of the depths (n, P) that losses (n, K), in nats, lead to at `PRICES`."""
    prices, cost = np.array(PRICES)[:, None], predictor.cost.double().numpy()
    scaled = losses[:, None] / float(predictor.nats)
    found: NDArray[np.int64] = ((1 - prices) * scaled + prices * cost).argmin(-1)
    return found


def _gain(
    predictor: RisePredictor, deviations: Array, rises: Array, blocks: int, resamples: int = INTERVAL_RESAMPLES
) -> Array:
    """How far the frontier of one set's inputs is below constant depths of equal mean, nats, mean over its span: (R,), the
    first of all inputs alike."""
    mean = float(predictor.nats) * predictor.rise.double().numpy()
    return _over_frontier(predictor, _chosen(predictor, mean + deviations), rises, blocks, resamples)


def _over_frontier(
    predictor: RisePredictor,
    chosen: NDArray[np.int64],
    rises: Array,
    blocks: int,
    resamples: int = INTERVAL_RESAMPLES,
) -> Array:
    table = Table.of(rises, predictor.depths.numpy(), blocks, resamples)
    depth, loss = table.at(chosen)
    gain, span = table.constant(depth) - loss, np.ptp(depth, axis=1)
    found: Array = np.where(span > 0, area(depth, gain, 1) / np.where(span > 0, span, 1), gain.mean(1))
    return found


def _explained(deviations: Array, rises: Array, blocks: int) -> Array:
    """R squared (R,) at the shallowest depth, whatever the mean, of all inputs alike and of resampled ones."""
    table = Table.of(rises, np.arange(rises.shape[1]), blocks, INTERVAL_RESAMPLES)
    true, left = rises[:, 0], rises[:, 0] - deviations[:, 0]
    spread, rest = (table.mean(values**2) - table.mean(values) ** 2 for values in (true, left))
    return 1 - rest / np.maximum(spread, 1e-300)


def _point(
    predictor: RisePredictor, deviations: Array, rises: Array, groups: dict[str, NDArray[np.int64]], blocks: int
) -> dict[str, Any]:
    """A point of the curve."""
    estimated = predictor.rise + torch.from_numpy(deviations).float() / predictor.nats
    logits = predictor.weighed(estimated, torch.tensor(PRICES).unsqueeze(1).expand(-1, len(rises)))
    loss = _share_left(deviations, rises, groups)
    return {
        "loss": loss,
        "reward": -loss,
        "r2_within": _r2(_centred(deviations, groups)[:, 0], _centred(rises, groups)[:, 0]),
        "r2": _r2(deviations[:, 0], rises[:, 0]),
        "entropy": float(entropy(logits).mean()),
        "mean_budget": float((logits.softmax(-1) * predictor.depths).sum(-1).mean() / blocks),
        "histogram": torch.bincount(logits.argmax(-1).flatten(), minlength=len(predictor.depths)).tolist(),
    }
