"""The memory plan of a step is what its tensors take, as they are made and freed in a real one."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from olora_ray.adapter.candidates import candidates
from olora_ray.adapter.inject import select
from olora_ray.config.schema import Config
from olora_ray.model import attention as segment_attention
from olora_ray.tokens.collate import Batch, collate
from olora_ray.train import estimate
from olora_ray.train.estimate import by_formula, held_by_experts
from olora_ray.train.fake_model import LiveBytes
from olora_ray.train.loop import Trainer, train_mode
from olora_ray.train.parallel import place_model
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")


def settings(on: bool = False, **changes: Any) -> Config:
    wanted = {"data__max_length": 64, "train__micro_batch": 4, "train__activation_checkpointing": on}
    return tiny.config(**(wanted | changes))


def planned(config: Config, meta: Any, dtype: torch.dtype = torch.float32, gpu: bool = False) -> int:
    chosen = select(meta, config.adapter.targets, config.adapter.rank)
    held = held_by_experts(config, meta, candidates(meta), chosen)
    return estimate.measure(meta, chosen.targets, held, config, dtype, gpu).step


def taken(config: Config, model: Any, batch: Batch) -> int:
    """Bytes of a real forward and backward pass at their most."""
    made: Trainer = tiny.trainer(config, model=model)
    made.loss.recompute = config.train.activation_checkpointing is True
    place_model(made.loss, "ddp", CPU)
    train_mode(made.adapted, True)
    made.loss(batch).backward()  # whatever is kept from the first on
    live = LiveBytes([*made.loss.parameters(), *made.loss.buffers(), made.flat.grad, made.flat.vector])
    with live:
        made.loss(batch).backward()
    return live.most


def full(config: Config, attention: str) -> Batch:
    pack = tiny.pack(config.data.max_length, prompt=1)
    return collate([pack] * config.train.micro_batch, attention)


FAMILIES = ["llama", "gemma3_text", "gpt2", "mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "llama4_text"]


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_a_step_takes(family: str, on: bool) -> None:
    config, meta = settings(on, adapter__dropout=0.1), zoo.on_meta(ALL[family])
    plan = planned(config, meta)
    attention = meta.config._attn_implementation
    model = zoo.make(ALL[family], attention=attention)
    share = plan / taken(config, model, full(config, attention))
    assert share == pytest.approx(1.0, rel=0.06 if on else 0.02)


def test_experts_without_adapters_count_as_well() -> None:
    config, meta = settings(adapter__targets=["o_proj"]), zoo.on_meta(ALL["gpt_oss"])
    plan, attention = planned(config, meta, torch.bfloat16), meta.config._attn_implementation
    model = zoo.make(ALL["gpt_oss"], torch.bfloat16, attention=attention)
    assert plan == pytest.approx(taken(config, model, full(config, attention)), rel=0.02)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_not_run_are_reckoned(family: str) -> None:
    config, meta = settings(), zoo.on_meta(ALL[family])
    meta.set_experts_implementation("eager")  # one after the other, each for the tokens that it gets
    plan, attention = planned(config, meta), meta.config._attn_implementation
    model = zoo.make(ALL[family], attention=attention, experts="eager")
    assert 0.9 < plan / taken(config, model, full(config, attention)) < 1.2


@pytest.mark.parametrize("on", [False, True])
def test_blocks_that_are_not_run_count(on: bool) -> None:
    config, sizes = settings(on), {"num_hidden_layers": 7}
    with torch.device("meta"):
        meta = tiny.llama(**sizes)
    plan = planned(config, meta)
    assert plan == pytest.approx(
        taken(config, tiny.llama(attention="segments", **sizes), full(config, "segments")), rel=0.02
    )


@pytest.mark.parametrize("packing", [False, True])
def test_a_sequence_of_one_example_needs_no_mask(packing: bool) -> None:
    config = settings(data__packing=packing, model__attention="sdpa", data__max_length=128)
    with torch.device("meta"):
        meta = tiny.llama()
    lengths = (64, 64) if packing else (128,)
    batch = collate([tiny.pack(*lengths, prompt=1)] * config.train.micro_batch, "sdpa")
    assert planned(config, meta) == pytest.approx(taken(config, tiny.llama(attention="sdpa"), batch), rel=0.03)


def test_a_run_without_numbers_leaves_nothing_behind() -> None:
    config, model = settings(), tiny.llama(attention="segments", dtype=torch.bfloat16)
    made: Trainer = tiny.trainer(config, model=model)
    batch, state = full(config, "segments"), torch.get_rng_state()
    before = made.loss(batch).detach()
    segment_attention.forget()
    with torch.device("meta"):
        meta = tiny.llama(dtype=torch.bfloat16)
    planned(config, meta, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made.loss(batch).detach(), before)


def test_code_that_looks_at_numbers_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    old = LlamaMLP.forward

    def looks(self: Any, x: torch.Tensor) -> Any:
        return old(self, x.abs() if x.sum() > 0 else x)

    monkeypatch.setattr(LlamaMLP, "forward", looks)
    with torch.device("meta"):
        meta = tiny.llama(num_hidden_layers=7)
    config = settings()
    chosen, found = select(meta, "all-linear", 4), candidates(meta)
    assert by_formula(config, meta, found, chosen, 4) > by_formula(settings(on=True), meta, found, chosen, 4)
    with pytest.raises(RuntimeError, match="DataDependent"):
        planned(config, meta)


def test_a_gpu_has_flash_attention_for_half_a_precision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.attention, "kernel", lambda: object())
    tried = [
        estimate._implementations(zoo.on_meta(ALL["llama"]), settings(), dtype, gpu=True)[0]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert tried == ["segments", "sdpa"]


def test_a_gpu_is_planned_without_the_products_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.attention, "kernel", lambda: object())

    def plan(gpu: bool) -> int:
        return planned(settings(), zoo.on_meta(ALL["llama"]), torch.bfloat16, gpu)

    on_cpu, on_gpu = plan(gpu=False), plan(gpu=True)
    monkeypatch.setattr(segment_attention, "_Batched", None)
    assert plan(gpu=True) == on_gpu < on_cpu


def test_what_is_not_laid_out_in_one_row_is_not_planned_so() -> None:
    variant = ALL["llama4_text"]
    scaled = replace(variant, sizes=variant.sizes | {"floor_scale": 64})
    meta, other = zoo.on_meta(scaled), zoo.on_meta(variant)
    assert planned(settings(), meta) > planned(settings(), other)  # it has masks
    assert (meta.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "segments")
