from hypothesis import given
from hypothesis import strategies as st

from olora_ray.tokens.shard import pack


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The quadratic textbook version."""
    packs: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((p for p, space in enumerate(free) if space >= lengths[index]), len(packs))
        if place == len(packs):
            packs.append([])
            free.append(capacity)
        packs[place].append(index)
        free[place] -= lengths[index]
    return packs


@given(
    st.integers(1, 60).flatmap(
        lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=80))
    )
)
def test_packs_are_those_of_first_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    packs = pack(lengths, capacity)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= capacity for members in packs)
    assert packs == first_fit_decreasing(lengths, capacity)
