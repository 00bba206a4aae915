"""The shortest walk outside: MLflow and S3 by name, behind a proxy with TLS of a private CA, with users."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.outside import world
from tests.outside.world import ROOT, Machine, World
from tests.pipelines import project

# In make test: tests/tracking/test_artifacts.py and tests/common/test_storage_s3.py.
pytestmark = [pytest.mark.ray, pytest.mark.slow]
WORK = Path("/mnt/project")
RUN = f"cd {ROOT} && python pipelines/finetune.py {WORK}/config.yaml"


@pytest.fixture(scope="module")
def outside() -> Iterator[World]:
    if why := world.missing():
        pytest.skip(why)
    with world.world("laptop") as found:
        folder = found.shared / "project"
        folder.mkdir()
        project.make_tiny(folder)
        project.write_config(folder, project.settings(WORK, WORK / "model"))
        yield found


@pytest.fixture
def laptop(outside: World) -> Machine:
    return outside.machines["laptop"]


def refused(laptop: Machine, *fields: str, **variables: str) -> str:
    """The line with which a run is refused before it trains."""
    done = laptop.run(" ".join([RUN, *fields]), **variables)
    assert done.returncode == 2, done.stdout
    assert "training:" not in done.stdout
    *_, line = done.stdout.splitlines()
    assert line.startswith("error: "), done.stdout
    return line


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in variables.items() if name not in names}


def test_what_is_wrong_with_the_servers_is_told_before_the_training(
    outside: World, laptop: Machine
) -> None:
    untrusted = "its certificate is not trusted here: set SSL_CERT_FILE, on all nodes, to a file"
    no_ca = without(outside.tls, "SSL_CERT_FILE")
    assert f"tracking.uri=https://mlflow.internal: {untrusted}" in refused(laptop, **no_ca)
    at_s3 = refused(
        laptop, "run.storage=s3://corpus/runs", "tracking.uri=http://mlflow.internal:5000", **no_ca
    )
    assert (
        f"run.storage: s3://corpus/runs cannot be written: https://s3.internal: {untrusted}"
        in at_s3
    )
    wrong = refused(laptop, **{**outside.tls, "MLFLOW_TRACKING_PASSWORD": "wrong"})
    assert "the server refuses access; set MLFLOW_TRACKING_USERNAME and _PASSWORD" in wrong
    outside.stop_server("nginx")
    outside.nginx(limit="1m")
    try:
        limited = refused(laptop, **outside.tls)
    finally:
        outside.stop_server("nginx")
        outside.nginx()
    assert "MLflow's artifact store: mlflow-artifacts:/" in limited
    assert "(HTTP 413); raise its limit to the size of the largest model file" in limited


def test_a_run_registers_its_model_on_servers_with_names_and_certificates(
    outside: World, laptop: Machine
) -> None:
    done = laptop.ok(f"{RUN} run.storage=s3://corpus/runs", **outside.tls)
    assert "registered:           small version 1 (models:/small@candidate)" in done
    shown = laptop.ok(
        f"cd {ROOT} && python pipelines/registry.py show small candidate", **outside.tls
    )
    assert "files have their checksums" in shown
    assert outside.password not in done + shown
