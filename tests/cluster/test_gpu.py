"""What only a GPU can show."""

import pytest
import torch

from olora_ray.model.attention import candidates
from olora_ray.model.load import pick_dtype
from olora_ray.tokens.collate import collate
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_equals_the_base_exactly(dtype: torch.dtype) -> None:
    base = tiny.llama(attention="sdpa", dtype=dtype).cuda()
    ids = torch.randint(2, tiny.VOCABULARY, (2, 16), device="cuda")
    with torch.no_grad():
        expected = base(ids, use_cache=False).logits
        adapted = tiny.trainer(tiny.config(), attention="sdpa", model=tiny.llama(attention="sdpa", dtype=dtype))
        adapted.loss.cuda()
        assert torch.equal(adapted.loss.model(ids, use_cache=False).logits, expected)


def test_the_attention_that_is_picked_keeps_segments_apart() -> None:
    device = torch.device("cuda")
    settings = tiny.config()
    dtype = pick_dtype(settings.model, device)
    attention = candidates(tiny.llama(), settings.model, dtype, device)[0]
    model = tiny.llama(attention=attention, dtype=dtype).cuda()
    packs = [tiny.pack(9, 7, 12)]
    trainer = tiny.trainer(settings, attention=attention, model=model)
    trainer.loss.cuda()
    with torch.no_grad():
        packed = trainer.loss(collate(packs, attention).to(device))
        alone = sum(trainer.loss(collate([single], attention).to(device)) for single in tiny.unpacked(packs))
    assert torch.allclose(packed, torch.as_tensor(alone), rtol=2e-2)
