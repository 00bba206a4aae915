"""The models that can take several examples in one sequence, by their structure."""

from typing import Any

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.model.packing import (
    OutputHead,
    backbone,
    check_lengths,
    positions,
    takes_padding,
    why_apart,
    why_not_in_one_row,
)
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL, Variant, variant
from tests.tiny import LONG_ROPE, SMALL, of_kind

APART: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": (
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "keeps a state",
    ),
    "lfm2": (SMALL | {"full_attn_idxs": [1]}, "keeps a state"),
    "bloom": (
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "takes no positions",
    ),
    "falcon": (SMALL | {"alibi": True}, "takes no positions"),
    "recurrent_gemma": (SMALL | {"num_hidden_layers": 3, "lru_width": 32}, "keeps a state"),
}


@pytest.mark.parametrize("kind", APART)
def test_models_that_carry_something_over(kind: str) -> None:
    sizes, reason = APART[kind]
    with torch.device("meta"):
        assert reason in str(why_apart(of_kind(kind, sizes)))


@pytest.mark.parametrize("kind", APART)
def test_padding_is_for_models_that_leave_it_out(kind: str) -> None:
    with torch.device("meta"):
        assert takes_padding(of_kind(kind, APART[kind][0])) == (kind != "recurrent_gemma")


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "mixtral", "falcon"])
def test_attention_alone_is_kept_inside_of_an_example(kind: str) -> None:
    assert why_apart(of_kind(kind, SMALL)) is None
    assert why_apart(tiny.gpt2()) is None


def test_a_tower_for_images_may_have_convolutions() -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.device("meta"):
        made = of_kind("gemma3", {"text_config": SMALL | {"head_dim": 8}, "vision_config": vision})
        assert any(isinstance(module, torch.nn.Conv2d) for module in made.modules())
        assert why_apart(made) is None


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": DYNAMIC,
}


def refusal(kind: str, sizes: dict[str, Any], length: int, **changes: Any) -> str | None:
    with torch.device("meta"):
        made = of_kind(kind, sizes)
    try:
        check_lengths(made, tiny.decided(data__max_length=length, **changes))
    except UserError as error:
        return str(error)
    return None


def test_positions_that_are_encoded_by_the_longest_of_a_micro_batch_are_refused_beside_others() -> (
    None
):
    alone = {"train__micro_batch": 1, "data__packing": False}
    assert refusal("phi3", LONG_ROPE, 64) is None
    told = str(refusal("phi3", LONG_ROPE, 65))
    assert told.startswith(
        "data.max_length=65: above 64 tokens Phi3ForCausalLM changes the positions"
    )
    assert told.endswith(
        "set data.max_length to 64 at most, or train.micro_batch to 1 and data.packing to false"
    )
    assert refusal("phi3", LONG_ROPE, 512, **alone) is None
    assert refusal("phi3", LONG_ROPE, 512, **(alone | {"data__packing": "auto"})) == told.replace(
        "65", "512"
    )
    assert refusal("phi3", LONG_ROPE, 512, **(alone | {"train__micro_batch": 2})) == told.replace(
        "65", "512"
    )


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("llama", {"rope_parameters": DYNAMIC}), ("gemma3_text", {"rope_parameters": BY_LAYER})],
)
def test_positions_that_are_encoded_by_the_longest_so_far_are_refused(
    kind: str, sizes: dict[str, Any]
) -> None:
    made = SMALL | {"head_dim": 8, "max_position_embeddings": 64} | sizes
    assert refusal(kind, made, 64) is None
    told = str(refusal(kind, made, 65, train__micro_batch=1, data__packing=False))
    assert "once a sequence has more than 64 tokens" in told
    assert told.endswith("; set data.max_length to 64 at most")


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "opt 350m", "gpt_neo", "gpt_bigcode", "biogpt", "gptj", "codegen"]
)
def test_positions_that_are_looked_up_in_a_table_end_with_it(family: str) -> None:
    made = zoo.on_meta(ALL[family])
    assert positions(made) == 128
    check_lengths(made, tiny.decided(data__max_length=128))
    with pytest.raises(UserError) as caught:
        check_lengths(
            made, tiny.decided(data__max_length=129, data__packing=False, train__micro_batch=1)
        )
    assert str(caught.value) == (
        f"data.max_length=129: {type(made).__name__} has positions for 128 tokens; set data.max_length to 128 at most"
    )


@pytest.mark.parametrize(
    "family", ["llama", "gpt_neox", "falcon", "bloom", "mpt", "xglm", "phi", "gemma3", "mamba"]
)
def test_other_positions_have_no_end(family: str) -> None:
    assert positions(zoo.on_meta(ALL[family])) is None


def test_attention_that_is_scaled_by_the_place_in_a_row() -> None:
    sizes = SMALL | {
        "floor_scale": 64,
        "num_local_experts": 2,
        "head_dim": 8,
        "no_rope_layers": [1, 0],
    }
    with torch.device("meta"):
        made, other = (
            of_kind("llama4_text", sizes),
            of_kind("llama4_text", sizes | {"attn_temperature_tuning": False}),
        )
    assert why_not_in_one_row(made, 63) is None
    assert "scales its attention by the position in a row, from 64 tokens on" in str(
        why_not_in_one_row(made, 64)
    )
    assert why_not_in_one_row(other, 64) is None
    assert refusal("llama4_text", sizes, 63) is None
    assert str(refusal("llama4_text", sizes, 64)).endswith("; set data.packing: false")
    assert refusal("llama4_text", sizes, 64, data__packing=False) is None


IDS = torch.randint(2, tiny.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
NAMES = (
    "llama",
    "gpt2",
    "cohere",
    "granite",
    "hyperclovax",
    "gemma2",
    "opt",
    "opt 350m",
    "bloom",
    "mamba",
)
FAMILIES = [
    *(ALL[name] for name in NAMES),
    variant(
        "mixtral with router logits",
        ALL["mixtral"].sizes,
        kind="mixtral",
        output_router_logits=True,
    ),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_are_those_of_the_model_to_the_bit(family: Variant) -> None:
    made = zoo.make(family)
    hidden = backbone(made)(input_ids=IDS).last_hidden_state[0]
    head = OutputHead(made)
    assert torch.equal(head(hidden), made(input_ids=IDS).logits[0])
    rows = torch.stack([head(row[None])[0] for row in hidden])
    torch.testing.assert_close(rows, head(hidden))
