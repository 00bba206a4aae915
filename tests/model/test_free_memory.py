"""How much memory is free for a model, and which models are too large for it."""

from pathlib import Path

import pytest
import torch

from olora_ray.model import load

CPU = torch.device("cpu")


def test_free_memory_is_that_of_the_machine_or_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "_GROUP", tmp_path)
    assert 2**20 < load.free(CPU) < 2**50
    for name, text in {"max": "5000", "current": "4000", "stat": "anon 1\ninactive_file 500"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert load.free(CPU) == 1500
    (tmp_path / "memory.max").write_text("max")
    assert load.free(CPU) > 2**20


@pytest.mark.parametrize(
    ("device", "gpu", "node", "where"),
    [
        ("cpu", 0, 100, None),
        ("cpu", 0, 99, "the memory of one cpu"),
        ("cuda", 100, 50, None),
        ("cuda", 99, 999, "the memory of one cuda"),
        ("cuda", 999, 49, "the memory of the node, by which it comes to the cuda"),
    ],
)
def test_a_model_needs_room_where_it_runs_and_on_its_way_there(
    monkeypatch: pytest.MonkeyPatch, device: str, gpu: int, node: int, where: str | None
) -> None:
    """One that is converted to float32 lies in the node's memory before it comes to a GPU."""
    monkeypatch.setattr(load, "free", lambda place: gpu if place.type == "cuda" else node)
    found = load.too_large(10, torch.float32, torch.device(device))  # 40 bytes
    assert found == where if where is None else found and found.endswith(f"too large for {where}")
