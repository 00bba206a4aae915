"""`pipelines/registry.py`, as a user runs it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.retrain import decision_run
from olora_ray.tracking import old_versions
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import AGAINST, BASE, GATE, HELD_OUT
from olora_ray.tracking.old_versions import GUARD
from pipelines import registry
from tests.refused import refused

ROOT = Path(__file__).parents[2]
Add = Callable[[str], tuple[str, str]]


def run(*words: str) -> None:
    registry.main(list(words))


def test_from_list_to_rollback(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    (uri, _), _ = add("by-hand"), add("by-hand")
    at = ("--tracking-uri", uri)
    run("promote", "by-hand", "1", *at)
    run("promote", "by-hand", "01", *at)
    assert Aliases(uri, "by-hand").current() == {"challenger": "2", "champion": "1"}
    run("promote", "by-hand", "challenger", *at)
    assert "version 2 is the champion, version 1 is previous" in capsys.readouterr().out
    run("list", "by-hand", f"--tracking-uri={uri}")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["version", "aliases"]
    assert [line[:3] for line in lines[1:]] == [
        ["2", "champion", "1.5000"],
        ["1", "previous", "1.5000"],
    ]
    assert all("01234567" in line for line in lines[1:])
    run("rollback", "by-hand", *at)
    assert "version 1 is the champion again, version 2 is tagged" in capsys.readouterr().out
    run("show", "by-hand", "2", *at)
    shown = capsys.readouterr().out
    assert "olora.gate = rolled back: by hand" in shown
    assert "model/model.safetensors" in shown
    assert "files have their checksums" in shown
    assert Aliases(uri, "by-hand").current() == {"champion": "1"}


def many(add: Add, name: str) -> Aliases:
    """Five judged versions: 1 is previous, 2 the champion, 3 the best on its guard, 5 the challenger."""
    for _ in range(5):
        uri, _ = add(name)
    aliases = Aliases(uri, name)
    for number in "12345":
        tags = {GATE: "refused: no", AGAINST: "1", HELD_OUT: "rows"}
        for tag, text in tags.items():
            aliases.tag_version(number, tag, text)
    aliases.promote("1", "by hand")
    aliases.promote("2", "by hand")
    aliases.tag_version("2", GUARD, "3")
    return aliases


def numbers(aliases: Aliases) -> str:
    return "".join(version.number for version in aliases.versions())


def test_a_pruned_version_goes_with_its_files(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    aliases = many(add, "many")
    at = ("many", "--keep", "1", "--tracking-uri", aliases.uri)
    places = {number: Path(aliases.files_uri(number)) for number in "12345"}
    size = old_versions.size(aliases, aliases.version("4"))
    assert size > 1000
    for flags in (["--dry-run"], []):
        assert numbers(aliases) == "12345"
        run("prune", *at, *flags)
        said = capsys.readouterr().out
        assert f"version 4: {size:,} bytes\nmany: {size:,} bytes" in said
    assert numbers(aliases) == "1235"
    assert "".join(number for number, place in places.items() if place.exists()) == "1235"
    # The gate and `nights` still count on which rows it was judged.
    assert decision_run.nights(aliases).uses == 5


def test_a_killed_deletion_is_completed(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    aliases = many(add, "killed")
    at = ("killed", "--tracking-uri", aliases.uri)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(aliases.client), "delete_model_version", killed)
        with pytest.raises(KeyboardInterrupt):
            run("prune", *at, "--keep", "1")
    with refused("killed version 4: checksums.json is missing"):
        aliases.promote("4", "by hand")
    run("prune", *at, "--keep", "9")
    assert numbers(aliases) == "1235"


@pytest.mark.parametrize("by", ["its base", "a copy"])
def test_a_version_from_which_another_is_made_stays(add: Add, by: str) -> None:
    aliases = many(add, f"used by {by}")
    if by == "a copy":
        aliases.client.copy_model_version(f"models:/{aliases.name}/4", "other")
    else:
        add("adapter")
        other = Aliases(aliases.uri, "adapter")
        other.tag_version("1", BASE, f"models:/{aliases.name}/4")
    run("prune", aliases.name, "--keep", "1", "--tracking-uri", aliases.uri)
    assert numbers(aliases) == "12345"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["promot", "m", "1"], "expected one of list, show, promote, rollback"),
        (["promote", "m"], "promote NAME VERSION"),
        (["promote", "m", "1", "--dry-run"], "--keep"),
        (["prune", "known"], "--keep"),
        (["prune", "known", "--keep", "0"], "--keep"),
        (["promote", "known", "nobody"], "has no alias 'nobody'; it has challenger"),
        (["show", "known", "9"], "known has no version 9; it has 1"),
        (["list", "' OR name != '"], "with a version"),
    ],
)
def test_mistakes(add: Add, words: list[str], message: str, database: object) -> None:
    uri = f"sqlite:///{database}/mlflow.db"
    if not Aliases(uri, "known").versions():
        add("known")
    with refused(message):
        run(*words, "--tracking-uri", uri)


def test_an_address_may_lie_in_a_variable_or_a_file(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Like in tracking.uri, the password is neither in a config nor in the list of processes."""
    uri, _ = add("kept")
    monkeypatch.setenv("OUR_MLFLOW", uri)
    (tmp_path / "uri").write_text(f"{uri}\n")
    for place in ("env:OUR_MLFLOW", f"file:{tmp_path}/uri"):
        run("list", "kept", "--tracking-uri", place)
        assert "challenger" in capsys.readouterr().out
    with refused("--tracking-uri"):
        run("list", "kept", "--tracking-uri", "env:NOWHERE")
    with refused("--tracking-uri"):
        run("list", "kept", "--tracking-uri", "postgresql://ann:c4n4ry@db/mlflow")
