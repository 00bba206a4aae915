"""The growing grid, on invented losses."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison.grid import BASELINE, MOST, Arm, Cell, arms, following, tuned

Landscape = Callable[[Cell], float]


def play(grids: list[Arm], landscape: Landscape) -> tuple[dict[Cell, float], list[int]]:
    """Return all losses at the end, and the number of trials of each round."""
    losses: dict[Cell, float] = {}
    rounds = []
    while wanted := following(grids, losses):
        assert not set(wanted) & losses.keys()
        assert len(set(wanted)) == len(wanted)
        rounds.append(len(wanted))
        losses |= {cell: landscape(cell) for cell in wanted}
        assert len(rounds) < 20
    return losses, rounds


def bowl(best: float, alpha: float | None = None, edge: float = math.inf) -> Landscape:
    """Return a loss that is lowest at a rate, and at an alpha if one is given; above the edge trainings break off."""

    def loss(cell: Cell) -> float:
        if cell.lr > edge:
            return math.inf
        return 1 + math.log2(cell.lr / best) ** 2 + (alpha is not None and cell.alpha != alpha)

    return loss


def test_the_first_round_is_three_points_each_and_both_alphas_of_lora() -> None:
    wanted = following(arms(["lora", "olora"], 16, 16), {})
    rates = {(method, alpha): [cell.lr for cell in wanted if (cell.method, cell.alpha) == (method, alpha)]
             for method, alpha in [("lora", 16.0), ("lora", 32.0), ("olora", 16.0)]}  # fmt: skip
    assert rates["lora", 16.0] == rates["lora", 32.0] == [1.6e-3, 3.2e-3, 6.4e-3]
    assert rates["olora", 16.0] == [2e-4, 4e-4, 8e-4]
    assert len(wanted) == 9
    assert len({arm.centre for arm in arms(["pissa", "pissa_fast"], 16, 16)}) == 1, "the same factors, but for noise"


@given(st.floats(-3.4, 5.4), st.integers(0, 1))
def test_a_bowl_is_found_with_worse_points_on_both_sides(power: float, which: int) -> None:
    grids = [Arm("lora", 16.0, 1e-3), Arm("other", 16.0, 1e-3)]
    landscape = bowl(1e-3 * 2**power)
    losses, _ = play(grids, landscape)
    found = tuned(grids[which].method, grids, losses, base=1e9, relevant=0.01)
    assert found is not None
    assert abs(math.log2(found.cell.lr / 1e-3) - power) <= 0.5 + 1e-9
    assert found.inside
    assert found.points <= MOST


def test_a_best_point_beyond_seven_is_said_to_lie_at_the_end() -> None:
    grids = [Arm("lora", 16.0, 1e-3)]
    losses, _ = play(grids, bowl(1.0))
    found = tuned("lora", grids, losses, 1e9, 0.01)
    assert found is not None
    assert len(losses) == found.points == MOST
    assert not found.inside
    assert found.cell.lr == 1e-3 * 2**6


def test_where_all_break_off_smaller_rates_are_tried() -> None:
    grids = [Arm("lora", 16.0, 1e-3)]
    losses, rounds = play(grids, bowl(1e-4, edge=3e-4))
    assert rounds[:3] == [3, 1, 1]
    found = tuned("lora", grids, losses, 1e9, 0.01)
    assert found is not None
    assert found.cell.lr == 1.25e-4
    assert found.diverged == 4
    play(grids, lambda cell: math.inf)
    assert tuned("lora", grids, dict.fromkeys(losses, math.inf), 1e9, 0.01) is None


def test_what_ends_above_the_base_counts_as_diverged() -> None:
    grids = [Arm("lora", 16.0, 1e-3)]
    losses, _ = play(grids, bowl(2e-3))
    found = tuned("lora", grids, losses, base=1.5, relevant=0.01)
    assert found is not None
    assert (found.diverged, found.points, found.inside) == (2, 3, True)


def test_the_width_is_that_of_the_rates_near_the_best() -> None:
    grids = [Arm("lora", 16.0, 1e-3)]
    values = {0: 1.005, 1: 1.0, 2: 1.009, 3: 1.02}
    losses, _ = play(grids, lambda cell: values.get(round(math.log2(cell.lr / 1e-3)), 2.0))
    found = tuned("lora", grids, losses, 9.0, relevant=0.01)
    assert found is not None
    assert found.width == 4.0


@given(st.floats(-4, 8), st.floats(-4, 8))
def test_lora_has_at_least_as_many_points_as_any_other(own: float, other: float) -> None:
    grids = [Arm("lora", 16.0, 1e-3), Arm("lora", 32.0, 1e-3), Arm("olora", 16.0, 1e-3)]

    def landscape(cell: Cell) -> float:
        return bowl(1e-3 * 2 ** (own if cell.method == BASELINE else other))(cell)

    losses, _ = play(grids, landscape)
    count = {method: sum(cell.method == method for cell in losses) for method in ("lora", "olora")}
    assert count["lora"] >= count["olora"]
    assert count["olora"] <= MOST


def test_lora_at_its_best_has_the_better_alpha() -> None:
    grids = arms(["lora", "olora"], 16, 16)
    losses, _ = play(grids, bowl(3.2e-3, alpha=32.0))
    found = tuned("lora", grids, losses, 9.0, 0.01)
    assert found is not None
    assert found.cell == Cell("lora", 32.0, 3.2e-3)


@pytest.mark.parametrize("cut", range(1, 9))
def test_what_is_tried_follows_from_the_losses_alone(cut: int) -> None:
    """After an interruption in a round, the grid asks for the missing trials of that round and for no others."""
    grids, landscape = arms(["lora", "olora"], 16, 16), bowl(3.2e-3)
    first = following(grids, {})
    some = {cell: landscape(cell) for cell in first[:cut]}
    rest = set(following(grids, some))
    assert rest >= set(first[cut:])
    losses, _ = play(grids, landscape)
    assert rest <= losses.keys()


def test_of_equal_losses_the_smaller_rate_is_taken() -> None:
    grids = [Arm("lora", 16.0, 1e-3)]
    losses, _ = play(grids, lambda cell: 1.0)
    found = tuned("lora", grids, losses, 9.0, 0.01)
    assert found is not None
    assert found.cell.lr == min(cell.lr for cell in losses)
    assert len(losses) == MOST


def test_a_point_beside_the_grid_is_none_of_it_until_the_grid_comes_there() -> None:
    grids = [Arm("lora", 16.0, 1e-3)]
    beside = {Cell("lora", 16.0, 2.5e-4): 0.0, Cell("lora", 16.0, 1.1e-3): 0.0}
    started = beside | {Cell("lora", 16.0, 1e-3 * 2**power): 2.0 + abs(power - 1) for power in range(3)}
    assert following(grids, started) == []
    found = tuned("lora", grids, started, 9.0, 0.01)
    assert found is not None
    assert (found.cell.lr, found.points) == (2e-3, 3)
    lowest_first = beside | {Cell("lora", 16.0, 1e-3 * 2**power): 2.0 + power for power in range(3)}
    assert following(grids, lowest_first) == [Cell("lora", 16.0, 5e-4)]
    arrived = lowest_first | {Cell("lora", 16.0, 5e-4): 1.0}
    assert following(grids, arrived) == [Cell("lora", 16.0, 1.25e-4)]
