"""The generated stays follow the written law, and the best answer is right as often as the law says."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from generate import AFTER, KINDS, OTHER_DAY, Law, Settings, visits
from hypothesis import given
from hypothesis import strategies as st
from stays import When

SMALL = Settings(people=3, days=30, explore=0.3, seed=4)


@pytest.fixture(scope="module")
def law() -> Law:
    return Law(SMALL)


@given(st.integers(0, 2), st.integers(0, 6), st.integers(0, 1439), st.integers(0, 90), st.integers(0, 40))
def test_chances_are_probabilities(law: Law, person: int, day: int, minute: int, before: int, visited: int) -> None:
    previous = before + 9 if before else None  # place 10 to 99
    found = law.probabilities(person, When(day, minute), previous, visited)
    assert math.isclose(sum(found.values()), 1, rel_tol=1e-9)
    assert min(found.values()) >= 0
    assert found.get(previous or -1, 0.0) == 0.0
    others = set(found) - set(law.people[person].places.tolist())
    explored = min(0.5, 0.3 * max(visited, 1) ** -0.21)
    assert math.isclose(sum(found[place] for place in others), explored, rel_tol=1e-9)
    assert len({found[place] for place in others}) == 1


def test_the_chances_are_the_formula_of_the_docstring(law: Law) -> None:
    person = law.people[0]
    when, previous = When(2, 13 * 60 + 10), next(iter(law.town["work"]))
    strength = {
        place: weight * curve(kind, 13 - person.late) * days[2] * AFTER.get(("work", kind), 1.0) * (place != previous)
        for place, kind, weight, days in zip(
            person.places.tolist(), person.kinds, person.weights, person.days, strict=True
        )
    }
    explored = 0.3 * 12**-0.21
    found = law.probabilities(0, when, previous, 12)
    for place, value in strength.items():
        assert math.isclose(found.get(place, 0.0), (1 - explored) * value / sum(strength.values()), abs_tol=1e-12)


def curve(kind: str, hour: float) -> float:
    bumps = [(((hour - middle + 12) % 24 - 12) / width, height) for middle, width, height in KINDS[kind].weekday]
    return 1e-3 + sum(height * math.exp(-0.5 * off**2) for off, height in bumps)


def test_people_have_favourites_of_each_kind_and_days_of_their_own(law: Law) -> None:
    for person in law.people:
        assert len(set(person.places.tolist())) == len(person.places)
        assert set(person.kinds) == set(KINDS)
        assert all(place in law.town[kind] for place, kind in zip(person.places.tolist(), person.kinds, strict=True))
        assert set(np.unique(person.days).tolist()) <= {1.0, OTHER_DAY}
        for kind, days in zip(person.kinds, person.days, strict=True):
            assert kind not in ("home", "work") or (days == 1).all()
    places = [place for kind in law.town.values() for place in kind]
    assert places == list(range(10, 100))


def test_what_is_generated_follows_the_law() -> None:
    # One state, drawn again and again: chi-squared against its probabilities.
    one = Law(replace(SMALL, people=1, places=30, variety=0.5))
    state = (0, When(4, 18 * 60), one.town["work"][0], 8)
    expected = one.probabilities(*state)
    rng = np.random.default_rng(1)
    drawn = Counter(rng.choice(list(expected), 4000, p=list(expected.values())).tolist())
    assert _chi_squared(drawn, expected, 4000) < 60  # 30 places


def test_stays_are_drawn_with_the_chances_that_are_reported(law: Law) -> None:
    # Each generated stay against the law in its own state: expected and observed counts by probability.
    generated = replace_people(40)
    found = list(visits(generated))
    expected = np.zeros(10)
    observed = np.zeros(10)
    previous: int | None = None
    seen: set[int] = set()
    person = -1
    for visit in found:
        if visit.person != person:
            person, previous, seen = visit.person, None, set()
        chances = generated.probabilities(person, When(visit.day % 7, visit.minute), previous, len(seen))
        for chance in chances.values():
            expected[min(9, int(chance * 10))] += chance
        observed[min(9, int(chances[visit.place] * 10))] += 1
        assert visit.chance == max(chances.values()) == chances[visit.best]
        previous = visit.place
        seen.add(visit.place)
    assert np.all(np.abs(observed - expected) < 4.5 * np.sqrt(expected) + 5)


def test_the_best_answer_is_right_as_often_as_the_law_says() -> None:
    found = list(visits(replace_people(100)))
    chances = np.array([visit.chance for visit in found])
    right = np.array([visit.best == visit.place for visit in found])
    error = math.sqrt(float((chances * (1 - chances)).sum()))
    assert abs(right.sum() - chances.sum()) < 4 * error
    assert chances.mean() > 0.4
    for low in (0.2, 0.4, 0.6, 0.8):  # and it is so for sure answers as for unsure ones
        part = (chances >= low) & (chances < low + 0.2)
        assert abs(right[part].mean() - chances[part].mean()) < 0.06


def test_nothing_but_the_settings_matters() -> None:
    again = list(visits(Law(SMALL)))
    assert again == list(visits(Law(SMALL)))
    assert again != list(visits(Law(replace(SMALL, seed=5))))
    ordered = [(visit.person, visit.day, visit.minute) for visit in again]
    assert ordered == sorted(set(ordered))
    fewer = list(visits(Law(replace(SMALL, people=2))))
    assert fewer == [visit for visit in again if visit.person < 2]


def replace_people(people: int) -> Law:
    return Law(replace(SMALL, people=people, days=7))


def _chi_squared(drawn: Counter[int], expected: dict[int, float], total: int) -> float:
    return sum((drawn[place] - total * share) ** 2 / (total * share) for place, share in expected.items() if share)
