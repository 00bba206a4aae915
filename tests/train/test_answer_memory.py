"""The memory plan of answers is what their tensors take, as they are made and freed in real ones."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from olora_ray.adapter.candidates import candidates
from olora_ray.adapter.inject import select
from olora_ray.config.schema import Config
from olora_ray.train import estimate
from olora_ray.train.estimate import answers_at_once, cache_bytes, held_by_experts
from olora_ray.train.fake_model import LiveBytes
from olora_ray.train.generate import AT_ONCE, decoding, greedy
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")
LENGTH, ROWS = 64, 4
EXPERTS = ("gpt_oss", "qwen3_moe")


def settings(**changes: Any) -> Config:
    wanted = {
        "data__max_length": LENGTH,
        "data__eval_fraction": 0.1,
        "evaluation__samples": ROWS,
        "evaluation__max_new_tokens": 24,
    }
    return tiny.config(**(wanted | changes))


def planned(config: Config, meta: Any) -> int:
    chosen = select(meta, config.adapter.targets, config.adapter.rank)
    held = held_by_experts(config, meta, candidates(meta), chosen)
    return estimate.measure(meta, chosen.targets, held, config, torch.float32, gpu=False).answers


def taken(config: Config, model: Any) -> int:
    """Bytes of real answers at their most."""
    made = tiny.trainer(config, model=model)
    prompts = [tuple(range(2, 2 + LENGTH - row % 2)) for row in range(ROWS)]
    with decoding(made.loss.model):
        for _ in range(2):  # whatever is kept from the first on
            live = LiveBytes([*made.loss.parameters(), *made.loss.buffers()])
            with live:
                greedy(made.loss.model, prompts, config.evaluation.max_new_tokens, [], CPU)
    return live.most


@pytest.mark.parametrize(
    ("family", "new"),
    [
        *itertools.product(("llama", "gemma3_text", "gpt2"), (4, 200)),
        *itertools.product(EXPERTS, (4,)),
        *(pytest.param(family, 200, marks=pytest.mark.slow) for family in EXPERTS),
    ],
)
def test_the_plan_is_what_answers_take(family: str, new: int) -> None:
    """While prompts are read, or at the last token."""
    sizes = {"n_positions": 512} if family == "gpt2" else {"max_position_embeddings": 512}
    variant = ALL[family]
    variant = type(variant)(variant.name, variant.model_type, {**variant.sizes, **sizes})
    config = settings(evaluation__max_new_tokens=new)
    plan, found = planned(config, zoo.on_meta(variant)), taken(config, zoo.make(variant))
    assert plan == pytest.approx(found, rel=0.1)


def test_blocks_that_are_not_run_count() -> None:
    sizes, config = {"num_hidden_layers": 7, "max_position_embeddings": 512}, settings(evaluation__max_new_tokens=200)
    with torch.device("meta"):
        meta = tiny.llama(**sizes)
    assert planned(config, meta) == pytest.approx(taken(config, tiny.llama(**sizes)), rel=0.1)


def test_the_formula_has_the_cache() -> None:
    config = settings(evaluation__max_new_tokens=200)
    with torch.device("meta"):
        meta = tiny.llama(max_position_embeddings=512)
    cache = cache_bytes(config, meta, 4)
    plan = planned(config, meta)
    assert 0.4 * plan < cache < plan


def test_the_formula_has_a_number_for_every_family() -> None:
    from transformers import AutoConfig

    for variant in ALL.values():
        model = SimpleNamespace(config=AutoConfig.for_model(variant.model_type, **variant.sizes))
        assert cache_bytes(settings(), model, 4) > 0, variant.name


def test_only_what_is_answered_counts() -> None:
    assert answers_at_once(settings()) == ROWS
    assert answers_at_once(settings(evaluation__samples=3, evaluation__scorer="exact_match")) == AT_ONCE
    assert answers_at_once(settings(evaluation__samples=0)) == 0
    assert answers_at_once(settings(data__eval_fraction=None)) == 0
    with torch.device("meta"):
        meta = tiny.llama()
    assert planned(settings(evaluation__samples=0), meta) == 0
