"""A model that is built without weights has the same buffers as a loaded one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from olora_ray.config.schema import Model
from olora_ray.model import load
from olora_ray.model.load import stored_buffers
from tests import tiny
from tests.families import zoo
from tests.families.variants import ALL

CPU = torch.device("cpu")
FACTOR = {"rope_theta": 10000.0, "factor": 4.0}
SCALED: dict[str, dict[str, Any]] = {
    "linear": FACTOR,
    "dynamic": FACTOR,
    "yarn": {**FACTOR, "original_max_position_embeddings": 64},
    "llama3": {
        **FACTOR,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        **FACTOR,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}
USUAL = [
    "llama",
    "gemma3_text",
    "gemma3",
    "gpt2",
    "phi3",
    "gptj",
    "falcon",
    "deepseek_v3",
    "mamba2",
    "qwen3_next",
    "minimax",
]


def assert_alike(folder: Path, dtype: str) -> None:
    settings = Model(name=str(folder), dtype=dtype)  # type: ignore[arg-type]
    loaded, empty = (make(folder, settings, CPU) for make in (load.load_model, load.empty_model))
    stored = stored_buffers(empty)
    found = dict(empty.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert found[name].dtype == buffer.dtype, name
        assert found[name].is_meta if name in stored else torch.equal(found[name], buffer), name
    assert found.keys() == dict(loaded.named_buffers()).keys()
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    assert all(one.is_meta and not one.requires_grad for one in parameters.values())
    assert {
        name: (one.dtype, one.shape)
        for name, one in loaded.named_parameters(remove_duplicate=False)
    } == {name: (one.dtype, one.shape) for name, one in parameters.items()}
    assert empty.config.to_dict() == loaded.config.to_dict()
    assert not any(module.training for module in empty.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies(tmp_path: Path, kind: str, dtype: str) -> None:
    tiny.llama(rope_parameters={"rope_type": kind, **SCALED[kind]}).save_pretrained(tmp_path)
    assert_alike(tmp_path, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", USUAL)
def test_families(tmp_path: Path, family: str, dtype: str) -> None:
    zoo.build(ALL[family], tmp_path)
    assert_alike(tmp_path, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [name for name in ALL if name not in USUAL])
def test_all_other_families(tmp_path: Path, family: str, dtype: str) -> None:
    zoo.build(ALL[family], tmp_path)
    assert_alike(tmp_path, dtype)


CPU = torch.device("cpu")


def test_free_memory_is_that_of_the_machine_or_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "_GROUP", tmp_path)
    assert 2**20 < load.free(CPU) < 2**50
    for name, text in {
        "max": "5000",
        "current": "4000",
        "stat": "anon 1\ninactive_file 500",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert load.free(CPU) == 1500
    (tmp_path / "memory.max").write_text("max")
    assert load.free(CPU) > 2**20
