"""An objective of an installed package: each example counts alike, however long its answer is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from olora_ray.train.objectives.objective import objective_named
from tests import plugins

CODE = '''
"""Each example counts alike, however long its answer is."""

import torch

from olora_ray.train.objectives.objective import Objective


def _each(model, batch):
    losses = model(batch, each=True)
    means = torch.stack([part.mean() for part in losses.split(batch.examples)])
    return torch.stack([means, (means.detach() > 3.0).float()], dim=1)


OBJECTIVE = Objective(
    name="examples",
    loss=lambda model, batch, whole: _each(model, batch).sum(0),
    each=lambda model, batch: _each(model, batch).double(),
    weight=lambda counts: counts.examples,
    unit="example",
    takes=frozenset({"chat", "completion"}),
    more=("hard",),
)
'''
ENTRIES = "[olora_ray.objectives]\nexamples = examples_objective:OBJECTIVE\n"


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Install the package `my-loss` inside the block."""
    plugins.install(
        monkeypatch, folder / "installed", "my-loss", "examples_objective", CODE, ENTRIES
    )
    objective_named.cache_clear()
    yield
    objective_named.cache_clear()
