"""`pipelines/registry.py`, as a user runs it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.tracking.aliases import Aliases
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["promot", "m", "1"], "expected one of list, show, promote, rollback"),
        (["promote", "m"], "promote NAME VERSION"),
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
