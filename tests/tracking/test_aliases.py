"""Moving the champion: never none, never half, never a version whose files have changed."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest_bytes
from olora_ray.tracking import aliases as registry_lock
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import GATE, LAST, MOVING, Aliases, Overtaken
from olora_ray.tracking.client import connect
from tests import registered
from tests.said import said

Add = Callable[[str], tuple[str, str]]


class Killed(BaseException):
    """Stands for a process that ends between two requests to MLflow."""


def made(add: Add, name: str, count: int) -> Aliases:
    """A model with so many versions; the last one is challenger."""
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
    assert aliases.current() == {"champion": "3", "previous": "1"}, "promoting the champion changes nothing"


def test_refuse_leaves_the_challenger_with_the_reason(add: Add) -> None:
    aliases = made(add, "refused", 2)
    aliases.promote("1", "passed")
    aliases.refuse("2", "refused: worse", {"olora.gate_details": "{}"})
    assert aliases.current() == {"champion": "1", "challenger": "2"}
    assert aliases.version("2").tags[GATE] == "refused: worse"


def test_rollback_and_back_again_by_hand(add: Add) -> None:
    aliases = made(add, "rolled", 2)
    aliases.promote("1", "passed")
    with pytest.raises(UserError, match="nothing to roll back to: version 1 is the first champion"):
        aliases.rollback("bad answers")
    aliases.promote("2", "passed")
    assert aliases.rollback("bad answers") == ("2", "1")
    assert aliases.current() == {"champion": "1"}
    assert aliases.version("2").tags[GATE] == "rolled back: bad answers"
    with pytest.raises(UserError, match="nothing to roll back to"):
        aliases.rollback("again")
    aliases.promote("2", "promoted by hand")
    assert aliases.current() == {"champion": "2", "previous": "1"}


class Dying:
    """MLflow's client, which dies before its write number `left`; what a reader would see is kept in `seen`."""

    WRITES = (
        "set_registered_model_tag",
        "set_model_version_tag",
        "delete_model_version_tag",
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "delete_registered_model_tag",
    )

    def __init__(self, client: Any, name: str, left: int) -> None:
        self.client, self.name, self.left = client, name, left
        self.seen: list[str | None] = []

    def __getattr__(self, method: str) -> Any:
        real = getattr(self.client, method)
        if method not in self.WRITES:
            return real

        def write(*arguments: Any) -> Any:
            self.seen.append(self.client.get_registered_model(self.name).aliases.get("champion"))
            if self.left == 0:
                raise Killed
            self.left -= 1
            return real(*arguments)

        return write


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of somebody who has died is waited for by a clock that runs with the looks at it."""
    clock = itertools.count()
    monkeypatch.setattr(registry_lock, "now", lambda: float(next(clock)))
    monkeypatch.setattr(registry_lock, "pause", lambda: None)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_crash_between_any_two_writes_is_repaired_by_the_next_call(
    database: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"crash-{action}"
    aliases = registered.model(database, name, 3)
    real = connect(aliases.uri)
    before = {"champion": "2", "previous": "1", "challenger": "3"}
    moved = {"champion": "3", "previous": "2"} if action == "promote" else {"champion": "1", "challenger": "3"}
    states = []
    for left in range(20):
        for alias, number in before.items():
            real.set_registered_model_alias(name, alias, number)
        dying = Dying(real, name, left)
        act = (lambda: aliases.promote("3", "passed: 3")) if action == "promote" else (lambda: aliases.rollback("bad"))
        with monkeypatch.context() as patch:
            patch.setattr(Aliases, "client", property(lambda _, dying=dying: dying))
            try:
                act()
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
        act() if states[-1] == before else None
        assert aliases.current() == moved
        with registry_lock.held(real, name):
            pass
        left_over = real.get_registered_model(name).tags
        assert left_over == {LAST: moved["champion"]}, "nothing is left of the lock and of the announcement"
    assert all(state in (before, moved) for state in states), states
    assert before in states
    assert states.count(moved) >= 3, "every write was the last one once"


def large(against: str) -> dict[str, str]:
    """What a verdict stands on: two models with 80 scores each, more than a registered model's tag can have."""
    scores = {f"eval/field/number_{number}": 0.123456789012345 for number in range(80)}
    tags = {"olora.gate_against": against, "olora.gate_details": json.dumps({"challenger": scores, "champion": scores})}
    return checksums.folded(tags)


def test_what_is_announced_of_a_move_has_room_in_a_tag(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aliases = registered.model(database, "large", 2)
    client, written = aliases.client, list[str]()
    monkeypatch.setattr(Aliases, "client", property(lambda _: client))
    real = client.set_registered_model_tag

    def write(name: str, key: str, value: str) -> None:
        written.append(value)
        real(name, key, value)

    monkeypatch.setattr(client, "set_registered_model_tag", write)
    why = "passed: " + "; ".join(f'eval/\u00e4"{number} 0.1234' for number in range(400))
    aliases.promote("1", "passed", large(""), instead_of="")
    aliases.promote("2", why, large("1"), instead_of="1")
    aliases.rollback(why)
    assert sum("champion" in text for text in written) == 3
    assert max(map(len, written)) <= 5000
    assert aliases.version("2").tags["olora.gate_against"] == "1"
    assert len(json.loads(aliases.version("2").tags["olora.gate_details"])["challenger"]) == 80
    assert aliases.version("2").tags[GATE] == f"rolled back: {why}"


@pytest.mark.usefixtures("patient")
def test_a_promotion_that_was_cut_off_counts_as_a_whole_or_not_at_all(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict of before, against another champion, does not become one against the champion of now."""
    aliases = registered.model(database, "cut-off-record", 2)
    real, seen = connect(aliases.uri), set()
    for left in range(20):
        for tag, text in {**large("7"), GATE: "refused: before"}.items():
            real.set_model_version_tag(aliases.name, "2", tag, text)
        real.set_registered_model_alias(aliases.name, "champion", "1")
        dying = Dying(real, aliases.name, left)
        with monkeypatch.context() as patch:
            patch.setattr(Aliases, "client", property(lambda _, dying=dying: dying))
            try:
                aliases.promote("2", "passed: now", large("1"), instead_of="1")
            except Killed:
                pass
            else:
                break
        aliases.repair()
        with registry_lock.held(real, aliases.name):
            pass  # the dead one's tag is removed
        tags = aliases.version("2").tags
        seen.add((aliases.current()["champion"], tags.get(GATE), tags["olora.gate_against"] if GATE in tags else ""))
    assert seen == {("1", "refused: before", "7"), ("1", None, ""), ("2", "passed: now", "1")}


def announced(aliases: Aliases, text: str) -> None:
    """A move that was cut off, as MLflow has it."""
    aliases.client.set_registered_model_tag(aliases.name, MOVING, text)


def test_an_old_announcement_does_not_undo_a_later_move_by_hand(database: Path) -> None:
    aliases = registered.model(database, "by-hand", 3)
    aliases.promote("1", "passed")
    for was in ({}, {"was": {"champion": "2"}}):
        announced(aliases, json.dumps({"champion": "3", "previous": "2", "tags": {"3": {GATE: "passed"}}, **was}))
        with said() as lines:
            aliases.repair()
        assert aliases.current() == {"champion": "1"}
        assert "it is dropped, the champion is version 1" in "".join(lines)
        assert GATE not in aliases.version("3").tags
        assert aliases.repair() is None
    announced(aliases, json.dumps({"champion": "1", "previous": None, "tags": {}, "was": {}}))
    aliases.client.set_registered_model_alias("by-hand", "previous", "2")
    assert aliases.repair() is not None
    assert aliases.current()["previous"] == "2", "what was set by hand since is left alone"


@pytest.mark.parametrize("gone", ["champion", "previous", "bad"])
def test_a_move_whose_version_has_been_deleted_stops_nobody(database: Path, gone: str) -> None:
    aliases = registered.model(database, f"deleted-{gone}", 4)
    aliases.promote("1", "passed")
    numbers = {"champion": "3", "previous": "2", "bad": "2"}
    move = {"champion": "3", "previous": "2", "tags": {"2": {GATE: "rolled back: x"}}, "was": {"champion": "2"}}
    if gone != "champion":
        aliases.client.set_registered_model_alias(aliases.name, "champion", "3")
    aliases.client.delete_model_version(aliases.name, numbers[gone])
    announced(aliases, json.dumps(move))
    aliases.promote("4", "passed")
    assert aliases.current()["champion"] == "4"
    assert aliases.repair() is None


def test_an_announcement_that_cannot_be_read_is_removed(database: Path) -> None:
    aliases = registered.model(database, "unreadable", 1)
    for text in ["{", "null", "[]", "7", '{"champion": 3}', '{"champion": "3", "tags": {"3": []}}', ""]:
        announced(aliases, text)
        with said() as lines:
            aliases.promote("1", "passed")
        assert "the tag olora.moving is not one of this project" in "".join(lines), text
        assert aliases.current() == {"champion": "1"}
        assert MOVING not in aliases.client.get_registered_model("unreadable").tags


def test_a_decision_against_another_champion_is_not_carried_out(database: Path) -> None:
    aliases = registered.model(database, "overtaken", 3)
    aliases.promote("1", "passed", instead_of="")
    for instead_of, why in (("2", "was version 2, and is version 1"), ("", "was none, and is version 1")):
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


def test_a_version_that_has_more_files_than_it_was_registered_with_is_never_promoted(database: Path) -> None:
    aliases = registered.model(database, "added", 2)
    aliases.promote("1", "passed")
    folder = files_of(aliases, "2")
    for name in ("model/adapter_config.json", "adapter_config.json", "model.safetensors", ".hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match=f"added version 2: {name} was added since it was registered"):
            aliases.promote("2", "passed")
        (folder / name).unlink()
    (folder / "link").symlink_to("/tmp")
    with pytest.raises(UserError, match="link was added"):
        aliases.promote("2", "passed")
    (folder / "link").unlink()
    (folder / "registered_model_meta").write_text("MLflow's own")
    aliases.promote("2", "passed")


FOREIGN = [
    b"\xff\xfe",
    b"[]",
    b"7",
    b'{"files": []}',
    b'{"files": {"a": 7}}',
    b'{"files": {"../a": {}}}',
    b"[" * 99_999,
]


def test_checksums_that_are_none_are_one_line(database: Path) -> None:
    aliases = registered.model(database, "no-list", 1)
    for content in FOREIGN:
        (files_of(aliases, "1") / checksums.FILE).write_bytes(content)
        aliases.client.set_model_version_tag("no-list", "1", checksums.TAG, digest_bytes(content))
        with pytest.raises(UserError, match=r"^no-list version 1: checksums\.json is no list of files"):
            aliases.verify("1")


def test_files_that_are_reached_through_mlflow_are_listed_and_checked_like_those_on_a_disk(database: Path) -> None:
    aliases = registered.model(database, "remote", 1)
    folder, version = files_of(aliases, "1"), aliases.version("1")
    elsewhere = f"file:{folder}"  # an address to this project, which does not take it for a folder
    assert checksums.verify(version, elsewhere, aliases.uri) == 1
    (folder / "model" / "inner").mkdir(parents=True)
    (folder / "model" / "inner" / "weights.bin").write_text("")
    with pytest.raises(UserError, match=r"remote version 1: model/inner/weights\.bin was added"):
        checksums.verify(version, elsewhere, aliases.uri)


def test_the_copy_of_a_version_is_checked(database: Path, tmp_path: Path) -> None:
    aliases = registered.model(database, "copied", 1)
    aliases.verify_copy("1", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="copied version 1"):
        aliases.verify_copy("1", tmp_path)


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
    if spoil == "checksums":  # whoever changes the files may change the list beside them
        listed.unlink()
        listed.write_text(checksums.of_folders({"": folder}))
    expected = {
        "content": "model/model.safetensors has other content",
        "missing": "is missing",
        "checksums": "json is not that",
    }
    with pytest.raises(UserError, match=expected[spoil]):
        aliases.promote("2", "passed")
    assert aliases.current() == {"champion": "1", "challenger": "2"}
    assert GATE not in aliases.version("2").tags


def test_a_rollback_checks_the_files_too(add: Add) -> None:
    aliases = made(add, "rolled-spoilt", 2)
    aliases.promote("1", "passed")
    aliases.promote("2", "passed")
    (files_of(aliases, "1") / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model/config\.json has other content"):
        aliases.rollback("bad")
    assert aliases.current() == {"champion": "2", "previous": "1"}


def test_all_files_are_listed(add: Add) -> None:
    aliases = made(add, "listed", 1)
    folder = files_of(aliases, "1")
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert set(json.loads((folder / checksums.FILE).read_text())["files"]) == there - {checksums.FILE}
    assert aliases.verify("1") == len(there) - 1


def test_what_is_not_there(add: Add) -> None:
    aliases = made(add, "few", 1)
    with pytest.raises(UserError, match="few has no version 7; it has 1"):
        aliases.promote("7", "passed")
    with pytest.raises(UserError, match="no model 'nothing' is registered"):
        Aliases(aliases.uri, "nothing").version("1")
    assert Aliases(aliases.uri, "nothing").current() == {}
    client = connect(aliases.uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(files_of(aliases, "1")))
    with pytest.raises(UserError, match="has no checksums"):
        Aliases(aliases.uri, "foreign").promote("1", "passed")
