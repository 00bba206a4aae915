"""A quantised base has the same bytes always, and factors, start and gradients fit the weights it computes with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from olora_ray.adapter.initialise import at_scale, initialise
from olora_ray.adapter.inject import find_targets
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.load import override
from olora_ray.model.load import load_model
from olora_ray.model.quantised import QuantisedLinear
from olora_ray.model.source import obtain
from olora_ray.pipeline.run_folder import settings_digest
from olora_ray.tokens.collate import collate
from olora_ray.train import checkpoints
from olora_ray.train.estimate import estimate
from olora_ray.train.loop import train_mode
from olora_ray.train.parallel import load_frozen, to_pack
from tests import tiny
from tests.cluster.test_sharded_worker import run
from tests.cluster.test_worker import adapter, same
from tests.crew import Crews
from tests.families import zoo
from tests.families.variants import ALL
from tests.packed import EACH_KIND, unpack
from tests.refused import refused
from tests.said import said

CPU = torch.device("cpu")
FAMILIES = ["llama tied", "qwen2"]
"""One with a shared head, one with biases."""


def config(folder: Path, kind: str, **changes: Any) -> DecidedConfig:
    sizes = {
        "model__name": str(folder),
        "model__dtype": "float32",
        "model__quantization": kind,
        "adapter__rank": 2,
    }
    return tiny.decided(**(sizes | changes))


def loaded(folder: Path, kind: str, **changes: Any) -> Any:
    return load_frozen(folder, config(folder, kind, **changes).model, CPU)


def tensors(model: Any) -> dict[str, Tensor]:
    """Return weights and buffers by all their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def assert_same_tensors(one: Any, other: Any) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.float(), second[name].float()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_are_the_blocks_linear_layers_and_all_else_is_as_stored(
    tmp_path: Path, family: str
) -> None:
    zoo.build(ALL[family], tmp_path)
    model, plain = (
        loaded(tmp_path, "fp8", model__dtype="bfloat16"),
        loaded(tmp_path, "none", model__dtype="bfloat16"),
    )
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert packed == linear - {"lm_head"}
    before = tensors(plain)
    for name, tensor in tensors(model).items():
        if name.rpartition(".")[2] not in ("codes", "scales"):
            assert torch.equal(tensor, before[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (family == "llama tied")
    for name in packed:
        again = QuantisedLinear(plain.get_submodule(name).weight, None, "fp8")
        assert torch.equal(again.weight, model.get_submodule(name).weight), name


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_base_is_packed_once_per_node(kind: str, tmp_path: Path, node: Path) -> None:
    zoo.build(ALL["qwen2"], tmp_path / "one")
    first = loaded(tmp_path / "one", kind)
    assert_same_tensors(first, loaded(tmp_path / "one", kind))
    [entry] = (each for each in (node / "packed").iterdir() if not each.name.startswith("."))
    kept = load_file(entry / "0")
    save_file({"codes": kept["codes"], "scales": 2 * kept["scales"]}, entry / "0")
    name = to_pack(load_frozen(tmp_path / "one", config(tmp_path, "none").model, CPU))[0]
    again = loaded(tmp_path / "one", kind).get_submodule(name)
    assert torch.equal(again.scales, 2 * first.get_submodule(name).scales), (
        "it is read, not packed again"
    )
    zoo.build(ALL["llama"], tmp_path / "two")
    loaded(tmp_path / "two", kind)
    assert len([each for each in entry.parent.iterdir() if not each.name.startswith(".")]) == 2


def test_a_base_is_packed_where_a_node_can_keep_nothing(tmp_path: Path, node: Path) -> None:
    zoo.build(ALL["qwen2"], tmp_path / "one")
    expected = loaded(tmp_path / "one", "fp8")
    shutil.rmtree(node / "packed")
    (node / "packed").touch()
    with said() as lines:
        assert_same_tensors(expected, loaded(tmp_path / "one", "fp8"))
    assert "quantization: the packed base model cannot be cached on this node: File exists" in lines


@pytest.mark.parametrize("kind", EACH_KIND)
def test_factors_start_and_gradients_are_those_of_the_unpacked_weights(
    tmp_path: Path, kind: str
) -> None:
    zoo.build(ALL["qwen2"], tmp_path)
    settings = config(tmp_path, kind, adapter__dropout=0.0)
    packed = loaded(tmp_path, kind)
    plain = unpack(loaded(tmp_path, kind))
    batch = collate(list(tiny.store(3)), "segments")
    losses, vectors, digests = [], [], []
    for model in (packed, plain):
        before = _logits(model)
        targets = find_targets(model, settings.adapter.targets, settings.adapter.rank)
        factors, report = initialise(targets, "olora", settings.adapter.rank, 3, CPU)
        digests.append(report.digest)
        trainer = tiny.trainer(settings, model=model)
        assert torch.equal(_logits(model), before), "the start is exact"
        for name, item in at_scale(factors, settings.adapter).items():
            assert torch.equal(trainer.adapted[name].a0, item.a0)
        train_mode(trainer.adapted, True)
        trainer.flat.vector.add_(0.01)  # else nothing would flow through dA
        loss = trainer.loss(batch)
        loss.backward()
        losses.append(loss.detach())
        vectors.append(trainer.flat.grad.clone())
    assert digests[0] == digests[1]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(vectors[0], vectors[1])
    assert vectors[0].any()
    original = load_model(tmp_path, settings.model, CPU)
    other = find_targets(original, settings.adapter.targets, settings.adapter.rank)
    assert initialise(other, "olora", settings.adapter.rank, 3, CPU)[1].digest != digests[0]
    assert not torch.equal(_logits(original), before)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(2, 20)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {}, marks=pytest.mark.slow),
        ("qwen2", {"adapter__method": "pissa", "train__activation_checkpointing": True}),
    ],
)
def test_any_number_of_workers_and_a_resumed_run_end_with_the_same_bytes(
    crew: Crews, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model, alone, both = (tmp_path / name for name in ("model", "alone", "both"))
    zoo.build(ALL[family], model)
    changes = {"model__quantization": "fp8", **changes}
    (one,) = crew(1).run(run, model, alone, "ddp", changes)
    two, _ = crew(2).run(run, model, both, "ddp", changes)
    assert two[:2] == one[:2]
    assert same(adapter(both, 6), adapter(alone, 6))
    (both / checkpoints.name_of(6) / "manifest.json").unlink()
    resumed, _ = crew(2).run(run, model, both, "ddp", changes)
    assert list(resumed[0][0]) == [4, 5, 6]
    assert same(adapter(both, 6), adapter(alone, 6))


def test_a_model_without_layers_to_pack_is_refused(tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path)
    with refused("GPT2LMHeadModel has none; set it to none"):
        loaded(tmp_path, "fp8")


def test_routers_and_gates_stay() -> None:
    model = zoo.make(ALL["qwen2_moe"])
    names = to_pack(model)
    assert "model.layers.0.self_attn.q_proj" in names
    assert not any(name.endswith((".gate", "shared_expert_gate", "lm_head")) for name in names)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_plan_has_the_bytes_that_the_base_takes(tmp_path: Path, kind: str) -> None:
    zoo.build(ALL["llama"], tmp_path)
    settings = config(tmp_path, kind)
    size = estimate(settings, obtain(settings), tiny.ON_CPU)
    model = loaded(tmp_path, kind)
    of_rotation = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
    assert size.base_bytes == sum(tensor.nbytes for tensor in tensors(model).values()) - of_rotation
    largest = max(
        module.weight.numel() for module in model.modules() if isinstance(module, QuantisedLinear)
    )
    assert largest * 4 <= size.gathered_bytes <= largest * 8
    assert size.by_rows
    plain = estimate(
        override(settings, {"model.quantization": "none"}), obtain(settings), tiny.ON_CPU
    )
    assert plain.base_bytes > 1.5 * size.base_bytes


def test_a_quantised_base_is_another() -> None:
    """For a checkpoint, the shared work of a search, and the settings of a version; without it nothing changes."""
    plain, packed, other = (tiny.spec(model__quantization=kind) for kind in ("none", "fp8", "int8"))
    for what in ("identity", "base_identity", "factor_origin"):
        found = [getattr(one, what)() for one in (plain, packed, other)]
        assert "quantised base" not in found[0]
        assert found[0] == {
            name: value for name, value in found[1].items() if name != "quantised base"
        }
        assert found[1] != found[2]
    assert len({settings_digest(one.config) for one in (plain, packed, other)}) == 3


def test_packed_weights_are_not_sharded() -> None:
    with refused("model.quantization=nf4 with cluster.strategy=fsdp: "):
        tiny.decided(model__quantization="nf4", cluster__strategy="fsdp", cluster__workers=2)
