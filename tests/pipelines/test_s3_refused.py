"""What is wrong with an object store is one line of the command, before a model is loaded or Ray started."""

from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from pipelines import finetune, retrain
from tests.pipelines import project
from tests.s3_server import dead_port


def refused(command: Any, folder: Path, place: str) -> UserError:
    tree: dict[str, Any] = project.settings(
        folder,
        folder / "model-that-is-not-there",
        run__storage=place,
        tracking={"uri": f"sqlite:///{folder}/mlflow.db"},
    )
    with pytest.raises(UserError) as caught:
        command.main([str(project.write_config(folder, tree))])
    return caught.value


@pytest.fixture
def dead(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of a server that does not answer."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{dead_port()}")
    return bucket


def test_a_dead_server(dead: str, corpus: Path) -> None:
    error = refused(finetune, corpus, dead)
    assert error.exit_code == 75
    assert str(error).startswith(f"run.storage: {dead}: the object store at http://127.0.0.1:")


def test_a_retraining_meets_the_store_at_its_lock(dead: str, corpus: Path) -> None:
    error = refused(retrain, corpus, dead)
    assert error.exit_code == 75
    assert "cannot be written: Could not connect" in str(error)
