"""Targets are found by name, and the model comes out of it as it went in."""

import pytest
import torch

from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets, inject, output_head, remove
from olora_ray.adapter.layer import AdaptedLinear
from olora_ray.common.errors import UserError
from tests import tiny

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_takes_everything_but_head_and_embeddings(tied: bool) -> None:
    found = find_targets(tiny.llama(tie_word_embeddings=tied), "all-linear", 4)
    assert len(found) == 2 * len(LLAMA_LAYERS)
    assert {name.rpartition(".")[2] for name in found} == set(LLAMA_LAYERS)


def test_all_linear_takes_the_conv1d_of_gpt2() -> None:
    found = find_targets(tiny.gpt2(), "all-linear", 4)
    assert {name.rpartition(".")[2] for name in found} == {"c_attn", "c_proj", "c_fc"}
    assert len(found) == 2 * 4


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("mlp.up_proj", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        (r".*layers\.0\..*(q|v)_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]),
    ],
    ids=["name", "short name", "dotted suffix", "regular expression"],
)
def test_a_target_is_a_name_a_suffix_or_a_regular_expression(entry: str, expected: list[str]) -> None:
    assert list(find_targets(tiny.llama(), (entry,), 4)) == expected


def test_targets_come_in_the_order_of_the_model_whatever_the_order_of_the_entries() -> None:
    model = tiny.llama()
    found = find_targets(model, ("down_proj", "q_proj", ".*q_proj"), 4)
    assert list(found) == [name for name, _ in model.named_modules() if name.endswith(("down_proj", "q_proj"))]


def test_a_suffix_matches_whole_parts_only() -> None:
    with pytest.raises(UserError, match="'proj' matches no linear layer"):
        find_targets(tiny.llama(), ("proj",), 4)


def test_an_unknown_target_lists_what_there_is() -> None:
    with pytest.raises(UserError) as caught:
        find_targets(tiny.llama(), ("q_proj", "query_key_value"), 4)
    assert "'query_key_value'" in str(caught.value)
    for kind in LLAMA_LAYERS:
        assert kind in str(caught.value)


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(UserError, match=r"adapter\.targets: '\(q_proj' is not a regular expression"):
        find_targets(tiny.llama(), ("(q_proj",), 4)


def test_a_rank_too_large_names_the_layer_and_what_fits() -> None:
    with pytest.raises(UserError, match=r"adapter\.rank=48 .*self_attn\.k_proj \(32 x 64\): use at most 32"):
        find_targets(tiny.llama(), "all-linear", 48)
    assert find_targets(tiny.llama(), ("q_proj",), 48)


@pytest.mark.parametrize("entry", ["lm_head", ".*head", ".*"])
def test_the_output_head_is_refused(entry: str) -> None:
    with pytest.raises(UserError, match="'lm_head' is the output head"):
        find_targets(tiny.llama(), (entry,), 4)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no linear layer"):
        find_targets(torch.nn.Sequential(torch.nn.Embedding(4, 4)), "all-linear", 1)


def test_only_the_adapters_are_trainable() -> None:
    model = tiny.llama().requires_grad_(True)
    targets = find_targets(model, "all-linear", 4)
    adapted = inject(model, initialise(targets, "olora", 4, 0, CPU)[0], 1.0)
    assert list(adapted) == list(targets)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{part}" for name in targets for part in ("da", "db")}
    head = output_head(model)
    assert head is not None
    assert not isinstance(head, AdaptedLinear)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_remove_gives_the_base_back_bit_for_bit(make: object) -> None:
    assert callable(make)
    model, ids = make(), torch.arange(2, 22).view(1, 20)
    logits, before = model(input_ids=ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    targets = find_targets(model, "all-linear", 4)
    adapted = inject(model, initialise(targets, "olora", 4, 0, CPU)[0], 1.0)
    with torch.no_grad():
        for layer in adapted.values():
            layer.da.fill_(0.1)
    assert not torch.equal(model(input_ids=ids).logits, logits)
    remove(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    found = {name: module for name, module in model.named_modules() if name in targets}
    assert found == {name: target.module for name, target in targets.items()}
    assert torch.equal(model(input_ids=ids).logits, logits)
