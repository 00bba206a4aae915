"""A checkpoint is read back bit for bit, or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from tests import tiny
from tests.refused import refused

RANK = 2
FILES = (
    "adapter.safetensors",
    "best.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.yaml",
    "manifest.json",
)


def random_adapter(with_b0: bool = True, seed: int = 0) -> dict[str, AdapterWeights]:
    torch.manual_seed(seed)
    # Values that a text format or a cast would change.
    odd = torch.tensor([[1e-40, -0.0, 3.4e38, 1 / 3, torch.inf], [2**-149, 1.0, -1e-30, 7.0, 0.1]])
    return {
        f"model.layers.{i}.q_proj": AdapterWeights(
            Factors(torch.randn(RANK, 5), torch.randn(4, RANK) if with_b0 else None),
            odd * (i + 1),
            torch.randn(4, RANK),
        )
        for i in range(2)
    }


def changes(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        f"{name}.{part}": torch.randn(shape)
        for name in random_adapter()
        for part, shape in (("da", (RANK, 5)), ("db", (4, RANK)))
    }


def state() -> TrainState:
    found = TrainState(step=7, best_loss=0.1 + 0.2, best_step=5, stale=1, before=[[1, 2], []])
    found.record(7, {"train/loss": 1 / 3, "train/lr": 1e-4})
    return found


def save(folder: Path, **other: Any) -> None:
    parts: dict[str, Any] = {
        "adapter": random_adapter(),
        "best": changes(1),
        "optimizer": changes(2),
        "state": state(),
        "identity": {"base": "abc", "train data": "déf"},
        "config_yaml": "run: {name: ä}\n",
    }
    checkpoint.save(folder, **(parts | other))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step-7"
    save(folder)
    return folder


def same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return (
        one.dtype == two.dtype
        and one.shape == two.shape
        and one.numpy().tobytes() == two.numpy().tobytes()
    )


def assert_same_adapter(
    found: dict[str, AdapterWeights], expected: dict[str, AdapterWeights]
) -> None:
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert same(found[name].factors.a0, weights.factors.a0)
        assert same(found[name].factors.b0, weights.factors.b0)
        assert same(found[name].da, weights.da)
        assert same(found[name].db, weights.db)


@pytest.mark.parametrize("with_b0", [True, False], ids=["olora", "lora"])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, with_b0: bool) -> None:
    save(tmp_path / "c", adapter=random_adapter(with_b0))
    found = checkpoint.load(tmp_path / "c")
    assert_same_adapter(found.adapter, random_adapter(with_b0))
    for part, expected in ((found.best, changes(1)), (found.optimizer, changes(2))):
        assert part.keys() == expected.keys()
        assert all(same(part[name], value) for name, value in expected.items())
    assert found.state == state()
    assert found.identity == {"base": "abc", "train data": "déf"}


def test_a_state_that_is_new_or_has_infinite_metrics_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "new", state=TrainState(), best=None)
    assert checkpoint.load(tmp_path / "new").state == TrainState()
    assert checkpoint.load(tmp_path / "new").best is None
    diverged = TrainState()
    diverged.record(1, {"eval/loss": float("inf")})
    save(tmp_path / "inf", state=diverged)
    assert checkpoint.load(tmp_path / "inf").state == diverged


def test_the_same_state_is_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "c")
    for name in FILES:
        assert (tmp_path / "c" / name).read_bytes() == (saved / name).read_bytes()


def test_a_checkpoint_has_these_files_for_all_to_read_and_no_pickle(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)
    assert {file.stat().st_mode & 0o777 for file in saved.iterdir()} == {0o644}
    assert set(json.loads((saved / "manifest.json").read_text())["files"]) == set(FILES) - {
        "manifest.json"
    }


def damaged(saved: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(saved, copy))


def resealed(folder: Path, name: str, content: bytes) -> None:
    """Change a file, and its entry in the manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = storage.size_and_digest(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "\xff",
        '{"format": 1, "identity": null}',
        '{"format": 1, "identity": {}, "step": "many"}',
    ],
)
def test_a_state_that_is_none_is_an_error(saved: Path, tmp_path: Path, text: str) -> None:
    folder = damaged(saved, tmp_path)
    resealed(folder, "state.json", text.encode("latin-1"))
    with pytest.raises(UserError, match=r"^checkpoint .*: cannot be loaded: ") as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "more.json"])
def test_a_manifest_names_files_of_a_checkpoint_only(
    saved: Path, tmp_path: Path, name: str
) -> None:
    folder = damaged(saved, tmp_path)
    (folder / "more.json").write_text("{}")
    (tmp_path / "other").write_text("{}")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = storage.size_and_digest(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refused("manifest.json: does not fit this folder"):
        checkpoint.load(folder)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.floats(0.0, 1.0, exclude_max=True), st.integers(1, 255))
def test_a_changed_byte_is_an_error_never_another_result(
    saved: Path, tmp_path: Path, name: str, place: float, flip: int
) -> None:
    folder = damaged(saved, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= flip
    (folder / name).write_bytes(bytes(content))
    try:
        found = checkpoint.load(folder)
    except UserError:
        return
    assert name == "manifest.json"  # where a blank may change into another
    assert_same_adapter(found.adapter, random_adapter())


def test_a_best_adapter_that_the_manifest_does_not_know_is_refused(
    saved: Path, tmp_path: Path
) -> None:
    save(tmp_path / "c", best=None)
    shutil.copy(saved / "best.safetensors", tmp_path / "c")
    with refused("manifest.json"):
        checkpoint.load(tmp_path / "c")


def test_another_format_is_refused(saved: Path, tmp_path: Path) -> None:
    manifest = damaged(saved, tmp_path) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with refused("another version"):
        checkpoint.load(manifest.parent)


NOW = {
    "base model": "b1",
    "tokenizer": "t1",
    "training data": "d1",
    "adapter": '{"rank": 4, "alpha": 8.0}',
    "optimizer": "adamw",
}


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ({"base model": "b0"}, "another base model (was b0, is now b1)"),
        ({"base model": "b1+files"}, "another base model (same weights, but its config.json"),
        ({"training data": "d0"}, "another training data (was d0, is now d1)"),
        ({"tokenizer": "t0", "training data": "d0"}, "another tokenizer (was t0, is now t1);"),
        ({"adapter": '{"rank": 2, "alpha": 8.0}'}, "another adapter (rank was 2, is now 4)"),
        ({"optimizer": "spectral"}, "another optimizer (was spectral, is now adamw)"),
    ],
)
def test_another_identity_is_refused_with_the_difference(
    then: dict[str, str], expected: str
) -> None:
    checkpoint.require_same(NOW, NOW, "step-0000002")
    checkpoint.require_same(
        {name: part for name, part in NOW.items() if name != "optimizer"},
        NOW,
        "of an older version",
    )
    with refused(f"run.name: step-0000002 was trained with {expected}"):
        checkpoint.require_same(NOW | then, NOW, "step-0000002")


def test_a_snapshot_is_of_its_moment_however_late_it_is_written(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.decided())
    flat = trainer.flat
    flat.vector.normal_()
    trainer.optimizer.state()[f"{next(iter(trainer.adapted))}.da.exp_avg"].fill_(0.25)
    state, best, vector = (
        TrainState(step=2, best_step=1, best_loss=1.0),
        flat.vector + 1,
        flat.vector.clone(),
    )
    write = trainer.snapshot(state, best, {"base": "abc"}, "run: {}\n")
    flat.vector.zero_()
    for part in trainer.optimizer.state().values():
        part.zero_()
    state.record(3, {"train/loss": 1.0})
    write(tmp_path / "c")
    found = checkpoint.load(tmp_path / "c")
    assert found.state == TrainState(step=2, best_step=1, best_loss=1.0)
    for kept, expected in (
        (found.adapter, flat.named(vector)),
        (found.best_adapter(), flat.named(best)),
    ):
        for name, weights in kept.items():
            assert same(weights.da, expected[f"{name}.da"])
            assert same(weights.db, expected[f"{name}.db"])
    assert max(part.max().item() for part in found.optimizer.values()) == 0.25
