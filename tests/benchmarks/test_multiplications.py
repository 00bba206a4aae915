"""The work that a training must do is what torch counts when it does it."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from olora_ray.tokens.collate import collate
from tests import tiny


@pytest.mark.parametrize("method", ["olora", "lora"])
def test_the_work_is_what_torch_counts(benchmark: Any, method: str) -> None:
    module, length = benchmark("multiplications"), 24
    model = tiny.llama(attention="eager")
    trainer = tiny.trainer(tiny.config(adapter__method=method), "eager", model)
    pack = tiny.pack(length)
    batch = collate([pack], "eager")
    shapes = module.shapes_of(trainer, batch)
    counter: Any = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})
    with counter:
        trainer.loss(batch).backward()
    parts = module.needed(shapes, pack.segments, int(pack.supervised.sum()))
    # Eager attention computes what the mask hides; and it is one segment.
    parts["attention"] *= 2 * length / (length + 1)
    assert sum(parts.values()) == pytest.approx(
        counter.get_total_flops(), rel=1e-3
    )  # rotary angles are products too
    assert len(shapes.without_dx) == 3
    assert all(size > 0 for size in parts.values())


def _addmm(_out: Any, a: Any, b: Any, out_shape: Any = None, **others: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])
