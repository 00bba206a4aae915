"""A run that goes on keeps the layers that it began with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.cluster import start
from olora_ray.cluster.start import factors, restored, start_adapter
from olora_ray.common.errors import StoreUnavailable, TryAgain, UserError
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL
from tests.refused import refused


def put(monkeypatch: pytest.MonkeyPatch, module: Any, **functions: Any) -> None:
    """Put functions in the place of a module's."""
    for name, function in functions.items():
        monkeypatch.setattr(module, name, function)


def known(model: Any, targets: Any) -> dict[str, AdapterWeights]:
    """An adapter as a checkpoint gives it: in another order than the model's."""
    made, _ = initialise(find_targets(model, targets, 4), "olora", 4, 0, torch.device("cpu"))
    weights = {
        name: AdapterWeights(start, torch.zeros(()), torch.zeros(()))
        for name, start in made.items()
    }
    return dict(sorted(weights.items(), reverse=True))


def test_an_adapter_of_before_keeps_its_layers_and_has_the_models_order() -> None:
    model = zoo.make(ALL["mixtral"])
    spec = SimpleNamespace(config=tiny.decided())
    before = known(
        model, ("q_proj", "v_proj")
    )  # what all-linear meant as long as experts were left out
    before["model.vision_tower.fc1"] = AdapterWeights(
        Factors(torch.zeros(4, 8), torch.zeros(8, 4)), torch.zeros(()), torch.zeros(())
    )
    found = factors(SimpleNamespace(), spec, SimpleNamespace(model=model), before)  # type: ignore[arg-type]
    order = [*find_targets(model, ("q_proj", "v_proj"), 4), "model.vision_tower.fc1"]
    assert list(found) == order
    assert all(found[name] is before[name].factors for name in order)


@pytest.mark.parametrize(("kind", "raised"), [(TryAgain, StoreUnavailable), (UserError, UserError)])
def test_a_checkpoint_that_a_worker_cannot_fetch_now_is_for_another_group_of_workers(
    kind: type[UserError], raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that it cannot use ends the run. The kind of error is all that Train hands on (failures.passes)."""

    def read(place: str) -> None:
        raise kind("slow down")

    put(monkeypatch, start.collectives, rank=lambda: 1, from_first=lambda _: "s3://b/step-3")
    put(monkeypatch, start.checkpoints, read=read)
    spec = SimpleNamespace(config=tiny.decided(train__start="s3://b/step-3"))
    with pytest.raises(Exception, match=r"worker 1 cannot read .*: slow down") as caught:
        restored(spec, "s3://b")
    assert type(caught.value) is raised
    with refused("train.start") as caught:
        start_adapter(spec)
    assert type(caught.value) is kind
