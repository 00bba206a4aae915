"""What makes logits of hidden states is the model's own forward, whatever the family does there."""

from typing import Any

import pytest
import torch
from torch import nn

from olora_ray.common.errors import UserError
from olora_ray.model.head import OutputHead, backbone
from tests import tiny

IDS = torch.randint(2, tiny.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gpt2": {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "cohere": SMALL | {"logit_scale": 0.25},
    "granite": SMALL | {"logits_scaling": 3.0},
    "hyperclovax": SMALL | {"logits_scaling": 3.0},
    "gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 1.5},
    "opt": SMALL | {"word_embed_proj_dim": 16, "ffn_dim": 48},
    "bloom": {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": SMALL | {"num_local_experts": 4, "output_router_logits": True},
}


def model(kind: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_the_model_to_the_bit(kind: str) -> None:
    made = model(kind, FAMILIES[kind])
    hidden = backbone(made)(input_ids=IDS).last_hidden_state[0]
    head = OutputHead(made)
    assert torch.equal(head(hidden), made(input_ids=IDS).logits[0])
    rows = torch.stack([head(row[None])[0] for row in hidden])
    torch.testing.assert_close(rows, head(hidden))


def test_the_head_is_the_models_own_also_after_a_change() -> None:
    made = tiny.llama()
    head, hidden = OutputHead(made), torch.randn(3, 64)
    before = head(hidden)
    made.lm_head.weight.data.mul_(2)
    torch.testing.assert_close(head(hidden), 2 * before)
    assert [name for name, _ in made.named_children()] == ["model", "lm_head"]


def test_what_has_no_backbone_is_refused() -> None:
    with pytest.raises(UserError, match="Linear is not a backbone with an output head"):
        OutputHead(nn.Linear(2, 2))
