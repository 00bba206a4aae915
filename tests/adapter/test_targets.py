"""all-linear means the linear layers of the language model, experts included; names mean what they name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_ray.adapter.candidates import MAMBA_TYPES, Target, candidates
from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets, inject, select
from olora_ray.adapter.layer import AdaptedLinear, Factors, TakenWeight
from olora_ray.adapter.methods import METHODS
from olora_ray.common.errors import UserError
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import check_adapters
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")
STACKS = [f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in ("gate_up_proj", "down_proj")]


def test_of_a_model_that_sees_the_language_model_alone_is_adapted() -> None:
    model = zoo.on_meta(ALL["gemma3"])
    selection = select(model, "all-linear", 4)
    assert len(selection.targets) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in selection.targets)
    kinds = {reason.kind for reason in selection.left_out.values()}
    assert kinds == {"vision tower", "output head"}
    tower = [name for name in candidates(model) if "vision_tower" in name]
    assert len(tower) >= 3 * 6
    assert set(tower) <= set(selection.left_out)
    assert find_targets(model, (".*vision_tower.*fc1",), 4), "whoever names it means it"


@pytest.mark.parametrize(
    ("family", "routers", "gates"),
    [("phimoe", 2, 0), ("llama4_text", 1, 0), ("qwen2_moe", 0, 2), ("mixtral", 0, 0), ("deepseek_v3", 0, 0)],
)
def test_routers_and_gates_of_one_row_are_left_out(family: str, routers: int, gates: int) -> None:
    left = [reason.kind for reason in select(zoo.on_meta(ALL[family]), "all-linear", 1).left_out.values()]
    assert left.count("routers") == routers
    assert left.count("gates of one row") == gates
    assert len(left) == routers + gates + 1  # the head


def test_a_layer_that_has_no_weight_any_more_is_packed() -> None:
    """As compressed-tensors leaves it."""
    model = nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)})
    layer: Any = model["up"]
    del layer.weight
    layer.weight_packed = nn.Parameter(torch.zeros(6, 1, dtype=torch.int32), requires_grad=False)
    selection = select(model, "all-linear", 2)
    assert list(selection.targets) == ["down"]
    assert selection.left_out["up"].kind == "layers with packed weights"
    del model["down"]
    with pytest.raises(UserError, match=r"no linear layer to adapt, only layers with packed weights$"):
        select(model, "all-linear", 2)


class Block(nn.Module):
    """A mixture with a plain linear layer as its router, and experts as modules."""

    def __init__(self, experts: int = 6) -> None:
        super().__init__()
        self.choose = nn.Linear(8, experts)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)}) for _ in range(6))
        self.shared = nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)})


def test_a_linear_layer_with_one_output_for_each_expert_is_a_router() -> None:
    found = select(nn.ModuleDict({"block": Block()}), "all-linear", 2)
    assert [reason.kind for reason in found.left_out.values()] == ["routers"]
    assert list(found.left_out) == ["block.choose"]
    assert len(found.targets) == 14, "hidden layers may have as many features as there are experts"
    assert "block.choose" in select(nn.ModuleDict({"block": Block(5)}), "all-linear", 2).targets


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("experts", STACKS),
        ("mlp.experts", STACKS),
        ("gate_up_proj", STACKS[::2]),
        ("model.layers.1.mlp.experts", STACKS[2:]),
        ("model.layers.1.mlp.experts.down_proj", STACKS[3:]),
        (r".*\.0\.mlp\.experts\.(gate_up|down)_proj", STACKS[:2]),
    ],
)
def test_experts_are_named_by_their_module_or_their_parameter(entry: str, expected: list[str]) -> None:
    assert list(find_targets(zoo.on_meta(ALL["mixtral"]), (entry,), 4)) == expected


def test_a_rank_too_large_for_an_expert_names_it() -> None:
    with pytest.raises(UserError, match=r"adapter\.rank=40 .*experts\.down_proj \(64 x 24\)"):
        find_targets(zoo.on_meta(ALL["qwen3_moe"]), ("experts",), 40)


def test_layers_whose_weight_the_code_takes_are_left_out_and_refused_by_name() -> None:
    model = zoo.on_meta(ALL["mamba"])
    found = select(model, "all-linear", 4)
    assert {name.rpartition(".")[2] for name in found.targets} == {"in_proj", "x_proj"}
    assert {name.rpartition(".")[2] for name in found.left_out} == {"dt_proj", "out_proj", "lm_head"}
    with pytest.raises(UserError, match=r"dt_proj' is a layer whose weight the model's code takes for itself"):
        find_targets(model, ("dt_proj",), 4)


def test_a_weight_that_the_code_takes_for_itself_is_refused_before_the_first_step() -> None:
    """In silence its adapter would take no part in the training, and part in the export."""
    model, config = tiny.llama(), tiny.config()

    def forward(x: Tensor) -> Tensor:
        mlp = model.model.layers[1].mlp
        assert mlp.down_proj.weight.shape == (64, 112), "facts are no use"
        return nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)

    model.model.layers[1].mlp.forward = forward
    factors, _ = initialise(find_targets(model, "all-linear", 4), "olora", 4, 0, CPU)
    adapted = inject(model, factors, config.adapter.scale())
    line = (
        "adapter.targets: model.layers.1.mlp.down_proj: an adapter cannot follow linear of its weight in the model's"
        " code; leave it out of adapter.targets"
    )
    with pytest.raises(UserError, match=f"^{line}$"):
        check_adapters(SupervisedLoss(model), adapted, [tiny.pack(9, 7)], "sdpa", CPU, new=True)


def test_bloom_and_falcon_are_adapted_whole() -> None:
    bloom = zoo.on_meta(ALL["bloom"])
    assert {reason.kind for reason in select(bloom, "all-linear", 4).left_out.values()} == {"output head"}
    assert len(select(zoo.on_meta(ALL["falcon"]), "all-linear", 4).targets) == 2 * 4


class Scaled(nn.Linear):
    """Not a linear map of its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Pair(nn.Linear):
    """Returns what a linear layer does not."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Same(nn.Linear):
    """Written differently."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_counts_as_linear_if_it_computes_a_linear_map(device: str) -> None:
    layers = {each.__name__.lower(): each(12, 8, device=device) for each in (Scaled, Pair, Same)}
    found = select(nn.ModuleDict(layers), "all-linear", 4)
    assert list(found.targets) == ["same"]
    assert [reason.what for reason in found.left_out.values()] == [
        "a Scaled, which computes more than a linear map",
        "a Pair, which computes more than a linear map",
    ]


class Crop(torch.autograd.Function):
    """A kernel that computes more rows than are asked for, and returns a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor) -> Tensor:
        return whole[: len(x)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][:, :8] * 0, None


class Packed(nn.Linear):
    """Four bits a weight, as quantisers keep them."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.weight = nn.Parameter(torch.zeros(n * m // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.kept = torch.ones(5, m)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Crop.apply(x, self.kept)  # type: ignore[no-untyped-call]
        return result


def test_packed_weights_are_refused_by_name_and_left_out_otherwise() -> None:
    model = nn.ModuleDict(
        {"packed": Packed(8, 12), "eight": nn.Linear(8, 8).to(torch.float8_e4m3fn), "own": nn.Linear(8, 8)}
    )
    assert list(select(model, "all-linear", 4).targets) == ["own"]
    with pytest.raises(UserError, match=r"'packed' is a layer with packed weights \(Packed, uint8\)"):
        find_targets(model, ("packed",), 4)
    with pytest.raises(UserError, match=r"'eight' is a layer with packed weights \(Linear, float8_e4m3fn\)"):
        find_targets(model, ("eight",), 4)


def test_an_adapter_on_packed_weights_has_the_layers_size_and_does_not_touch_what_it_returns() -> None:
    base = Packed(8, 12)
    layer = AdaptedLinear(base, METHODS["lora"].factors(torch.zeros(12, 8), 4, 0), 2.0)
    assert layer.db.shape == (12, 4)
    layer.db.data.fill_(1.0)
    y = layer(torch.rand(3, 8, requires_grad=True))
    assert not torch.equal(y, torch.ones(3, 12))
    y.sum().backward()
    assert layer.db.grad is not None
    assert torch.equal(base.kept, torch.ones(5, 12))


def test_the_weight_of_an_adapted_layer_tells_facts_and_nothing_else() -> None:
    layer = AdaptedLinear(nn.Linear(8, 12), Factors(torch.zeros(4, 8), None), 1.0)
    assert layer.weight.shape == (12, 8)
    assert layer.weight.device.type == "cpu"
    assert layer.weight.dtype == torch.float32
    assert layer.bias is layer.base.bias
    for use in (
        lambda x: x @ layer.weight.T,
        lambda x: nn.functional.linear(x, layer.weight),
        lambda x: x @ layer.weight,
    ):
        with pytest.raises(TakenWeight):
            use(torch.rand(3, 8))


class DbrxExperts(nn.Module):
    """Experts as one matrix, in views of which the code multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.other = nn.Parameter(torch.rand(12, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w1.view(3, 4, 4)[0]


def test_experts_in_a_layout_that_is_not_known_are_left_out_with_a_reason() -> None:
    model = nn.ModuleDict({"experts": DbrxExperts()})
    found = select(model, "all-linear", 4)
    assert list(found.targets) == ["experts.other"]
    assert found.left_out["experts.w1"].kind == "experts whose layout the code of DbrxExperts does not tell"
    with pytest.raises(UserError, match=r"'experts\.w1' is a set of experts whose layout"):
        find_targets(model, ("experts.w1",), 4)


def test_a_target_knows_its_weight_as_output_by_input() -> None:
    linear, conv = nn.Linear(6, 4), tiny.gpt2().transformer.h[0].mlp.c_fc
    assert Target(linear, "weight", stored_transposed=False).shape == (4, 6)
    found = find_targets(tiny.gpt2(), ("c_fc",), 4)["transformer.h.0.mlp.c_fc"]
    assert found.shape == (128, 32)
    assert found.stored_transposed
    assert found.experts is None
    assert torch.equal(found.weight(), conv.weight.T)


def test_the_models_whose_output_projections_peft_refuses_are_those_of_peft() -> None:
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as of_peft
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    settings, refused = SimpleNamespace(peft_type="LORA"), set()
    for kind in CONFIG_MAPPING_NAMES:
        try:
            of_peft(settings, SimpleNamespace(config=SimpleNamespace(model_type=kind)), "out_proj")
        except ValueError:
            refused.add(kind)
    assert refused == MAMBA_TYPES
