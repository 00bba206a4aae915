"""What makes logits of hidden states is the model's own forward, whatever the family does there."""

import pytest
import torch
from torch import nn

from olora_ray.common.errors import UserError
from olora_ray.model.packing import OutputHead, backbone
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL, Variant, variant

IDS = torch.randint(2, tiny.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
NAMES = ("llama", "gpt2", "cohere", "granite", "hyperclovax", "gemma2", "opt", "opt 350m", "bloom", "mamba")
FAMILIES = [
    *(ALL[name] for name in NAMES),
    variant("mixtral with router logits", ALL["mixtral"].sizes, kind="mixtral", output_router_logits=True),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_are_those_of_the_model_to_the_bit(family: Variant) -> None:
    made = zoo.make(family)
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
