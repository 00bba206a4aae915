"""What the layout before left behind stays usable: run folders, checkpoints, tokens, MLflow runs, registered versions.

project.tar.xz was made with the commit before the packages were named as the config's sections (f8f54ed): a tiny
model, its rows, a retraining whose version became the champion, a finished run (`whole`), and the same run cut off
after step 10 of 12 (`cut`). Tokens and checkpoints seal the paths in them, so it must lie where it was made.
"""

import fcntl
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from olora_ray.config.load import load
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking.aliases import Aliases
from olora_ray.train import checkpoints
from tests.pipelines import project
from tests.recovery.processes import kill_all

PLACE = Path("/tmp/olrb")
ENVIRONMENT = {"RAY_TMPDIR": str(PLACE), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def before() -> Iterator[Path]:
    """The project as the old code left it, for one test."""
    with open(f"{PLACE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(PLACE, ignore_errors=True)
        with tarfile.open(Path(__file__).parent / "project.tar.xz") as archive:
            archive.extractall(PLACE, filter="data")
        yield PLACE
        kill_all(PLACE)
        shutil.rmtree(PLACE, ignore_errors=True)


def test_tokens_and_checkpoints_are_read(before: Path) -> None:
    stores = [TokenStore.open(str(folder)) for folder in (before / "runs" / "tokens").glob("[0-9a-f]*")]
    assert sorted(store.manifest.rows for store in stores) == [7, 60]
    assert all(len(store[0].input_ids) for store in stores)
    found = checkpoints.latest_good(str(before / "runs" / "cut" / "checkpoints"))
    assert found is not None
    assert found[1].state.step == 10
    assert load(before / "runs" / "cut" / "config.yaml").run.name == "cut"


def test_a_retraining_finds_its_champion_and_nothing_changed(before: Path) -> None:
    done = project.run_script("retrain.py", before / "nightly.yaml", env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing changed" in done.stdout


def test_a_registered_version_is_verified_and_promoted(before: Path) -> None:
    uri = f"sqlite:///{before}/runs/mlflow.db"
    assert Aliases(uri, "small").current()["champion"] == "1"
    for words in (["show", "small", "1"], ["promote", "small", "1"]):
        done = project.run_script("registry.py", *words, "--tracking-uri", uri)
        assert done.returncode == 0, done.stdout + done.stderr
    assert Aliases(uri, "small").current()["champion"] == "1"


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_was_cut_off_is_resumed_to_the_same_adapter(before: Path) -> None:
    done = project.finetune(before / "cut.yaml", env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training continues after step 10 of 12" in done.stdout
    assert "olora initialisation" not in done.stdout  # factors come from the checkpoint
    ours, theirs = (
        load_file(before / "runs" / name / "export" / "adapter" / "adapter_model.safetensors")
        for name in ("cut", "whole")
    )
    assert ours.keys() == theirs.keys()
    # To the bit on one kind of processor; the archive was made on another machine than this, perhaps.
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5) for name in ours)
    again = project.finetune(before / "whole.yaml", env=ENVIRONMENT)
    assert "is finished already" in again.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["models:/small@champion", "runs/cut/checkpoints/step-0000010"])
def test_a_version_and_a_checkpoint_are_evaluated(before: Path, name: str) -> None:
    place = name if name.startswith("models:") else before / name
    done = project.run_script("evaluate.py", place, "--config", before / "nightly.yaml", env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eval/loss" in done.stdout
