"""Moving the champion: there is always one, no move stays half done, no changed file becomes champion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_ray.tracking import aliases as aliases_of
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import LAST, MOVE, SINCE, Aliases, Overtaken
from olora_ray.tracking.checksums import GATE
from olora_ray.tracking.client import connect
from tests import registered
from tests.refused import refused

Add = Callable[[str], tuple[str, str]]


class Killed(BaseException):
    """Stands for a process that dies between two requests to MLflow."""


def made(add: Add, name: str, count: int) -> Aliases:
    """Create a model with this many versions; the last one is challenger."""
    uri = [add(name) for _ in range(count)][-1][0]
    return Aliases(uri, name)


def files_of(aliases: Aliases, number: str) -> Path:
    return Path(aliases.client.get_model_version(aliases.name, number).source)


def test_promote_moves_champion_and_previous(add: Add) -> None:
    aliases = made(add, "moves", 3)
    assert aliases.current() == {"challenger": "3"}
    assert aliases.promote("1", "passed: first") is None
    assert aliases.current() == {"champion": "1", "challenger": "3"}
    assert aliases.promote("3", "passed: better", {"olora.note": "x"}) == "1"
    assert aliases.current() == {"champion": "3", "previous": "1"}
    assert aliases.version("3").tags[GATE] == "passed: better"
    assert aliases.version("3").tags["olora.note"] == "x"
    assert aliases.promote("3", "passed: again") is None
    assert aliases.current() == {"champion": "3", "previous": "1"}


def test_rollback_and_back_again_by_hand(add: Add) -> None:
    aliases = made(add, "rolled", 2)
    aliases.promote("1", "passed")
    with refused("nothing to roll back to"):
        aliases.rollback("bad answers")
    aliases.promote("2", "passed")
    assert aliases.rollback("bad answers") == ("2", "1")
    assert aliases.current() == {"champion": "1"}
    assert aliases.version("2").tags[GATE] == "rolled back: bad answers"
    aliases.promote("2", "promoted by hand")
    assert aliases.current() == {"champion": "2", "previous": "1"}


class Dying(Aliases):
    """Aliases whose process dies before write number `left`; `seen` holds the champions that a reader would see."""

    WRITES = (
        "set_registered_model_tag",
        "set_model_version_tag",
        "delete_model_version_tag",
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "delete_registered_model_tag",
    )

    def __init__(self, aliases: Aliases, left: int) -> None:
        super().__init__(aliases.uri, aliases.name)
        self.left = left
        self.seen: list[str | None] = []

    def end(self) -> None:
        raise Killed

    @property
    def client(self) -> Any:
        return self

    def __getattr__(self, method: str) -> Any:
        real = getattr(connect(self.uri), method)
        if method not in self.WRITES:
            return real

        def write(*arguments: Any) -> Any:
            self.seen.append(
                connect(self.uri).get_registered_model(self.name).aliases.get("champion")
            )
            if self.left == 0:
                self.end()
            self.left -= 1
            return real(*arguments)

        return write


@pytest.mark.parametrize("action", ["promote", pytest.param("rollback", marks=pytest.mark.slow)])
def test_a_crash_between_any_two_writes_is_repaired_by_the_next_call(
    database: Path, action: str
) -> None:
    aliases = registered.model(database, f"crash-{action}", 3)
    real = aliases.client
    before = {"champion": "2", "previous": "1", "challenger": "3"}
    moved = (
        {"champion": "3", "previous": "2"}
        if action == "promote"
        else {"champion": "1", "challenger": "3"}
    )

    def act(by: Aliases) -> None:
        by.promote("3", "passed: 3") if action == "promote" else by.rollback("bad")

    states = []
    for left in range(20):
        for alias, number in before.items():
            real.set_registered_model_alias(aliases.name, alias, number)
        dying = Dying(aliases, left)
        try:
            act(dying)
        except Killed:
            pass
        else:
            break
        assert None not in dying.seen, "a reader saw no champion"
        champion = aliases.current()["champion"]
        aliases.repair()
        states.append(aliases.current())
        assert states[-1]["champion"] == champion, "the alias itself is never moved by a repair"
        if states[-1] == moved and action == "rollback":
            assert aliases.version("2").tags[GATE] == "rolled back: bad"
        act(aliases) if states[-1] == before else None
        assert aliases.current() == moved
        left_over = real.get_registered_model(aliases.name).tags
        assert left_over.pop(SINCE).partition(" ")[0] == moved["champion"]
        assert left_over == {LAST: moved["champion"]}
        assert MOVE not in aliases.version(moved["champion"]).tags
    assert all(state in (before, moved) for state in states), states
    assert before in states
    assert states.count(moved) >= 3, "every write was the last one once"


def large(against: str) -> dict[str, str]:
    """Return the evidence of a verdict: two models with 80 scores each, too much for a tag of a registered model."""
    scores = {f"eval/field/number_{number}": 0.123456789012345 for number in range(80)}
    return {
        "olora.gate_against": against,
        "olora.gate_details": json.dumps({"challenger": scores, "champion": scores}),
    }


def test_a_long_verdict_and_what_it_stands_on_are_kept(database: Path) -> None:
    aliases = registered.model(database, "large", 2)
    why = "passed: " + "; ".join(f'eval/\u00e4"{number} 0.1234' for number in range(400))
    aliases.promote("1", "passed", large(""), instead_of="")
    aliases.promote("2", why, large("1"), instead_of="1")
    aliases.rollback(why)
    assert aliases.version("2").tags["olora.gate_against"] == "1"
    assert len(json.loads(aliases.version("2").tags["olora.gate_details"])["challenger"]) == 80
    assert aliases.version("2").tags[GATE] == f"rolled back: {why}"


def test_a_promotion_that_was_cut_off_counts_as_a_whole_or_not_at_all(database: Path) -> None:
    """An old verdict, against another champion, does not count against the current champion."""
    aliases = registered.model(database, "cut-off-record", 2)
    real, seen = aliases.client, set()
    for left in range(20):
        for tag, text in {**large("7"), GATE: "refused: before"}.items():
            real.set_model_version_tag(aliases.name, "2", tag, text)
        real.set_registered_model_alias(aliases.name, "champion", "1")
        try:
            Dying(aliases, left).promote("2", "passed: now", large("1"), instead_of="1")
        except Killed:
            pass
        else:
            break
        aliases.repair()
        tags = aliases.version("2").tags
        seen.add(
            (
                aliases.current()["champion"],
                tags.get(GATE),
                tags["olora.gate_against"] if GATE in tags else "",
            )
        )
    assert seen == {("1", "refused: before", "7"), ("1", None, ""), ("2", "passed: now", "1")}


def announced(aliases: Aliases, number: str, text: str) -> None:
    """Create an interrupted move to a version, as MLflow has it."""
    aliases.client.set_model_version_tag(aliases.name, number, MOVE, text)


def test_a_move_that_was_cut_off_does_not_undo_a_later_one(database: Path) -> None:
    aliases = registered.model(database, "by-hand", 3)
    aliases.promote("1", "passed")
    announced(aliases, "3", json.dumps({"previous": "2", "verdicts": {"3": "passed: 3"}}))
    aliases.repair()
    assert aliases.current() == {"champion": "1"}
    assert GATE not in aliases.version("3").tags
    aliases.refuse("3", "refused: worse", {"olora.gate_details": "{}"})
    aliases.client.set_registered_model_alias("by-hand", "champion", "3")
    aliases.repair()
    assert aliases.version("3").tags[GATE] == "refused: worse", "the later verdict stands"


@pytest.mark.parametrize("gone", ["champion", "bad"])
def test_a_move_whose_version_has_been_deleted_stops_nobody(database: Path, gone: str) -> None:
    aliases = registered.model(database, f"deleted-{gone}", 4)
    aliases.promote("1", "passed")
    numbers = {"champion": "3", "bad": "2"}
    announced(aliases, "3", json.dumps({"previous": "2", "verdicts": {"2": "rolled back: x"}}))
    aliases.client.set_registered_model_alias(aliases.name, "champion", "3")
    aliases.client.delete_model_version(aliases.name, numbers[gone])
    aliases.promote("4", "passed")
    assert aliases.current()["champion"] == "4"


def test_a_decision_against_another_champion_is_not_carried_out(database: Path) -> None:
    aliases = registered.model(database, "overtaken", 3)
    aliases.promote("1", "passed", instead_of="")
    for instead_of, why in (
        ("2", "was version 2, and is now version 1"),
        ("", "was none, and is now version 1"),
    ):
        with pytest.raises(Overtaken, match=why):
            aliases.promote("3", "passed", instead_of=instead_of)
        with pytest.raises(Overtaken, match=why):
            aliases.refuse("3", "refused", instead_of=instead_of)
    aliases.promote("2", "promoted by hand")
    with pytest.raises(Overtaken, match="version 2 was promoted or rolled back by hand"):
        aliases.refuse("2", "refused", instead_of="1")
    aliases.rollback("bad")
    with pytest.raises(Overtaken, match="version 2 was promoted or rolled back by hand"):
        aliases.promote("2", "passed", instead_of="1")
    assert aliases.current() == {"champion": "1"}


class Passed(Dying):
    """Aliases whose process is passed by a person who promotes version 4, before write number `left`."""

    def end(self) -> None:
        Aliases(self.uri, self.name).promote("4", "promoted by hand")


def test_of_two_movers_the_later_decision_stands(database: Path) -> None:
    aliases = registered.model(database, "passed", 4)
    champions = []
    for left in range(20):
        aliases.client.set_registered_model_alias("passed", "champion", "1")
        passed = Passed(aliases, left)
        overtaken = False
        try:
            passed.promote("3", "passed: 3", {"olora.note": "x"}, instead_of="1")
        except Overtaken:
            overtaken = True
        if passed.left >= 0:
            break
        champion = aliases.current()["champion"]
        assert not overtaken or champion == "4"
        assert MOVE not in aliases.version(champion).tags
        champions.append(champion)
    assert len(champions) > 5
    assert champions.count("3") == 1, "only a person in the request that moves the alias is passed"


def test_a_version_that_has_more_files_than_it_was_registered_with_is_never_promoted(
    database: Path,
) -> None:
    aliases = registered.model(database, "added", 2)
    aliases.promote("1", "passed")
    folder = files_of(aliases, "2")
    for name in ("model/adapter_config.json", "model.safetensors", ".hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        with refused(f"added version 2: {name}"):
            aliases.promote("2", "passed")
        (folder / name).unlink()
    (folder / "link").symlink_to("/tmp")
    with refused("link was added"):
        aliases.promote("2", "passed")
    (folder / "link").unlink()
    (folder / "registered_model_meta").write_text("MLflow's own")
    aliases.promote("2", "passed")


def test_files_that_are_reached_through_mlflow_are_listed_and_checked_like_those_on_a_disk(
    database: Path,
) -> None:
    aliases = registered.model(database, "remote", 1)
    folder, version = files_of(aliases, "1"), aliases.version("1")
    elsewhere = f"file:{folder}"  # this project treats it as an address, not as a folder
    assert checksums.verify(version, elsewhere, aliases.uri) == 1
    (folder / "model" / "inner").mkdir(parents=True)
    (folder / "model" / "inner" / "weights.bin").write_text("")
    with refused("model/inner/weights.bin"):
        checksums.verify(version, elsewhere, aliases.uri)


@pytest.mark.parametrize("spoil", ["content", "missing", "checksums"])
def test_a_version_whose_files_have_changed_is_never_promoted(add: Add, spoil: str) -> None:
    aliases = made(add, f"spoilt-{spoil}", 2)
    aliases.promote("1", "passed")
    folder = files_of(aliases, "2")
    weights, listed = folder / "model" / "model.safetensors", folder / checksums.FILE
    if spoil == "missing":
        weights.unlink()
    else:
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    if spoil == "checksums":  # an attacker may change the list beside the files, too
        listed.unlink()
        listed.write_text(checksums.of_folders({"": folder}))
    expected = {
        "content": "model/model.safetensors was changed",
        "missing": "is missing",
        "checksums": "checksums.json was changed",
    }
    with refused(expected[spoil]):
        aliases.promote("2", "passed")
    assert aliases.current() == {"champion": "1", "challenger": "2"}
    assert GATE not in aliases.version("2").tags


def test_a_rollback_checks_the_files_too(add: Add) -> None:
    aliases = made(add, "rolled-spoilt", 2)
    aliases.promote("1", "passed")
    aliases.promote("2", "passed")
    (files_of(aliases, "1") / "model" / "config.json").write_text("{}")
    with refused("model/config.json was changed"):
        aliases.rollback("bad")
    assert aliases.current() == {"champion": "2", "previous": "1"}


def test_what_is_not_there(add: Add) -> None:
    aliases = made(add, "few", 1)
    with refused("few has no version 7; it has 1"):
        aliases.promote("7", "passed")
    with refused("no model 'nothing' is registered"):
        Aliases(aliases.uri, "nothing").version("1")
    assert Aliases(aliases.uri, "nothing").current() == {}
    with refused("few"):
        aliases_of.registered(aliases.uri, "my_run.yaml")
    client = connect(aliases.uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(files_of(aliases, "1")))
    with refused("has no checksums"):
        Aliases(aliases.uri, "foreign").promote("1", "passed")
