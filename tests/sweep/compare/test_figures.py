"""What the figures of a comparison show."""

from types import SimpleNamespace
from typing import Any

import pytest

from olora_ray.sweep.compare.figures import rates
from olora_ray.sweep.compare.record import Point

LOSSES = (0.35, 0.33, 0.38)


def drawn(base: float) -> Any:
    """The axes of losses against learning rates, beside a base model with this loss."""
    points = [Point("lora", 16.0, 2.0**number * 1e-3, loss, True) for number, loss in enumerate(LOSSES)]
    methods = [SimpleNamespace(method="lora", tuned=None)]
    record: Any = SimpleNamespace(tuning_seed=17, points=points, base_tuning=base, methods=methods)
    return rates(record).axes[0]


@pytest.mark.parametrize(("base", "shown"), [(0.45, True), (2.58, False), (float("inf"), False)])
def test_learning_rates_can_be_told_apart_however_much_worse_the_base_model_is(base: float, shown: bool) -> None:
    """Beside a base model with 2.58 all of them lay on one line."""
    axes = drawn(base)
    low, high = axes.get_ylim()
    assert (high > base) == shown
    assert (max(LOSSES) - min(LOSSES)) / (high - low) > (0.3 if shown else 0.8)
    texts = " ".join(text.get_text() for text in axes.figure.findobj(lambda each: hasattr(each, "get_text")))
    assert ("base model: 2.580, above the picture" in texts) == (base == 2.58)
