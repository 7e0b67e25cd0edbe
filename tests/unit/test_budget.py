"""Budget arithmetic against exact fractions."""

from fractions import Fraction

import pytest
import torch

from buddy.errors import BudgetError
from buddy.routing.budget import executed_blocks, executed_per_sequence, round_half_up


def exact_half_up(numerator: int, denominator: int, blocks: int) -> int:
    """floor(b * L + 1/2) in rational arithmetic."""
    return (Fraction(numerator, denominator) * blocks + Fraction(1, 2)).__floor__()


@pytest.mark.parametrize("blocks", range(4, 81))
def test_rounding_is_half_up_for_every_depth(blocks):
    for denominator in (2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 80, 100):
        for numerator in range(1, denominator + 1):
            expected = exact_half_up(numerator, denominator, blocks)
            if expected >= 2:
                assert executed_blocks(numerator / denominator, blocks) == expected
            else:
                with pytest.raises(BudgetError):
                    executed_blocks(numerator / denominator, blocks)


@pytest.mark.parametrize("blocks", range(4, 81))
def test_the_fraction_of_a_count_gives_the_count_back(blocks):
    for executed in range(2, blocks + 1):
        assert executed_blocks(executed / blocks, blocks) == executed


def test_halves_go_up_where_python_rounds_to_even():
    assert [round_half_up(x) for x in (0.5, 1.5, 2.5, 22.5)] == [1, 2, 3, 23]


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), True, "half"])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(BudgetError, match="budget"):
        executed_blocks(budget, 30)


def test_a_budget_below_the_blocks_that_always_run_names_the_nearest_legal_ones():
    with pytest.raises(BudgetError, match=r"would run 1 of 30 blocks, but 2 always run.*0\.06667 \(2 blocks\)"):
        executed_blocks(0.04, 30)
    with pytest.raises(BudgetError, match=r"but 4 always run.*0\.5 \(4 blocks\)"):
        executed_blocks(0.25, 8, always=4)
    with pytest.raises(BudgetError, match=r"largest is 1, which runs all 30"):
        executed_blocks(1.5, 30)


def test_one_budget_per_sequence():
    counts = executed_per_sequence([0.5, 1.0], batch=4, blocks=8, always=2, device="cpu")
    assert counts.tolist() == [4, 4, 8, 8]
    assert executed_per_sequence(torch.tensor([0.25]), 2, 8, 2, "cpu").tolist() == [2, 2]
    with pytest.raises(BudgetError, match="3 fractions do not fit a batch of 4"):
        executed_per_sequence([0.5, 0.5, 1.0], 4, 8, 2, "cpu")
