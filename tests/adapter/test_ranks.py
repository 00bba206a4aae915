"""Each layer has its own rank: in the exchange, the model, the export, the merge and a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from olora_ray.adapter.inject import find_targets, inject, wrap
from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.adapter.peft_folder import compress, read_adapter
from olora_ray.cluster.start import resume
from olora_ray.config.schema import Adapter
from olora_ray.pipeline.parity import check_adapter
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.loader import Schedule, StepLoader
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from tests import tiny
from tests.export_parts import logits, make_stacked_case, ranked
from tests.families import zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")


def test_a_layer_of_rank_0_is_not_wrapped() -> None:
    start = ranked_start(tiny.llama())
    some = "model.layers.0.self_attn.v_proj"
    start[some] = Factors(start[some].a0[:0], None)
    assert list(wrap(tiny.llama(), start, 1.0)) == [name for name in start if name != some]


def ranked_start(model: Any) -> dict[str, Factors]:
    names = find_targets(model, "all-linear", 4)
    return {name: ranked(model, name, number).factors for number, name in enumerate(names)}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_reads_the_padded_folder_as_a_plain_lora(
    tmp_path: Path, family: str, stabilized: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny.llama() if family == "llama" else zoo.make(ALL["mixtral"])
    settings = Adapter(rank=4, alpha=6, rank_stabilized=stabilized)
    case = make_stacked_case(tmp_path / "base", model, settings, ranks=True)
    folder = case.write_adapter(tmp_path / "adapter")
    fields = json.loads((folder / "adapter_config.json").read_text())
    largest = max(item.plain_rank() for item in case.adapter.values())
    assert fields["r"] == largest == 8
    assert fields["lora_alpha"] == pytest.approx(
        case.scale * (largest**0.5 if stabilized else largest)
    )
    assert not fields.keys() & {"rank_pattern", "alpha_pattern"}
    assert check_adapter(folder, case.model, case.adapter, case.scale).ok
    loaded = AutoModelForCausalLM.from_pretrained(case.base, attn_implementation="eager")
    says = logits(PeftModel.from_pretrained(loaded, folder).eval())
    torch.testing.assert_close(says, case.logits, atol=5e-5, rtol=0)
    again, scale = read_adapter(folder, case.model)
    for name, item in case.adapter.items():
        torch.testing.assert_close(
            again[name].delta(scale), item.delta(case.scale), atol=1e-6, rtol=0
        )


def trainer(start: dict[str, Factors]) -> Trainer:
    model = tiny.llama(attention="segments")
    settings = tiny.decided()
    return Trainer(
        SupervisedLoss(model), inject(model, start, settings.adapter.scale()), settings, CPU
    )


def train(one: Trainer, first: int, last: int) -> None:
    store: Any = tiny.store()
    loader = StepLoader(store, one.config.train, one.config.run.seed, "segments")
    schedule = Schedule(one.config.train.model_copy(update={"steps": 4}), store)
    for result in one.steps(loader, first, schedule):
        if result.step == last:
            break


def test_a_run_with_a_rank_for_every_layer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    start = ranked_start(tiny.llama())
    whole = trainer(start)
    train(whole, 0, 4)
    cut = trainer(start)
    train(cut, 0, 2)
    state = TrainState(step=2, best_loss=1.0, best_step=1)
    cut.snapshot(state, cut.flat.vector * 2, {"adapter": "x"}, "run: {}\n")(tmp_path / "step-2")
    shapes = {
        name: tuple(part.shape)
        for name, part in load_file(tmp_path / "step-2" / checkpoint.ADAPTER).items()
    }
    assert {shapes[f"{name}.a0"][0] for name in start} == {1, 2, 3, 4}
    found = checkpoint.load(tmp_path / "step-2")
    again = trainer({name: found.adapter[name].factors for name in start})
    best = resume(again, found)
    assert torch.equal(best, cut.flat.vector * 2)  # type: ignore[arg-type]
    train(again, 2, 4)
    assert torch.equal(again.flat.vector, whole.flat.vector)


def adapter(
    experts: tuple[int, ...], m: int, n: int, rank: int, seed: int, with_start: bool = True
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*experts, *shape, generator=generator)

    return AdapterWeights(
        Factors(draw(rank, n), draw(m, rank) if with_start else None), draw(rank, n), draw(m, rank)
    )


ranks = st.integers(1, 5)


@given(
    st.sampled_from([(), (3,)]),
    st.integers(1, 30),
    st.integers(1, 30),
    ranks,
    ranks,
    st.integers(1, 9),
)
def test_it_is_the_best_of_its_rank(
    experts: tuple[int, ...], m: int, n: int, rank: int, other: int, limit: int
) -> None:
    layers = {"a": adapter(experts, m, n, rank, 1), "b": adapter(experts, n, m, other, 2)}
    found, lost = compress(layers, limit)
    smaller = max(rank, other) * 2 > limit
    wrong = whole = 0.0
    for name, item in layers.items():
        exact = item.delta(0.5).double()
        values = torch.linalg.svdvals(exact)
        gap = found[name].delta(0.5).double() - exact
        best = values[..., limit:].square().sum()
        assert float(gap.square().sum() - best) == pytest.approx(
            0, abs=1e-6 * float(values.square().sum())
        )
        wrong, whole = wrong + float(best), whole + float(values.square().sum())
        assert found[name].plain_rank() == (limit if smaller else item.plain_rank())
    assert lost == pytest.approx((wrong / whole) ** 0.5, abs=1e-4)


def test_an_adapter_of_a_small_rank_stays_as_it_is() -> None:
    layers = {"a": adapter((), 8, 6, 2, 1, with_start=False)}
    found, lost = compress(layers, 2)
    assert found["a"] is layers["a"]
    assert lost == 0
