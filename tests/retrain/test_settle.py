"""The end of a retraining on a real MLflow: the decision is against the current champion in every case."""

from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.common.errors import TryAgain
from olora_ray.pipeline.run_folder import Fingerprint
from olora_ray.retrain.gate import Decision
from olora_ray.retrain.recipe import AGAINST, ORIGIN, find_decision, version_to_beat
from olora_ray.retrain.run import apply_decision
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import GATE, Version
from tests import mlflow_database, registered
from tests.refused import refused
from tests.said import said

YES, NO = Decision(True, "better", {}), Decision(False, "worse", {})


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlflow_database.place(tmp_path_factory.mktemp("settle"))


@pytest.fixture
def aliases(storage: Path, request: pytest.FixtureRequest) -> Aliases:
    """Champion 2, previous 1, and the newly trained version 3."""
    found = registered.model(storage, f"m{abs(hash(request.node.name))}", 4)
    found.promote("1", "passed")
    found.promote("2", "passed")
    found.client.set_registered_model_alias(found.name, "challenger", "3")
    return found


def settled(
    aliases: Aliases, decision: Decision, meanwhile: Callable[[], object] = lambda: None
) -> tuple[str, list[str]]:
    """Return the log and the champions that were compared; `meanwhile` runs during the first comparison."""
    against: list[str] = []

    def decide(challenger: Version, champion: Version | None) -> Decision:
        against.append(champion.number if champion else "")
        if len(against) == 1:
            meanwhile()
        return decision

    with said() as lines:
        apply_decision(aliases, "3", decide, lambda: None)
    return "".join(lines), against


def test_a_challenger_that_passes_is_champion_and_one_that_fails_is_not(aliases: Aliases) -> None:
    log, against = settled(aliases, NO)
    assert "refused: worse" in log
    assert "version 3 stays challenger, version 2 the champion" in log
    assert "serve:" not in log
    assert aliases.current() == {"champion": "2", "previous": "1", "challenger": "3"}
    log, _ = settled(aliases, YES)
    assert f"version 3 is the champion of {aliases.name}, version 2 is previous" in log
    assert log.count(f"serve -m models:/{aliases.name}@champion") == 1
    assert (aliases.current(), against) == ({"champion": "3", "previous": "2"}, ["2"])
    assert aliases.version("3").tags[AGAINST] == "2"


@pytest.mark.parametrize("decision", [YES, NO])
def test_a_rollback_meanwhile_stands_and_the_gate_decides_again(
    aliases: Aliases, decision: Decision
) -> None:
    log, against = settled(aliases, decision, lambda: aliases.rollback("bad answers"))
    assert against == ["2", "1"]
    assert "the champion was version 2, and is now version 1: the gate decides again" in log
    assert aliases.version("2").tags[GATE] == "rolled back: bad answers"
    assert aliases.version("3").tags[AGAINST] == "1"
    passed = {"champion": "3", "previous": "1"}
    assert aliases.current() == (
        passed if decision is YES else {"champion": "1", "challenger": "3"}
    )


@pytest.mark.parametrize("decision", [YES, NO])
def test_what_a_person_decides_on_the_version_itself_stands(
    aliases: Aliases, decision: Decision
) -> None:
    log, _ = settled(aliases, decision, lambda: aliases.promote("3", "promoted by hand"))
    assert "version 3 was promoted by hand meanwhile" in log
    assert aliases.current() == {"champion": "3", "previous": "2"}
    assert aliases.version("3").tags[GATE] == "promoted by hand"
    aliases.rollback("after all")
    log, against = settled(aliases, decision)
    assert ("version 3 was rolled back by hand meanwhile" in log, against) == (True, [])
    assert aliases.version("3").tags[GATE] == "rolled back: after all"


def test_the_child_of_a_version_that_was_rolled_back_is_refused_and_another_is_trained(
    aliases: Aliases,
) -> None:
    now = Fingerprint("base", "data", "held", "s")
    for tag, text in {**now.tags(), ORIGIN: "champion, version 2"}.items():
        aliases.client.set_model_version_tag(aliases.name, "3", tag, text)
    log, against = settled(aliases, YES, lambda: aliases.rollback("bad answers"))
    assert against == ["2"]
    assert "refused: it continues version 2, which was rolled back meanwhile" in log
    assert aliases.current() == {"champion": "1", "challenger": "3"}
    found = version_to_beat(aliases)
    assert find_decision(found.versions, found.version, now) is None, (
        "the next call trains from version 1"
    )


def test_a_champion_that_never_rests_ends_it(aliases: Aliases) -> None:
    def decide(_: Version, champion: Version | None) -> Decision:
        aliases.promote("4" if champion.number != "4" else "2", "promoted by hand")
        return YES

    with refused("the champion was moved 5 times while the gate decided", TryAgain):
        apply_decision(aliases, "3", decide, lambda: None)
    assert GATE not in aliases.version("3").tags


def test_one_that_has_lost_its_lock_writes_nothing(aliases: Aliases) -> None:
    def lost() -> None:
        raise TryAgain("taken over")

    with refused("taken over", TryAgain):
        apply_decision(aliases, "3", lambda *_: YES, lost)
    assert aliases.current()["champion"] == "2"
    assert GATE not in aliases.version("3").tags
