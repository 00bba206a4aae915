"""Marks are found in what a test's code names, through helpers and fixtures."""

import subprocess

import pytest

from tests import marks, mlflow_server


def starts_a_process() -> None:
    subprocess.run(["true"], check=True)


def through_a_helper() -> None:
    [starts_a_process() for _ in range(2)]


def through_a_module(server: mlflow_server.Server) -> None:
    mlflow_server.Server.kill(server)


def test_names_come_from_all_that_is_called() -> None:
    assert "subprocess" in marks.names(starts_a_process)
    assert "subprocess" in marks.names(through_a_helper)
    assert "Server" in marks.names(through_a_module)
    assert "killpg" in marks.names(through_a_module)
    assert "subprocess" not in marks.names(marks.names)


@pytest.fixture
def child() -> int:
    return subprocess.run(["true"], check=True).returncode


def test_a_fixture_counts_as_its_test(child: int, request: pytest.FixtureRequest) -> None:
    assert child == 0
    assert request.node.get_closest_marker("process")
    assert not request.node.get_closest_marker("ray")
    assert not request.node.get_closest_marker("mlflow")


def test_without_any_there_is_no_mark(request: pytest.FixtureRequest) -> None:
    assert not {mark.name for mark in request.node.iter_markers()} & set(marks.STARTS)
