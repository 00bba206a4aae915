"""Packs become batches whose positions restart and whose labels are the supervised tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.tokens.collate import Batch, collate
from olora_ray.tokens.plan import Pack
from tests import tiny

LAYOUTS = pytest.mark.parametrize(
    "attention", ["segments", "varlen", "flash_attention_2", "sdpa", "eager"]
)
lengths = st.lists(st.lists(st.integers(4, 9), min_size=1, max_size=4), min_size=1, max_size=4)


def flat(batch: Batch, name: str) -> torch.Tensor:
    value = batch.inputs[name]
    assert isinstance(value, torch.Tensor)
    return value.reshape(-1)


@LAYOUTS
@given(lengths)
def test_labels_are_the_supervised_tokens_and_follow_their_predictors(
    attention: str, lengths: list[list[int]]
) -> None:
    packs = [tiny.pack(*sizes, seed=i) for i, sizes in enumerate(lengths)]
    batch = collate(packs, attention)
    supervised = np.concatenate([pack.input_ids[pack.supervised] for pack in packs])
    assert batch.labels.tolist() == supervised.tolist()
    assert torch.equal(flat(batch, "input_ids")[batch.predicts + 1], batch.labels)
    # A predictor is the token before, in the same segment.
    assert torch.equal(
        flat(batch, "position_ids")[batch.predicts] + 1,
        flat(batch, "position_ids")[batch.predicts + 1],
    )
    assert batch.tokens == sum(map(sum, lengths))
    nothing = collate(
        [Pack(np.arange(6, dtype=np.int32), np.zeros(6, dtype=bool), (6,))], attention
    )
    assert len(nothing.predicts) == len(nothing.labels) == 0


@given(lengths)
def test_the_flat_layout_has_no_padding_and_the_borders_of_all_examples(
    lengths: list[list[int]],
) -> None:
    packs = [tiny.pack(*sizes) for sizes in lengths]
    batch = collate(packs, "segments")
    sizes = [size for pack in lengths for size in pack]
    assert flat(batch, "cu_seq_lens_q").tolist() == np.cumsum([0, *sizes]).tolist()
    assert torch.equal(flat(batch, "cu_seq_lens_q"), flat(batch, "cu_seq_lens_k"))
    assert batch.inputs["max_length_q"] == batch.inputs["max_length_k"] == max(sizes)
    assert (
        flat(batch, "input_ids").tolist()
        == np.concatenate([pack.input_ids for pack in packs]).tolist()
    )
    assert flat(batch, "position_ids").tolist() == [
        place for size in sizes for place in range(size)
    ]
