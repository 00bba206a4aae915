"""An optimizer is a file of its own and nothing else; this one is the example of CONTRIBUTING."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from olora_ray.adapter.optimizers.optimizer import optimizer_named
from olora_ray.config.tables import OPTIMIZERS
from tests import plugins, tiny

LION = """
from olora_ray.adapter.optimizers.optimizer import Optimizer, Update


class Lion(Update):
    keys = ("momentum",)

    def update(self, lr):
        momentum, gradient = self.moments["momentum"], self.flat.grad
        direction = momentum.lerp(gradient, 0.1).sign_()
        momentum.lerp_(gradient, 0.01)
        self.flat.vector.mul_(1 - lr * self.config.weight_decay)
        ratios = [1.0, self.config.lr_ratio]
        for part, ratio in zip(self.flat.groups, ratios, strict=False):
            self.flat.vector[part].sub_(direction[part], alpha=lr * ratio)


OPTIMIZER = Optimizer("lion", Lion)
"""


@pytest.fixture
def lion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    entries = "[olora_ray.optimizers]\nlion = lion_optimizer:OPTIMIZER\n"
    plugins.install(monkeypatch, tmp_path, "my-lion", "lion_optimizer", LION, entries)
    yield
    optimizer_named.cache_clear()


def test_each_member_has_its_name_in_the_index() -> None:
    assert [optimizer_named(name).name for name in OPTIMIZERS.own] == [*OPTIMIZERS.own]


@pytest.mark.usefixtures("lion")
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_an_installed_optimizer_trains_and_resumes_to_the_same_bytes(ratio: float) -> None:
    settings = tiny.config(
        train__optimizer="lion",
        train__lr=0.003,
        train__lr_ratio=ratio,
        train__steps=6,
        train__schedule="constant",
    )
    whole = tiny.trainer(settings)
    losses = [result.loss for result in tiny.steps(whole)]
    assert losses[-1] < losses[0]
    first, second = tiny.trainer(settings), tiny.trainer(settings)
    list(tiny.steps(first, count=3))
    second.flat.vector.copy_(first.flat.vector)
    second.optimizer.load(first.optimizer.state(copied_to="cpu"), 3)
    assert [result.loss for result in tiny.steps(second, start=3)] == losses[3:]
    assert torch.equal(second.flat.vector, whole.flat.vector)
