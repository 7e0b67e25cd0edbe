"""What a budget predictor is worth on inputs it has not seen: its frontier beside those that do not look at the input.

The metrics of a record of kind ``budget`` (losses in nats per token, depths in executed blocks, intervals of 95 % over
resampled inputs):

- ``loss``: what is compared: ``ce``, cross-entropies of responses; of a predictor by preset ``rise`` ``kl``, the mean over an
  input's tokens of KL(full depth || depth). Figures of either are called ``ce``, as in records of before there were two.
- ``dataset``, ``rows`` (which of its rows), ``preset``, ``blocks``, ``depths`` (those of the table, every one from the
  predictor's shallowest to full depth), ``choices`` (those the predictor has), ``price`` (its own; null without one).
- ``constants``: a point per depth: depth_mean, ce_mean, low, high. ``hull``: corners of their lower convex hull: what
  mixing two constants at random reaches, the best random budget.
- ``predictor``: a point per price (one, of price null, without): price, depth_mean, ce_mean, low, high; ``constant``: the
  hull at that mean depth; ``interpolated``: the constants, linear between neighbours; ``random``: the same choices on
  inputs at random; ``gain``: how far ce_mean is below the hull, with gain_low and gain_high; ``entropy`` of the policy,
  nats, mean over inputs.
- ``sampled``: the same if depths are drawn from the policy, an exact expectation.
- ``oracle``: the best depth of every input at each price, likewise; ``oracle_gain``: its mean gain over its own frontier.
- ``r2``: share of the variance between these inputs of the loss at the shallowest depth, beyond that of full depth, that
  the predictor's estimate explains, whatever its mean: value, low, high; null without a price.
- ``area``: between hull and predictor over its mean depths, nats times fraction of blocks, value, low, high; null without
  a price, like ``area_random``, against the same choices at random. ``gain``: the mean gain over the frontier, nats.
- ``beats_constant``: whether the interval of that gain lies above zero.
- ``entropy``: at the predictor's own price; ``entropy_uniform``: ln K. ``histogram``: how often each of ``choices`` is
  chosen there; ``histograms``: at each price.
- ``spearman``: rank correlation of the loss at full depth (of ``kl``, which is 0 there, at the shallowest) and the depth
  chosen, its mean over prices, with interval; null where every input gets the same.
- ``inputs``: per input ce_full, depth (mean over prices), chosen (at its own price), ce (there); the first 1000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buddy.frontiers import Array, Places, Table, area, hull, interval, intervals, rank_correlation
from buddy.policies.predictor import DepthPredictor
from buddy.resampling import INTERVAL_RESAMPLES

PRICES = tuple(round(place / 20, 2) for place in range(21))
"""Prices at which a frontier is drawn."""
FINE_PRICES = tuple(round(place / 50, 2) for place in range(51))
"""The same for divergences, which grow so evenly with the blocks left out that all depths change places within few prices."""

KEPT_INPUTS = 1000


def table_depths(predictor: DepthPredictor, blocks: int) -> list[int]:
    """Every depth from the predictor's shallowest to full depth."""
    return list(range(int(predictor.depths[0]), blocks + 1))


def measure(
    predictor: DepthPredictor,
    contexts: Tensor,
    losses: Tensor,
    blocks: int,
    resamples: int = INTERVAL_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The metrics of a record, but for where the inputs are from.

    Args:
        predictor: trained, on the host.
        contexts: (N, width) of the inputs.
        losses: (N, D), their cross-entropies at `table_depths`.
        blocks: number of blocks L.
        resamples: of the inputs, for intervals.
        seed: of the resampling.
    """
    depths = table_depths(predictor, blocks)
    table = Table.of(losses.numpy(), depths, blocks, resamples, seed)
    drawn = PRICES if predictor.loss == "ce" else FINE_PRICES
    prices: list[float | None] = [*drawn] if predictor.priced else [None]
    chances = np.stack([_chances(predictor, contexts, price) for price in prices], 1)
    places = predictor.depths.numpy() - depths[0]
    chosen = places[chances.argmax(-1)]
    own = _chances(predictor, contexts, predictor.price)
    depth, ce = table.at(chosen)
    gain = table.constant(depth) - ce
    frontier = _mean_gain(depth, gain)
    known = _known(table, _unit(predictor, table), drawn)
    return {
        "loss": predictor.loss,
        "preset": predictor.preset,
        "blocks": blocks,
        "depths": depths,
        "choices": predictor.depths.tolist(),
        "price": predictor.price,
        **_constants(table),
        "predictor": _points(table, prices, depth, ce, chosen, chances),
        "sampled": _sampled(table, prices, chances, places),
        "oracle": _oracle(table, drawn, known),
        "oracle_gain": _mean_gain(*_gains(table, known)),
        "r2": _explained(predictor, contexts, table) if predictor.priced else None,
        "area": interval(area(depth, gain, blocks)) if predictor.priced else None,
        "area_random": interval(area(depth, table.shuffled(chosen) - ce, blocks)) if predictor.priced else None,
        "gain": frontier,
        "beats_constant": frontier["low"] > 0,
        "entropy": _entropy(own),
        "entropy_uniform": math.log(len(places)),
        "histogram": np.bincount(own.argmax(-1), minlength=len(places)).tolist(),
        "histograms": [np.bincount(column, minlength=len(places)).tolist() for column in chances.argmax(-1).T],
        "spearman": rank_correlation(
            table.losses[:, -1 if predictor.loss == "ce" else 0], table.depths[chosen].mean(1), table.weights
        ),
        "inputs": _inputs(table, chosen, places[own.argmax(-1)]),
    }


@torch.no_grad()
def _chances(predictor: DepthPredictor, contexts: Tensor, price: float | None) -> Array:
    """(N, K): the policy."""
    found: Array = predictor(contexts, price).double().softmax(-1).numpy()
    return found


def _entropy(chances: Array) -> float:
    """Mean entropy of policies (N, K), nats."""
    return float(-(chances * np.log(np.maximum(chances, 1e-300))).sum(-1).mean())


def _mean_gain(depth: Array, gain: Array) -> dict[str, float]:
    """The gain, mean over the range of mean depths that a frontier spans; at a single point the gain there."""
    span = np.ptp(depth, axis=1)
    over = np.where(span > 0, area(depth, gain, 1) / np.where(span > 0, span, 1), gain.mean(1))
    return interval(over)


def _constants(table: Table) -> dict[str, Any]:
    points = intervals(table.mean(table.losses), "ce_mean")
    means = np.array([point["ce_mean"] for point in points])
    corners = zip(*hull(table.depths, means), strict=True)
    return {
        "constants": [{"depth_mean": float(depth), **point} for depth, point in zip(table.depths, points, strict=True)],
        "hull": [{"depth_mean": float(depth), "ce_mean": float(ce)} for depth, ce in corners],
    }


def _points(
    table: Table, prices: list[float | None], depth: Array, ce: Array, chosen: Places, chances: Array
) -> list[dict[str, Any]]:
    """A point per price."""
    constant, random = table.constant(depth), table.shuffled(chosen)
    found = []
    for place, (price, quality, gain) in enumerate(
        zip(prices, intervals(ce, "ce_mean"), intervals(constant - ce, "gain"), strict=True)
    ):
        found.append(
            {
                "price": price,
                "depth_mean": float(depth[0, place]),
                **quality,
                "constant": float(constant[0, place]),
                "interpolated": float(np.interp(depth[0, place], table.depths, table.losses.mean(0))),
                "random": float(random[0, place]),
                "gain": gain["gain"],
                "gain_low": gain["low"],
                "gain_high": gain["high"],
                "entropy": _entropy(chances[:, place]),
            }
        )
    return found


def _sampled(table: Table, prices: list[float | None], chances: Array, places: Places) -> list[dict[str, Any]]:
    """The same if depths are drawn: expectations over the policy."""
    depth = table.mean(chances @ table.depths[places])
    ce = table.mean((chances * table.losses[:, None, places]).sum(-1))
    gains = intervals(table.constant(depth) - ce, "gain")
    return [
        {
            "price": price,
            "depth_mean": float(depth[0, place]),
            "ce_mean": float(ce[0, place]),
            "gain": gain["gain"],
            "gain_low": gain["low"],
            "gain_high": gain["high"],
        }
        for place, (price, gain) in enumerate(zip(prices, gains, strict=True))
    ]


def _unit(predictor: DepthPredictor, table: Table) -> float:
    """Nats that count as a loss of 1 where prices are weighed: the predictor's, or the rise over this table."""
    if predictor.priced:
        return float(predictor.nats)
    return max(float(np.sqrt(np.square(table.losses[:, 0] - table.losses[:, -1]).mean())), 1e-6)


def _known(table: Table, unit: float, prices: Sequence[float]) -> Places:
    """(N, P): the best depth of every input, known only afterwards, at each price."""
    cost = (table.depths - table.depths[0]) / (table.depths[-1] - table.depths[0])
    rises = (table.losses - table.losses[:, -1:]) / unit
    return np.stack([((1 - price) * rises + price * cost).argmin(1) for price in prices], 1)


def _oracle(table: Table, prices: Sequence[float], known: Places) -> list[dict[str, Any]]:
    """Points of who chooses so."""
    depth, ce = table.at(known)
    return [
        {"price": price, "depth_mean": float(mean), **quality}
        for price, mean, quality in zip(prices, depth[0], intervals(ce, "ce_mean"), strict=True)
    ]


def _gains(table: Table, chosen: Places) -> tuple[Array, Array]:
    """Mean depths, and how far mean losses are below constant depths there, (R, P) each."""
    depth, ce = table.at(chosen)
    return depth, table.constant(depth) - ce


@torch.no_grad()
def _explained(predictor: DepthPredictor, contexts: Tensor, table: Table) -> dict[str, float] | None:
    """R squared of the estimated rise at the shallowest depth, means left aside; None where nothing rises."""
    true = table.losses[:, 0] - table.losses[:, -1]
    estimated = predictor.losses(contexts).double().numpy()
    left = true - float(predictor.nats) * (estimated[:, 0] - estimated[:, -1])
    if np.ptp(true) == 0:
        return None
    spread, rest = (table.mean(values**2) - table.mean(values) ** 2 for values in (true, left))
    return interval(1 - rest / np.maximum(spread, 1e-300))


def _inputs(table: Table, chosen: Places, own: Places) -> dict[str, list[float]]:
    kept = slice(0, KEPT_INPUTS)
    return {
        "ce_full": table.losses[kept, -1].round(5).tolist(),
        "depth": table.depths[chosen].mean(1)[kept].round(3).tolist(),
        "chosen": table.depths[own][kept].astype(int).tolist(),
        "ce": np.take_along_axis(table.losses, own[:, None], 1)[kept, 0].round(5).tolist(),
    }
