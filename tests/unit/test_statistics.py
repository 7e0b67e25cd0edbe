"""Every formula of docs/statistics.md against scipy, an exhaustive definition, or a simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from scipy import integrate, spatial, stats

from buddy import frontiers
from buddy.backbones.untrained import byte_tokenizer
from buddy.data import materialise
from buddy.evaluation import accuracy
from buddy.evaluation.harness import BuddyLM
from buddy.policies.static import StaticPolicy
from buddy.reporting import compare, measures, significance
from buddy.reporting.measures import Measure
from buddy.resampling import estimate, mean_interval, ratio
from buddy.routing.model import RoutedModel
from buddy.settings import Evaluation

SIZES = (120, 300, 80)
"""Items of three tasks."""


def answers(rng, chance=(0.7, 0.5, 0.3)):
    """Right and wrong answers to the items of each task."""
    return [(rng.random(size) < share).astype(float) for size, share in zip(SIZES, chance, strict=True)]


def mean_of_means(*groups, axis=-1):
    return sum(np.mean(group, axis=axis) for group in groups) / len(groups)


# ---- standard errors -----------------------------------------------------------------------------------------------------


def test_the_error_of_a_task_is_that_of_a_mean(tmp_path):
    backbone = tiny()
    backbone.resize_token_embeddings(300)
    materialise("piqa", "embedded", tmp_path / "piqa")
    lm = BuddyLM(RoutedModel(backbone, StaticPolicy(7), tokenizer=byte_tokenizer()))
    found = accuracy.measure(lm, 1.0, Evaluation(tasks=["piqa"], limit=24), tmp_path)["tasks"]["piqa"]
    for metric in ("acc", "acc_norm"):
        items = [int(digit) for digit in found["items"][metric]]
        assert found[f"{metric}_stderr"] == pytest.approx(stats.sem(items))


def test_the_error_of_an_average_is_its_deviation_over_studies():
    rng = np.random.default_rng(1)
    studies = [answers(rng) for _ in range(20_000)]
    errors = [
        measures.average([Measure(value=task.mean(), stderr=stats.sem(task), n=len(task)) for task in study]).stderr
        for study in studies[:200]
    ]
    assert np.mean(errors) == pytest.approx(np.std([mean_of_means(*study) for study in studies]), rel=0.03)


def test_over_seeds_errors_are_averaged_and_deviations_told():
    seeds = [
        Measure(value=value, stderr=error, n=100, seeds=1) for value, error in ((50.0, 2.0), (53.0, 2.2), (52.0, 1.8))
    ]
    found = measures.over_seeds(seeds, 3)
    assert found.value == pytest.approx(np.mean([50, 53, 52]))
    assert found.stderr == pytest.approx(2.0)  # the same items: more seeds make it no smaller
    assert found.seed_sd == pytest.approx(stats.tstd([50, 53, 52]))


def test_the_error_of_a_median_is_that_of_scipys_bootstrap():
    passes = tuple(np.random.default_rng(2).lognormal(3, 0.2, 15).tolist())
    expected = stats.bootstrap((passes,), np.median, n_resamples=20_000, rng=3).standard_error
    assert measures.bootstrap(passes) == pytest.approx(expected, rel=0.1)


# ---- intervals and paired differences ------------------------------------------------------------------------------------


def test_intervals_are_scipys_percentile_bootstrap():
    groups = answers(np.random.default_rng(4))
    expected = stats.bootstrap(
        groups, mean_of_means, n_resamples=20_000, method="percentile", vectorized=True, rng=5
    ).confidence_interval
    found = estimate(groups)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.003)
    assert found.items == sum(SIZES)
    values = np.random.default_rng(6).normal(3, 2, 90)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=7).confidence_interval
    assert mean_interval(values)[1:] == pytest.approx(tuple(expected), abs=0.06)


def test_a_paired_p_is_near_that_of_the_t_test_where_that_holds():
    rng = np.random.default_rng(8)
    for shift in (0.0, 0.05, 0.1, 0.15):
        values = rng.normal(shift, 1.0, 400)
        assert estimate([values]).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_pairing_takes_out_what_items_have_in_common():
    rng = np.random.default_rng(9)
    hard = [rng.normal(0, 3, size) for size in SIZES]
    ours, theirs = ([one + rng.normal(0, 1, len(one)) for one in hard] for _ in range(2))
    paired = estimate([one - other for one, other in zip(ours, theirs, strict=True)], 2000)
    apart = np.hypot(*(np.ptp([found.low, found.high]) for found in (estimate(ours, 2000), estimate(theirs, 2000))))
    assert (paired.high - paired.low) / apart == pytest.approx((2 / (2 + 2 * 9)) ** 0.5, rel=0.15)


@pytest.mark.parametrize("kind", ["difference", "ratio"])
def test_of_100_studies_without_a_difference_5_find_one_and_95_intervals_hold_the_truth(kind):
    rng = np.random.default_rng(10)
    rejected = covered = 0
    studies = 600
    for _ in range(studies):
        ours, theirs = [], []
        for same, one, other in zip(answers(rng), answers(rng), answers(rng), strict=True):
            differs = rng.random(len(same)) < 0.3  # two models agree on most items
            ours.append(np.where(differs, one, same))
            theirs.append(np.where(differs, other, same))
        if kind == "ratio":
            found, truth = ratio(ours, theirs, 1000), 1.0
        else:
            found, truth = estimate([one - other for one, other in zip(ours, theirs, strict=True)], 1000), 0.0
        rejected += found.p < 0.05
        covered += found.low <= truth <= found.high
    # Three standard errors of a share of 600 studies are 2.7 points.
    assert rejected / studies == pytest.approx(0.05, abs=0.027)
    assert covered / studies == pytest.approx(0.95, abs=0.027)


# ---- ratios --------------------------------------------------------------------------------------------------------------


def test_a_ratio_is_scipys_paired_bootstrap():
    rng = np.random.default_rng(11)
    theirs = (rng.random(500) < 0.6).astype(float)
    ours = np.where(rng.random(500) < 0.15, 1 - theirs, theirs)

    def of(one, other, axis=-1):
        return one.mean(axis) / other.mean(axis)

    expected = stats.bootstrap((ours, theirs), of, paired=True, n_resamples=20_000, method="percentile", rng=12)
    found = ratio([ours], [theirs])
    assert found.value == pytest.approx(ours.mean() / theirs.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.004)
    # The delta method, of a ratio r: var(ours - r theirs) / (n mean(theirs)^2).
    error = np.std(ours - found.value * theirs, ddof=1) / 500**0.5 / theirs.mean()
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.05)


def test_a_ratio_of_averages_over_tasks_by_resampling_item_by_item():
    rng = np.random.default_rng(13)
    theirs = answers(rng)
    ours = [np.where(rng.random(len(one)) < 0.2, 0.0, one) for one in theirs]
    found = ratio(ours, theirs)
    assert found.value == pytest.approx(mean_of_means(*ours) / mean_of_means(*theirs))
    resampled = []
    for _ in range(4000):
        drawn = [rng.integers(size, size=size) for size in SIZES]
        tops, bottoms = ([one[at] for one, at in zip(side, drawn, strict=True)] for side in (ours, theirs))
        resampled.append(mean_of_means(*tops) / mean_of_means(*bottoms))
    assert (found.low, found.high) == pytest.approx(np.percentile(resampled, (2.5, 97.5)), abs=0.005)
    assert found.p == pytest.approx(2 / 10_001)
    assert ratio(theirs, theirs).p == 1.0


def test_what_has_no_ratio_is_refused():
    with pytest.raises(ValueError, match="not the same items"):
        ratio([np.ones(3)], [np.ones(4)])
    with pytest.raises(ValueError, match="all of theirs are 0"):
        ratio([np.ones(3)], [np.zeros(3)])
    assert (
        ratio([np.ones(2)], [np.array([0.0, 1.0])]).high == np.inf
    )  # half of the resamples may hold nothing to divide by


# ---- many comparisons ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_by_bonferroni(p):
    """A claim holds at a level if every set of claims that it belongs to is rejected by Bonferroni: the definition."""
    places = range(len(p))
    for place, found in zip(places, significance.holm(p), strict=True):
        sets = [
            chosen
            for size in range(1, len(p) + 1)
            for chosen in itertools.combinations(places, size)
            if place in chosen
        ]
        assert found == pytest.approx(max(min(1.0, len(chosen) * min(p[one] for one in chosen)) for chosen in sets))


# ---- frontiers of a budget predictor -------------------------------------------------------------------------------------


def test_the_hull_of_constant_depths_is_the_lower_convex_hull():
    rng = np.random.default_rng(14)
    for _ in range(20):
        depths = np.arange(4.0, 16.0)
        losses = rng.random(12) + 8 / depths
        corners = spatial.ConvexHull(np.stack([depths, losses], 1))
        lower = sorted(
            {
                int(vertex)
                for facet, (_, up, _) in zip(corners.simplices, corners.equations, strict=True)
                for vertex in facet
                if up < 0  # the outside is below
            }
        )
        assert np.array_equal(frontiers.hull(depths, losses)[0], depths[lower])


def test_areas_and_rank_correlations_are_scipys():
    rng = np.random.default_rng(15)
    depth, gain = rng.random((3, 8)) * 10, rng.normal(size=(3, 8))
    for found, across, up in zip(frontiers.area(depth, gain, 10), depth, gain, strict=True):
        order = np.argsort(across)
        assert found == pytest.approx(integrate.trapezoid(up[order], across[order] / 10))
    one, other = rng.integers(0, 6, 60).astype(float), rng.normal(size=60)
    weights = np.full((2, 60), 1 / 60)
    assert frontiers.rank_correlation(one, other, weights)["value"] == pytest.approx(
        stats.spearmanr(one, other).statistic
    )


def test_the_interval_beside_a_published_figure_holds_items_and_seeds():
    measure = Measure(value=60.0, stderr=0.5, seed_sd=0.3, seeds=3)
    expected = stats.norm(60, (0.5**2 + 0.3**2 / 3) ** 0.5).interval(0.95)
    assert compare.interval(measure) == pytest.approx(expected, abs=1e-3)
    assert compare.interval(Measure(value=60.0)) is None
