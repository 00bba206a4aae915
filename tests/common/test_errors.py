"""Exceptions in one line."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from olora_ray.common import storage
from olora_ray.common.errors import (
    StoreError,
    StoreUnavailable,
    TryAgain,
    UserError,
    as_user_error,
    of_the_machine,
    short_reason,
)


def test_only_these_kinds_become_user_errors() -> None:
    with pytest.raises(UserError) as caught, as_user_error("model.name: m", OSError, ValueError):
        raise FileNotFoundError("no weights\nTraceback")
    assert str(caught.value) == "model.name: m: no weights"
    assert caught.value.__suppress_context__
    with pytest.raises(KeyError), as_user_error("model.name: m", OSError, ValueError):
        raise KeyError("ours")
    # A user error is not wrapped again.
    with pytest.raises(TryAgain) as caught, as_user_error("data.train", ValueError):
        raise TryAgain("later")
    assert str(caught.value) == "later"


def test_a_store_that_does_not_answer_now_may_answer_later() -> None:
    with pytest.raises(TryAgain) as caught, as_user_error("s3://b/a: cannot be read", OSError):
        raise StoreUnavailable("no answer")
    assert (str(caught.value), caught.value.exit_code) == (
        "s3://b/a: cannot be read: no answer",
        75,
    )
    with pytest.raises(UserError) as other, as_user_error("s3://b/a: cannot be read", OSError):
        raise StoreError("no such bucket")
    assert other.value.exit_code == 2


def failed(number: int, place: str | None = None) -> OSError:
    return (
        OSError(number, os.strerror(number), place)
        if place
        else OSError(number, os.strerror(number))
    )


def test_what_is_wrong_with_a_disk_is_no_bug() -> None:
    assert of_the_machine(failed(errno.ENOSPC, "/a")) == (
        "/a: No space left on device; make room, and run the same command again"
    )
    assert (
        of_the_machine(failed(errno.EDQUOT))
        == "Disk quota exceeded; make room, and run the same command again"
    )
    assert of_the_machine(failed(errno.EACCES, "/a")) == (
        "/a: Permission denied; fix the cause, and run the same command again"
    )
    copy = OSError(
        errno.ENOSPC, os.strerror(errno.ENOSPC), "/read", None, "/written"
    )  # as shutil's
    assert str(of_the_machine(copy)).startswith("/written: No space left on device")
    for bug in (failed(errno.EPERM), failed(errno.ENOENT, "/a"), OSError("ours"), KeyError("ours")):
        assert of_the_machine(bug) is None
    assert short_reason(failed(errno.ENOSPC, "/a")) == "No space left on device; make room"
    assert short_reason(failed(errno.EACCES, "/a")) == "Permission denied"
    said = SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    assert (
        of_the_machine(said) == "No space left on device; make room, and run the same command again"
    )


def test_a_write_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system names none when a disk is full."""

    def full(descriptor: int) -> None:
        raise failed(errno.ENOSPC)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        storage.write_text(str(tmp_path / "result.json"), "{}")
    assert (caught.value.errno, caught.value.filename) == (
        errno.ENOSPC,
        str(tmp_path / "result.json"),
    )
    assert list(tmp_path.iterdir()) == []
