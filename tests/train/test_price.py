"""What a layer of Llama-3.1-8B costs on a GPU, counted without one: kernels, bytes, and activations that are kept."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.layer import Factors
from olora_ray.config.decided import Expected, Recompute
from olora_ray.model import attention
from olora_ray.tokens.collate import Batch, collate
from olora_ray.train import parts
from olora_ray.train.estimate import measure, widest
from olora_ray.train.loop import train_mode
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import place_model
from olora_ray.train.price import Card, Kernels, step_time
from olora_ray.train.sharded_reader import decoder_layers
from tests import tiny

TOKENS = 8192
RANK = 16
PRICES = {False: (153, 12.4), True: (96, 4.1)}
"""Without and with the kernels of train/parts.py: most kernels of a layer and micro-batch, forward and backward and
without the attention itself, and most GiB that operators between the products and the attention read and write."""
pytestmark = pytest.mark.skipif(attention.kernel() is None, reason="needs a newer torch")


def llama(layers: int, kind: str) -> Any:
    with torch.device("meta"):
        return tiny.llama(
            vocab_size=128256,
            attention=kind,
            dtype=torch.bfloat16,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        )


def counted(layers: int, fused: bool) -> Kernels:
    """Count the second micro-batch of a step: the first joins the factors."""
    model = llama(layers, "varlen")
    loss = SupervisedLoss(model)
    if fused:
        parts.switch(parts.find(loss, decoder_layers(model)), "meta")
    with torch.device("meta"):
        factors = {
            name: Factors(torch.empty(RANK, target.shape[1]), torch.empty(target.shape[0], RANK))
            for name, target in find_targets(model, "all-linear", RANK).items()
        }
        adapted = inject(model, factors, 1.0)
        for layer in adapted.values():
            for part in (layer.da, layer.db):
                part.grad = torch.empty_like(part)
    train_mode(adapted, True)
    whole = collate([tiny.pack(*[1024] * (TOKENS // 1024))], "varlen")
    inputs = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in whole.inputs.items()
    }
    batch = replace(whole, inputs=inputs)
    # torch knows no autocast for the meta device.
    with mock.patch.object(torch, "is_autocast_enabled", return_value=False):
        for _ in range(2):
            seen = step(loss, batch)
    return seen


def step(loss: SupervisedLoss, batch: Batch) -> Kernels:
    with Kernels() as seen:
        hidden = loss.hidden(batch)
        hidden.backward(torch.empty_like(hidden))
    return seen


@pytest.mark.parametrize("fused", PRICES)
def test_a_layer_costs_no_more_than_before(fused: bool) -> None:
    two, three = counted(2, fused), counted(3, fused)
    kernels = three.counts - two.counts
    size = three.bytes - two.bytes
    assert (kernels["product"], kernels["thin product"]) == (14, 42)
    most, elementwise = PRICES[fused]
    assert kernels.total() <= most
    assert size["elementwise"] / 2**30 <= elementwise


@pytest.mark.parametrize("again", [False, True])
def test_the_work_of_all_layers_is_counted_on_two(again: bool) -> None:
    config = tiny.decided(
        data__max_length=64, train__micro_batch=2, train__activation_checkpointing=again
    )
    made = tiny.trainer(config, model=tiny.llama(num_hidden_layers=5, attention="segments"))
    made.loss.recompute = again
    place_model(made.loss, "ddp", tiny.CPU)
    train_mode(made.adapted, True)
    with Kernels(attended=(64 + 1) / 2) as real:
        made.loss(widest(config, "segments")).backward()
    with torch.device("meta"):
        model = tiny.llama(num_hidden_layers=5, attention="segments")
    targets = find_targets(model, "all-linear", config.adapter.rank)
    work = measure(model, targets, config, tiny.ON_CPU).work
    for number in (0, 1):  # operations, bytes
        whole, found = (
            sum(count * kernel[number] for kernel, count in each.items())
            for each in (real.work, work)
        )
        assert found == pytest.approx(whole, rel=0.01)


def test_the_slower_of_two_bounds_is_the_time_of_a_kernel() -> None:
    card = Card(rate=100.0, bandwidth=10.0, launch=0.5)
    found = step_time({(200.0, 10.0): 1.0, (50.0, 30.0): 2.0}, card, micro_batches=3)
    assert (found.products, found.memory, found.launches) == (6.0, 18.0, 4.5)
    assert found.seconds == 28.5


@pytest.mark.parametrize(("again", "most"), [(False, 43.3), ("swiglu", 29.3), (True, 4.2)])
def test_the_activations_that_are_kept(again: Recompute, most: float) -> None:
    model = llama(32, "sdpa")
    config = tiny.decided(
        data__max_length=4096,
        adapter__rank=RANK,
        train__micro_batch=2,
        train__activation_checkpointing=again,
    )
    targets = find_targets(model, "all-linear", RANK)
    found = measure(model, targets, config, Expected(True, "bfloat16", "auto"))
    assert found.problem is None
    assert 0.95 * most < found.step / 2**30 <= most
