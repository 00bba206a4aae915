"""What a submitted job is given beside its command."""

import getpass
import importlib.util
from pathlib import Path
from typing import Any

import pytest

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
def test_a_job_runs_in_the_name_of_its_submitter(submitter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.util.spec_from_file_location("submit", SUBMIT)
    submit, jobs = importlib.util.module_from_spec(module), Jobs()
    module.loader.exec_module(submit)
    monkeypatch.delenv("LOGNAME", raising=False)
    here = getpass.getuser()
    if submitter:
        monkeypatch.setenv("LOGNAME", submitter)
    assert submit.begun(jobs, "nightly", "retrain", None) == "nightly"
    monkeypatch.delenv("LOGNAME", raising=False)  # on the cluster
    for name, value in jobs.variables.items():
        monkeypatch.setenv(name, value)
    assert getpass.getuser() == (submitter or here), "what MLflow names as the user of a run"
