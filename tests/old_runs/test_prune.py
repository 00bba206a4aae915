"""`olora-ray prune`, on the storage of the old project: runs, searches, nights, token stores, a real MLflow."""

import os
import time
from pathlib import Path

import pytest

from olora_ray.common import lock, storage
from olora_ray.pipeline import prune
from tests.old_runs.test_old_runs import unpacked
from tests.refused import refused

OLD = time.time() - 40 * 86400


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The storage, in which all is 40 days old; with copies of models."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = unpacked(tmp_path / "project") / "runs"
    for name in ("0123456789abcdef", "merged-0123456789abcdef", "llama-0123456789abcdef"):
        storage.write_text(f"{found}/models/{name}/config.json", "{}")
    storage.write_text(f"{found}/own/config.yaml", "run: {name: own}")  # a user's folder
    for path in found.rglob("*"):
        os.utime(path, (OLD, OLD))
    return found


def left(runs: Path) -> set[str]:
    """The runs and searches, the token stores that are complete, and the copies of models."""
    stores = [file.parent for file in runs.glob("tokens/*/manifest.json")]
    found = [*runs.iterdir(), *stores, *runs.glob("models/*")]
    return {str(path.relative_to(runs)) for path in found if path.is_dir()}


def gone(runs: Path, *arguments: str) -> set[str]:
    before = left(runs)
    prune.main([str(runs), *arguments])
    return before - left(runs)


OF_AUTOMATIC = ("8b66e00570a4d4c32d4f0a0eafd756e6", "fe4db76ac01d4aed12193d9b1bbe7558")
COPIES = {"models/0123456789abcdef", "models/merged-0123456789abcdef"}


def test_what_is_in_use_stays(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gone(runs, "--older", "50d") == set()
    assert gone(runs, "--older=30", "--dry-run") == set()
    planned = capsys.readouterr().out.splitlines()
    # The other three token stores are those of the searches, the nights and the finished run.
    found = {"steady", "automatic", *(f"tokens/{name}" for name in OF_AUTOMATIC), *COPIES}
    assert gone(runs, "--older", "30d") == found
    said = capsys.readouterr().out.splitlines()
    assert said[:-1] == planned[-len(said) : -1]
    assert "finished: stays, because its version is in use" in said
    for night in runs.glob("nightly-*"):
        assert f"{night.name}: stays, because its version is in use" in said
    assert gone(runs, "--older", "30d") == set()


def test_a_run_at_work_and_a_run_that_another_one_names_stay(runs: Path) -> None:
    config = runs / "steady" / "config.yaml"
    start = f"  start: {runs}/automatic/checkpoints/step-0000003"
    config.write_text(config.read_text().replace("  start: null", start))
    os.utime(config, (OLD, OLD))
    with lock.held(f"{runs}/locks/runs/steady.json", "steady"):
        assert gone(runs, "--older", "30d") == set()


def test_a_run_of_another_mlflow_stays(runs: Path) -> None:
    found = gone(runs, "--older", "30d", "--tracking-uri", f"sqlite:///{runs}/other.db")
    assert found == COPIES


def test_a_killed_deletion_is_completed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = storage.remove
    count = []

    def killed(location: str) -> None:
        if "/steady/" in location:
            count.append(location)
            if len(count) == 3:
                raise KeyboardInterrupt
        remove(location)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            gone(runs, "--older", "30d")
    assert "steady" in left(runs)
    assert "steady" in gone(runs, "--older", "30d")


@pytest.mark.parametrize("older", ["", "0d", "a", "-3"])
def test_an_age_is_needed(runs: Path, older: str) -> None:
    with refused("--older 30d"):
        gone(runs, f"--older={older}")
