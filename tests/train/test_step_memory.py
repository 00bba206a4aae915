"""The memory plan equals the memory of the tensors in a real step and in real answers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from olora_ray.adapter.inject import select
from olora_ray.config.decided import DecidedConfig, Expected, Recompute
from olora_ray.model import attention as segment_attention
from olora_ray.tokens.collate import Batch, collate
from olora_ray.train.estimate import MeasuredStep, answers_at_once, measure
from olora_ray.train.fake_model import LiveBytes
from olora_ray.train.generate import AT_ONCE, decoding, greedy
from olora_ray.train.loop import train_mode
from olora_ray.train.parallel import place_model
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")
LENGTH, ROWS = 64, 4


def settings(on: Recompute = False, **changes: Any) -> DecidedConfig:
    wanted = {
        "data__max_length": LENGTH,
        "train__micro_batch": 4,
        "train__activation_checkpointing": on,
    }
    return tiny.decided(**(wanted | changes))


def plan_of(
    config: DecidedConfig, meta: Any, dtype: torch.dtype = torch.float32, gpu: bool = False
) -> MeasuredStep:
    chosen = select(meta, config.adapter.targets, config.adapter.rank)
    expected = Expected(gpu, str(dtype).removeprefix("torch."), config.model.attention)
    return measure(meta, chosen.targets, config, expected)


def planned(
    config: DecidedConfig, meta: Any, dtype: torch.dtype = torch.float32, gpu: bool = False
) -> int:
    found = plan_of(config, meta, dtype, gpu)
    assert found.problem is None
    return found.step


def taken(config: DecidedConfig, model: Any, batch: Batch) -> int:
    """Return the peak bytes of a real forward and backward pass."""
    made = tiny.trainer(config, model=model)
    made.loss.recompute = config.train.activation_checkpointing
    place_model(made.loss, "ddp", CPU)
    train_mode(made.adapted, True)
    made.loss(batch).backward()  # whatever is kept from the first on
    live = LiveBytes(
        [*made.loss.parameters(), *made.loss.buffers(), made.flat.grad, made.flat.vector]
    )
    with live:
        made.loss(batch).backward()
    return live.most


def full(config: DecidedConfig, attention: str) -> Batch:
    pack = tiny.pack(config.data.max_length, prompt=1)
    return collate([pack] * config.train.micro_batch, attention)


FAMILIES = ["llama", "gpt2", "gpt_oss", "qwen3_moe"]
FAMILIES += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("gemma3_text", "mixtral", "deepseek_v3", "llama4_text")
]


@pytest.mark.parametrize("on", [False, "swiglu", True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_a_step_takes(family: str, on: Recompute) -> None:
    config, meta = settings(on, adapter__dropout=0.1), zoo.on_meta(ALL[family])
    plan = planned(config, meta)
    attention = tiny.attention_of(meta)
    model = zoo.make(ALL[family], attention=attention)
    share = plan / taken(config, model, full(config, attention))
    assert share == pytest.approx(1.0, rel=0.06 if on is True else 0.02)


def test_a_model_whose_code_looks_at_numbers_has_a_plan_without_activations() -> None:
    with torch.device("meta"):
        meta = tiny.llama()
    mlp = meta.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.abs() if x.sum() > 0 else x)
    found = plan_of(settings(), meta)
    assert (found.step, found.answers) == (0, 0)
    assert found.problem.startswith("activations (DataDependent")


def test_a_batch_that_is_far_too_large_is_planned_from_a_smaller_one() -> None:
    """Its tokens alone would fill the driver's memory."""
    with torch.device("meta"):
        meta = tiny.llama(num_hidden_layers=1)
    length, rows = 2**31 - 1, 4
    found = planned(settings(data__max_length=length, train__micro_batch=rows), meta)
    assert found > rows * length * 4 * meta.config.hidden_size


def test_a_gpu_is_planned_with_flash_attention_in_half_a_precision_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used, plans = [], {}
    for gpu, dtype in ((True, torch.bfloat16), (True, torch.float32), (False, torch.bfloat16)):
        meta = zoo.on_meta(ALL["llama"])
        plans[gpu, dtype] = planned(settings(), meta, dtype, gpu)
        used.append(tiny.attention_of(meta))
    assert used == ["varlen", "sdpa", "segments"]
    assert plans[True, torch.bfloat16] < plans[False, torch.bfloat16], (
        "without the products of a CPU"
    )
    monkeypatch.setattr(segment_attention, "kernel", lambda: None)
    older = zoo.on_meta(ALL["llama"])
    wanted = settings(model__attention="flash_attention_2")
    assert planned(wanted, older, torch.bfloat16, gpu=True) > plans[True, torch.bfloat16], (
        "with a copy of the output"
    )
    assert tiny.attention_of(older) == "segments"


def answering(**changes: Any) -> DecidedConfig:
    wanted = {
        "data__eval_fraction": 0.1,
        "evaluation__samples": ROWS,
        "evaluation__max_new_tokens": 24,
    }
    return settings(**(wanted | changes))


def taken_by_answers(config: DecidedConfig, model: Any) -> int:
    """Return the peak bytes of real answers."""
    made = tiny.trainer(config, model=model)
    prompts = [tuple(range(2, 2 + LENGTH - row % 2)) for row in range(ROWS)]
    with decoding(made.loss.model):
        for _ in range(2):  # whatever is kept from the first on
            live = LiveBytes([*made.loss.parameters(), *made.loss.buffers()])
            with live:
                greedy(made.loss.model, prompts, config.evaluation.max_new_tokens, [], CPU)
    return live.most


@pytest.mark.parametrize("new", [4, 200])
@pytest.mark.parametrize(
    "family",
    FAMILIES[:1]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma3_text", "qwen3_moe")],
)
def test_the_plan_is_what_answers_take(family: str, new: int) -> None:
    """The peak is while prompts are read, or at the last token."""
    sizes = {"n_positions": 512} if family == "gpt2" else {"max_position_embeddings": 512}
    variant = replace(ALL[family], sizes=ALL[family].sizes | sizes)
    config = answering(evaluation__max_new_tokens=new)
    plan = plan_of(config, zoo.on_meta(variant)).answers
    assert plan == pytest.approx(taken_by_answers(config, zoo.make(variant)), rel=0.1)


def test_only_what_is_answered_counts() -> None:
    assert answers_at_once(answering()) == ROWS
    assert (
        answers_at_once(answering(evaluation__samples=3, evaluation__scorer="exact_match"))
        == AT_ONCE
    )
    assert answers_at_once(answering(evaluation__samples=0)) == 0
    assert answers_at_once(answering(data__eval_fraction=None)) == 0
    with torch.device("meta"):
        meta = tiny.llama()
    assert plan_of(answering(evaluation__samples=0), meta).answers == 0
