"""The names in adapter.targets: which layers each selects, and which "all-linear" leaves out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_ray.adapter.candidates import MAMBA_TYPES, candidates, output_head
from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets, inject, select
from olora_ray.adapter.layer import AdaptedLinear
from olora_ray.common.errors import UserError
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.self_test import check_adapters
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL
from tests.refused import refused

CPU = torch.device("cpu")
STACKS = [
    f"model.layers.{layer}.mlp.experts.{part}"
    for layer in (0, 1)
    for part in ("gate_up_proj", "down_proj")
]


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
    [
        ("phimoe", 2, 0),
        ("llama4_text", 1, 0),
        ("qwen2_moe", 0, 2),
        ("mixtral", 0, 0),
        ("deepseek_v3", 0, 0),
        ("bloom", 0, 0),
        ("falcon", 0, 0),
    ],
)
def test_routers_and_gates_of_one_row_are_left_out(family: str, routers: int, gates: int) -> None:
    left = [
        reason.kind
        for reason in select(zoo.on_meta(ALL[family]), "all-linear", 1).left_out.values()
    ]
    assert left.count("routers") == routers
    assert left.count("gates of one row") == gates
    assert len(left) == routers + gates + 1  # the head


class Block(nn.Module):
    """A mixture with a plain linear layer as its router, and experts as modules."""

    def __init__(self, experts: int = 6) -> None:
        super().__init__()
        self.choose = nn.Linear(8, experts)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)}) for _ in range(6)
        )
        self.shared = nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)})


def test_a_linear_layer_with_one_output_for_each_expert_is_a_router() -> None:
    found = select(nn.ModuleDict({"block": Block()}), "all-linear", 2)
    assert [reason.kind for reason in found.left_out.values()] == ["routers"]
    assert list(found.left_out) == ["block.choose"]
    assert len(found.targets) == 14, "hidden layers may have as many features as there are experts"
    assert "block.choose" in select(nn.ModuleDict({"block": Block(5)}), "all-linear", 2).targets


def test_layers_whose_weight_the_code_takes_are_left_out_and_refused_by_name() -> None:
    model = zoo.on_meta(ALL["mamba"])
    found = select(model, "all-linear", 4)
    assert {name.rpartition(".")[2] for name in found.targets} == {"in_proj", "x_proj"}
    assert {name.rpartition(".")[2] for name in found.left_out} == {
        "dt_proj",
        "out_proj",
        "lm_head",
    }
    with refused("dt_proj' is a layer whose weight the model's code reads directly"):
        find_targets(model, ("dt_proj",), 4)


def test_a_weight_that_the_code_takes_for_itself_is_refused_before_the_first_step() -> None:
    """Otherwise its adapter would silently take no part in the training, but part in the export."""
    model, config = tiny.llama(), tiny.config()

    def forward(x: Tensor) -> Tensor:
        mlp = model.model.layers[1].mlp
        assert mlp.down_proj.weight.shape == (64, 112), "facts are no use"
        return nn.functional.linear(
            mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
        )

    model.model.layers[1].mlp.forward = forward
    factors, _ = initialise(find_targets(model, "all-linear", 4), "olora", 4, 0, CPU)
    adapted = inject(model, factors, config.adapter.scale())
    line = (
        "adapter.targets: model.layers.1.mlp.down_proj: adapters do not support linear of a weight, which the model's"
        " code uses; leave it out of adapter.targets"
    )
    with pytest.raises(UserError, match=f"^{line}$"):
        check_adapters(SupervisedLoss(model), adapted, [tiny.pack(9, 7)], "sdpa", CPU, new=True)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Same(nn.Linear):
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


class Packed(nn.Linear):
    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.weight = nn.Parameter(
            torch.zeros(n * m // 2, 1, dtype=torch.uint8), requires_grad=False
        )


def test_packed_weights_are_refused_by_name_and_left_out_otherwise() -> None:
    model = nn.ModuleDict(
        {
            "packed": Packed(8, 12),
            "eight": nn.Linear(8, 8).to(torch.float8_e4m3fn),
            "own": nn.Linear(8, 8),
        }
    )
    assert list(select(model, "all-linear", 4).targets) == ["own"]
    with refused("'packed' is a layer with packed weights (Packed, uint8)"):
        find_targets(model, ("packed",), 4)
    with refused("'eight' is a layer with packed weights (Linear, float8_e4m3fn)"):
        find_targets(model, ("eight",), 4)


class DbrxExperts(nn.Module):
    """Experts as one matrix; the code multiplies with views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.other = nn.Parameter(torch.rand(12, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w1.view(3, 4, 4)[0]


def test_experts_in_a_layout_that_is_not_known_are_not_chosen() -> None:
    model = nn.ModuleDict({"experts": DbrxExperts()})
    assert list(find_targets(model, "all-linear", 4)) == ["experts.other"]
    with pytest.raises(UserError):
        find_targets(model, ("experts.w1",), 4)


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


LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")


def test_all_linear_takes_everything_but_head_and_embeddings() -> None:
    for tied in (False, True):
        found = find_targets(tiny.llama(tie_word_embeddings=tied), "all-linear", 4)
        assert len(found) == 2 * len(LLAMA_LAYERS)
        assert {name.rpartition(".")[2] for name in found} == set(LLAMA_LAYERS)
    found = find_targets(tiny.gpt2(), "all-linear", 4)
    assert {name.rpartition(".")[2] for name in found} == {"c_attn", "c_proj", "c_fc"}
    assert len(found) == 2 * 4


@pytest.mark.parametrize(
    ("family", "entry", "expected"),
    [
        ("llama", "model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("llama", "mlp.up_proj", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        (
            "llama",
            r".*layers\.0\..*(q|v)_proj",
            ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
        ),
        ("mixtral", "experts", STACKS),
        ("mixtral", "mlp.experts", STACKS),
        ("mixtral", "gate_up_proj", STACKS[::2]),
        ("mixtral", "model.layers.1.mlp.experts", STACKS[2:]),
        ("mixtral", "model.layers.1.mlp.experts.down_proj", STACKS[3:]),
        ("mixtral", r".*\.0\.mlp\.experts\.(gate_up|down)_proj", STACKS[:2]),
    ],
)
def test_a_target_is_a_name_a_suffix_or_a_regular_expression(
    family: str, entry: str, expected: list[str]
) -> None:
    assert list(find_targets(zoo.on_meta(ALL[family]), (entry,), 4)) == expected


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("proj", "'proj' matches no linear layer"),
        (
            "query_key_value",
            f"'query_key_value' .* the model has {', '.join(sorted([*LLAMA_LAYERS, 'lm_head']))}",
        ),
        ("(q_proj", r"adapter\.targets: '\(q_proj' is not a regular expression"),
        ("lm_head", "'lm_head' is the output head"),
        (".*", "'lm_head' is the output head"),
    ],
)
def test_an_entry_that_names_nothing_to_adapt_is_refused(entry: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        find_targets(tiny.llama(), ("q_proj", entry), 4)


def test_a_rank_too_large_leaves_layers_out_or_names_one_and_what_fits() -> None:
    found = select(tiny.llama(), "all-linear", 48)
    small = [
        name
        for name, reason in found.left_out.items()
        if reason.kind == "layers smaller than adapter.rank=48"
    ]
    assert small == [
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "kv"
    ]
    assert len(found.targets) == 2 * 5
    with pytest.raises(
        UserError, match=r"adapter\.rank=65 is too large for .*\(64 x 64\): use at most 64"
    ):
        find_targets(tiny.llama(), "all-linear", 65)
    with pytest.raises(
        UserError, match=r"adapter\.rank=48 .*self_attn\.k_proj \(32 x 64\): use at most 32"
    ):
        find_targets(tiny.llama(), ("q_proj", "k_proj"), 48)
    assert find_targets(tiny.llama(), ("q_proj",), 48)
    with pytest.raises(UserError):
        find_targets(zoo.on_meta(ALL["qwen3_moe"]), ("experts",), 40)


@pytest.mark.parametrize(
    "make", [tiny.llama, lambda: zoo.make(ALL["mixtral"])], ids=["llama", "mixtral"]
)
def test_only_the_adapters_are_trainable(make: Callable[[], Any]) -> None:
    model = make().requires_grad_(True)
    targets = find_targets(model, "all-linear", 4)
    adapted = inject(model, initialise(targets, "olora", 4, 0, CPU)[0], 1.0)
    assert list(adapted) == list(targets)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{part}" for name in targets for part in ("da", "db")}
    head = output_head(model)
    assert head is not None
    assert not isinstance(head, AdaptedLinear)
