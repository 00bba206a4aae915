"""The generated stays follow the written law, and the best answer is right as often as the law says."""

import math
from dataclasses import replace

import numpy as np
import pytest
from generate import AFTER, KINDS, Law, Settings, visits
from stays import When

SMALL = Settings(people=3, days=30, explore=0.3, seed=4)


@pytest.fixture(scope="module")
def law() -> Law:
    return Law(SMALL)


def test_the_chances_are_the_formula_of_the_docstring(law: Law) -> None:
    person = law.people[0]
    when, previous = When(2, 13 * 60 + 10), next(iter(law.town["work"]))
    strength = {
        place: weight
        * curve(kind, 13 - person.late)
        * days[2]
        * AFTER.get(("work", kind), 1.0)
        * (place != previous)
        for place, kind, weight, days in zip(
            person.places.tolist(), person.kinds, person.weights, person.days, strict=True
        )
    }
    explored = 0.3 * 12**-0.21
    found = law.probabilities(0, when, previous, 12)
    for place, value in strength.items():
        assert math.isclose(
            found.get(place, 0.0), (1 - explored) * value / sum(strength.values()), abs_tol=1e-12
        )


def curve(kind: str, hour: float) -> float:
    bumps = [
        (((hour - middle + 12) % 24 - 12) / width, height)
        for middle, width, height in KINDS[kind].weekday
    ]
    return 1e-3 + sum(height * math.exp(-0.5 * off**2) for off, height in bumps)


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
