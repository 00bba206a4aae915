"""The share of a model behind an adapter, and what the rest is."""

import pytest

from olora_ray.adapter.inject import coverage, select
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL, MIXTURES


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_counts_once(tied: bool) -> None:
    model = tiny.llama(tie_word_embeddings=tied)
    found = coverage(model, select(model, "all-linear", 4))
    matrix, norms = 96 * 64, 5 * 64
    layers = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 112)
    assert found.adapted == layers
    expected = {"embeddings": matrix, "output head": matrix, "norms, biases and others": norms}
    if tied:
        del expected["output head"]
    assert found.others == expected
    assert found.share == layers / sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", [*MIXTURES, "granitemoehybrid"])
def test_the_experts_of_every_family_are_covered(family: str) -> None:
    model = zoo.on_meta(ALL[family])
    found = coverage(model, select(model, "all-linear", 4))
    total = found.adapted + sum(found.others.values())
    assert total == sum(parameter.numel() for parameter in model.parameters())
    small = {"norms, biases and others", "routers", "gates of one row"}
    assert set(found.others) - small == {"embeddings", "output head"}
    assert sum(count for kind, count in found.others.items() if kind in small) < 0.05 * total


def test_what_is_not_named_is_said() -> None:
    model = zoo.on_meta(ALL["mixtral"])
    found = coverage(model, select(model, ("q_proj", "v_proj"), 4))
    assert next(iter(found.others)) == "experts"
    assert "layers that adapter.targets does not name" in found.others
    assert found.share < 0.1


def test_a_tower_counts_whole() -> None:
    model = zoo.on_meta(ALL["gemma3"])
    found = coverage(model, select(model, "all-linear", 4))
    tower = model.model.vision_tower
    assert found.others["vision tower"] == sum(parameter.numel() for parameter in tower.parameters())
    assert "multi modal projector" in found.others
