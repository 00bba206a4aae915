"""A run authenticates as the Ray that it joins wants it, and makes one token where there is none."""

import os
import re
import stat
from pathlib import Path

import pytest

from olora_ray.cluster import address, ray_internals
from tests.cluster import fake_head

pytestmark = pytest.mark.usefixtures("home")


def keep(text: str, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def test_the_token_is_that_of_the_environment_or_of_a_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert address.known() is None
    keep("of home\n", home / ".ray" / "auth_token")
    assert address.known() == "of home"
    keep("of a file", home / "other")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "other"))
    assert address.known() == "of a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    assert address.known() == "of the environment"


@pytest.mark.parametrize(
    ("wished", "ours", "theirs", "problem"),
    [
        (None, None, None, None),
        (None, "theirs", "theirs", None),
        ("token", "theirs", None, "uses no token, but RAY_AUTH_MODE=token is set here: unset it"),
        (
            "disabled",
            "theirs",
            "theirs",
            "requires a token, but RAY_AUTH_MODE=disabled is set here: unset it",
        ),
        (None, None, "theirs", "requires a token, but {home}/.ray/auth_token has none"),
        (None, "other", "theirs", "rejects the token of {home}/.ray/auth_token"),
    ],
)
def test_a_ray_is_joined_as_it_wants_or_refused_with_a_reason(
    wished: str | None,
    ours: str | None,
    theirs: str | None,
    problem: str | None,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if wished is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", wished)
    if ours is not None:
        keep(ours, home / ".ray" / "auth_token")
    chosen: list[str] = []
    monkeypatch.setattr(ray_internals, "set_auth_mode", chosen.append)
    with fake_head.head(token=theirs) as port:
        if problem is None:
            address.join(f"127.0.0.1:{port}", 10)
            assert chosen == ["token" if theirs else "disabled"]
            return
        with pytest.raises(PermissionError, match=re.escape(problem.format(home=home))) as caught:
            address.join(f"127.0.0.1:{port}", 10)
        assert "theirs" not in str(caught.value)
        assert chosen == []


def test_a_token_is_made_once_and_for_this_user_only(home: Path) -> None:
    address.make_own()
    file = home / ".ray" / "auth_token"
    assert re.fullmatch("[0-9a-f]{64}", first := file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    address.make_own()
    assert file.read_text() == first
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]


def test_without_a_home_that_can_be_written_the_token_stays_in_the_environment(home: Path) -> None:
    (home / ".ray").write_text("no folder")
    address.make_own()
    assert re.fullmatch("[0-9a-f]{64}", os.environ["RAY_AUTH_TOKEN"])
