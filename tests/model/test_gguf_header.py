"""A GGUF file whose header does not fit the file is refused before a reader trusts it."""

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.common.errors import UserError
from olora_ray.model import convert, source
from tests import tiny
from tests.model import small_gguf
from tests.refused import refused
from tests.said import said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pytest.importorskip("gguf")
    return small_gguf.write(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


def obtain(folder: Path, content: bytes) -> source.BaseModel:
    (folder / "model.gguf").write_bytes(content)
    return source.obtain(
        tiny.config(model__name=str(folder / "model.gguf"), run__storage=str(folder / "runs"))
    )


def value_of(content: bytes, key: str) -> int:
    """The offset of a key's value: after its name and its type."""
    return content.index(key.encode()) + len(key) + 4


def with_number(content: bytes, place: int, kind: str, number: int) -> bytes:
    packed = struct.pack(f"<{kind}", number)
    return content[:place] + packed + content[place + len(packed) :]


def test_a_whole_file_is_converted(whole: bytes, tmp_path: Path) -> None:
    base = obtain(tmp_path, whole)
    assert (Path(base.folder) / "model.safetensors").is_file()
    assert (Path(base.folder) / "tokenizer.json").is_file()
    assert obtain(tmp_path, whole) == base


@pytest.mark.parametrize("layer", ["attn_q", "ffn_up"])
def test_biases_that_transformers_leaves_out_are_refused(tmp_path: Path, layer: str) -> None:
    size = {"attn_q": small_gguf.WIDTH, "ffn_up": small_gguf.INNER}[layer]
    zeros, ones = ({f"blk.0.{layer}.bias": [number] * size} for number in (0.0, 1.0))
    file = small_gguf.write(tmp_path / "zeros.gguf", more=zeros)
    obtain(tmp_path, file.read_bytes())
    file = small_gguf.write(tmp_path / "ones.gguf", more=ones)
    with pytest.raises(UserError, match=rf"has blk\.0\.{layer}\.bias, which transformers ignores"):
        obtain(tmp_path, file.read_bytes())


@pytest.mark.parametrize(
    ("key", "kind", "number", "problem"),
    [
        (
            "llama.block_count",
            "I",
            0x4E000001,
            "llama.block_count is 1308622849, but its tensors have 1 blocks",
        ),
        ("llama.block_count", "I", 2, "llama.block_count is 2, but its tensors have 1 blocks"),
        ("llama.embedding_length", "I", 2**31, "llama.embedding_length is 2147483648, but"),
        ("llama.feed_forward_length", "I", 2**30, "llama.feed_forward_length is 1073741824, but"),
        ("llama.context_length", "I", 2**32 - 1, "llama.context_length cannot be 4294967295"),
        ("llama.context_length", "Q", 2**64 - 1, ""),
        ("tokenizer.ggml.tokens", "I", 77, "is not a valid GGUFValueType"),
        ("general.architecture", "Q", 2**63, "it is cut off"),
        ("blk.0.attn_q.weight", "Q", 2**63, ""),
    ],
)
def test_a_number_that_cannot_be_is_named_at_once(
    whole: bytes, tmp_path: Path, key: str, kind: str, number: int, problem: str
) -> None:
    refused_at_once(tmp_path, with_number(whole, value_of(whole, key), kind, number), problem)
    assert not (tmp_path / "runs" / "models").exists() or not list(
        (tmp_path / "runs" / "models").glob("model-*")
    )


def refused_at_once(folder: Path, content: bytes, problem: str) -> None:
    begun = time.process_time()
    with refused("model.gguf cannot be loaded as a GGUF model: ") as caught:
        obtain(folder, content)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - begun < 20


THETA = 500_000.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def divisors() -> list[float]:
    """The numbers by which Llama 3.1 divides the frequencies of the small model's heads, computed by transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = LlamaConfig(
        hidden_size=small_gguf.WIDTH,
        num_attention_heads=small_gguf.HEADS,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": THETA, **LLAMA3},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](shape, torch.device("cpu"))
    return [
        round(THETA ** (-place / len(scaled)) / float(each), 4) for place, each in enumerate(scaled)
    ]


def test_the_scaled_positions_of_llama_3_are_those_of_the_converted_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    found = divisors()
    assert (found[0], found[-1]) == (1, 8)
    assert 1 < found[2] < 8, "one between the two"
    file = small_gguf.write(tmp_path / "model.gguf", THETA, more={"rope_freqs.weight": found})
    base = source.obtain(tiny.config(model__name=str(file), run__storage=str(tmp_path / "runs")))
    shape = json.loads((Path(base.folder) / "config.json").read_text())
    assert shape["rope_parameters"] == {"rope_theta": THETA, **LLAMA3}


@pytest.mark.parametrize(
    ("scaling", "more", "what"),
    [
        ({"scaling.type": "linear", "scaling.factor": 8.0}, {}, "linear"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, {}, "yarn"),
        ({"scaling.factor": 4.0}, {}, "linear"),
        ({"scale_linear": 4.0}, {}, "linear"),
        ({}, {"rope_freqs.weight": [1.0, 2.0, 4.0, 8.0]}, "rope_freqs.weight"),
        ({}, {"rope_freqs.weight": [float("nan")] * 4}, "rope_freqs.weight"),
        ({}, {"rope_factors_short.weight": [1.0] * 4}, "rope_factors_short.weight"),
        ({"scaling.type": "none", "scaling.factor": 4.0}, {}, None),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, {}, None),
        ({}, {"rope_freqs.weight": [1.0] * 4}, None),
    ],
)
def test_positions_that_would_be_others_are_refused_and_unscaled_ones_are_taken(
    tmp_path: Path, scaling: dict[str, Any], more: dict[str, list[float]], what: str | None
) -> None:
    pytest.importorskip("gguf")
    file = small_gguf.write(tmp_path / "model.gguf", THETA, scaling, more)
    if what is None:
        assert convert.check_gguf(file) == {}
        return
    with pytest.raises(
        UserError, match=rf"model\.gguf .* scaled rotary positions \({what}\) .*safetensors"
    ):
        convert.check_gguf(file)


def test_the_base_of_the_frequencies_is_told_where_transformers_passes_it_by(
    tmp_path: Path,
) -> None:
    pytest.importorskip("gguf")
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    for family in ("starcoder2", "stablelm"):
        assert "rope.freq_base" not in GGUF_CONFIG_MAPPING[family], "what this is about"
        file = small_gguf.write(tmp_path / f"{family}.gguf", 2.0**20, architecture=family)
        assert convert.check_gguf(file) == {"rope_parameters": {"rope_theta": 2.0**20}}


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_an_attention_that_is_divided_by_what_the_file_does_not_say_is_refused(
    tmp_path: Path, family: str
) -> None:
    pytest.importorskip("gguf")
    file = small_gguf.write(tmp_path / "small.gguf", architecture=family, head=256)
    assert convert.check_gguf(file) == {}
    file = small_gguf.write(tmp_path / "27b.gguf", architecture=family, head=128)
    with pytest.raises(
        UserError, match=r"27b\.gguf .* does not contain this model's attention scale; name"
    ):
        convert.check_gguf(file)


def test_the_window_of_phi_3_is_told(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    assert "attention.sliding_window" not in GGUF_CONFIG_MAPPING["phi3"], "what this is about"
    for window, told in ((2047, {"sliding_window": 2047}), (0, {}), (None, {})):
        file = small_gguf.write(tmp_path / "phi.gguf", architecture="phi3", window=window)
        assert convert.check_gguf(file) == told


def test_a_machine_converts_a_file_once_for_all_storages_and_tells_of_it(
    tmp_path: Path, node: Path
) -> None:
    pytest.importorskip("gguf")
    small_gguf.write(tmp_path / "model.gguf")

    def obtained(storage: str) -> Path:
        name, runs = str(tmp_path / "model.gguf"), str(tmp_path / storage)
        return Path(source.obtain(tiny.config(model__name=name, run__storage=runs)).folder)

    with said() as lines:
        folders = [obtained("runs"), obtained("other"), obtained("other")]
        shutil.rmtree(tmp_path / "runs")
        folders.append(obtained("runs"))
    assert len([line for line in lines if "dequantising" in line]) == 1
    assert [folder.parts[-3] for folder in folders] == ["runs", "other", "other", "runs"]
    assert len({source.folder.of_folder(folder, code=False) for folder in folders}) == 1
