"""Workers that die, hang, come and leave while the others train on: the same bytes as a run nobody touched."""

import os
import signal
from pathlib import Path

import pytest

from olora_ray.train import checkpoints
from tests import tiny
from tests.cluster.gathering import Fault, Outcome, Workers, workers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def untouched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with workers(tmp_path_factory.mktemp("alone"), model, 1) as found:
        found.start()
        (outcome,) = found.wait(0)
        assert found.told() == []
    return outcome


@pytest.mark.parametrize(
    ("point", "step"), [("step", 1), ("step", 4), ("evaluate", 4), ("checkpoint", 3), ("step", 8), ("evaluate", 8)]
)
def test_the_others_train_on_when_the_first_dies(
    point: str, step: int, model: Path, untouched: Outcome, tmp_path: Path
) -> None:
    with workers(tmp_path, model, 3) as found:
        found.start(Fault(point, step, "kill"))
        found.start()
        found.start()
        outcomes = found.wait(1, 2)
        assert outcomes == [untouched, untouched]
        assert [line.partition(" after ")[0] for line in found.told()] == ["worker 0 died: 2"]
        assert found.processes[0].exitcode == -signal.SIGKILL
    newest = checkpoints.latest_good(str(tmp_path / "checkpoints"))
    assert newest is not None
    assert newest[1].state.step == 8  # whoever was to write it


def test_all_but_one_die_one_after_the_other(model: Path, untouched: Outcome, tmp_path: Path) -> None:
    with workers(tmp_path, model, 3) as found:
        found.start()
        found.start(Fault("step", 2, "kill"))
        found.start(Fault("step", 5, "kill"))
        assert found.wait(0) == [untouched]
        assert found.told() == ["worker 1 died: 2 after 2", "worker 2 died: 1 after 5"]


def test_a_worker_that_joins_takes_part(model: Path, untouched: Outcome, tmp_path: Path) -> None:
    with workers(tmp_path, model, 2) as found:
        found.start(Fault("step", 3, "wait"))
        found.start(Fault("step", 6, "wait"))
        found.wait_for((tmp_path / "wait-step-3").exists)
        found.place.do("want", 1)
        found.start()
        found.wait_for(lambda: found.place.membership.waiting)
        (tmp_path / "go").touch()
        assert found.wait(0, 1, 2) == [untouched] * 3
        (line,) = found.told()
        assert line.startswith("1 worker joined: 3 after ")
        assert "step 8" in reached(found, 2)


def test_one_that_is_not_wanted_waits_until_another_is_gone(model: Path, untouched: Outcome, tmp_path: Path) -> None:
    with workers(tmp_path, model, 2) as found:
        found.start(Fault("step", 3, "wait"))
        found.start(Fault("step", 5, "kill"))
        found.wait_for((tmp_path / "wait-step-3").exists)
        found.start()
        found.wait_for(lambda: found.place.membership.waiting)
        (tmp_path / "go").touch()
        assert found.wait(0, 2) == [untouched] * 2
        assert found.told() == ["worker 1 died and 1 worker joined: 2 after 5"]


def test_a_worker_that_hangs_is_given_up_and_comes_back(model: Path, untouched: Outcome, tmp_path: Path) -> None:
    with workers(tmp_path, model, 3) as found:
        found.start()
        found.start(Fault("step", 6, "wait"))
        found.start(Fault("step", 2, "stop"))
        found.wait_for((tmp_path / "stop-step-2").exists)
        found.wait_for((tmp_path / "wait-step-6").exists)
        assert found.told() == ["worker 2 gave no sign of life for 20 s: 2 after 2"]
        os.kill(found.processes[2].pid, signal.SIGCONT)
        found.wait_for(lambda: found.place.membership.waiting)
        (tmp_path / "go").touch()
        assert found.wait(0, 1, 2) == [untouched] * 3
        assert len(found.told()) == 2


def test_one_dies_while_another_hangs(model: Path, untouched: Outcome, tmp_path: Path) -> None:
    with workers(tmp_path, model, 3) as found:
        found.start()
        found.start(Fault("step", 2, "kill"))
        found.start(Fault("step", 2, "stop"))  # the first waits for this one in their exchange
        assert found.wait(0) == [untouched]
        assert found.told() == ["worker 1 died and worker 2 gave no sign of life for 20 s: 1 after 2"]


def test_a_worker_that_fails_leaves_the_others(model: Path, untouched: Outcome, tmp_path: Path) -> None:
    with workers(tmp_path, model, 2) as found:
        found.start()
        found.start(Fault("step", 4, "raise"))
        assert found.wait(0) == [untouched]
        assert found.told() == ["worker 1 failed: 1 after 4"]


def test_workers_leave_a_node_with_notice(model: Path, untouched: Outcome, tmp_path: Path) -> None:
    with workers(tmp_path, model, 2) as found:
        found.start(Fault("step", 3, "wait"), node="staying")
        found.start(node="leaving")
        found.wait_for((tmp_path / "wait-step-3").exists)
        assert found.place.do("drain_nodes", {"leaving"})
        assert not found.place.do("drain_nodes", {"leaving", "staying"})
        assert found.place.do("drain_nodes", {"leaving"})
        found.wait_for(lambda: found.place.asked_to_leave >= 2)  # or the few steps are over before it has heard
        (tmp_path / "go").touch()
        left, stayed = found.wait(1, 0)
        assert stayed == untouched
        assert left.interrupted == "left"
        (line,) = found.told()
        assert line.startswith("worker 1 left: 1 after ")


def reached(found: Workers, rank: int) -> str:
    return (found.folder / f"reached-{found.processes[rank].pid}").read_text()
