"""What a submitted job is given beside its command."""

import getpass
import importlib.util
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from olora_ray.tracking import start

SUBMIT = Path(__file__).parents[2] / "deploy" / "submit.py"


class Jobs:
    """Ray's client of a cluster without jobs."""

    def __init__(self) -> None:
        self.variables: dict[str, str] = {}

    def get_job_status(self, job: str) -> None:
        raise RuntimeError("404")

    def submit_job(self, *, runtime_env: dict[str, Any], **_: str) -> None:
        self.variables = runtime_env["env_vars"]


@pytest.mark.parametrize("submitter", ["alice", None])
def test_a_job_runs_in_the_name_of_its_submitter(
    submitter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.util.spec_from_file_location("submit", SUBMIT)
    submit, jobs = importlib.util.module_from_spec(module), Jobs()
    module.loader.exec_module(submit)
    monkeypatch.delenv("LOGNAME", raising=False)
    here = getpass.getuser()
    if submitter:
        monkeypatch.setenv("LOGNAME", submitter)
    assert submit.begun(jobs, "nightly", "retrain", None, "word") == "nightly"
    assert "OLORA_COMMIT" not in jobs.variables, "the code of the cluster"
    submit.begun(jobs, "nightly", "retrain", str(SUBMIT.parent), "word")
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", jobs.variables["OLORA_COMMIT"])
    monkeypatch.delenv("LOGNAME", raising=False)  # on the cluster
    for name, value in jobs.variables.items():
        monkeypatch.setenv(name, value)
    assert getpass.getuser() == (submitter or here), "what MLflow names as the user of a run"
    assert start.lineage()[start.SUBMITTER] == f"{submitter or here}@{socket.gethostname()}"
