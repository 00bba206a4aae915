"""Files of this machine: who may read and write them, and that they are there as a whole or not at all."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olora_ray.common import storage

MODES = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[1], 8))
from olora_ray.common import storage
from safetensors.torch import save_file
import torch
folder = Path(sys.argv[2])
save_file({"a": torch.zeros(1)}, folder / "weights.safetensors")
storage.open_up(folder / "weights.safetensors")
storage.write_text(str(folder / "deep" / "text.json"), "{}")
print(*(oct((folder / name).stat().st_mode & 0o777) for name in ("weights.safetensors", "deep/text.json", "deep")))
"""


@pytest.mark.parametrize(
    ("umask", "expected"), [("022", "0o644 0o644 0o755"), ("077", "0o600 0o600 0o700")]
)
def test_the_modes_of_files_are_what_the_user_has_set(
    umask: str, expected: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", MODES, umask, str(tmp_path)]
    assert (
        subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
        == expected
    )


def test_a_folder_among_those_of_others_is_private_or_refused(temporary: Path) -> None:
    folder = storage.private_folder("ours")
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert storage.private_folder("ours") == folder
    place = temporary / f"theirs-{os.getuid()}"
    (temporary / "elsewhere").mkdir()
    place.symlink_to(temporary / "elsewhere")
    with pytest.raises(PermissionError, match="not this user's own folder"):
        storage.private_folder("theirs")
    place.unlink()
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(PermissionError, match="not this user's own folder"):
        storage.private_folder("theirs")


def test_what_is_staged_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with pytest.raises(KeyboardInterrupt), storage.staged(target) as partial:  # noqa: PT012
        (partial / "half").mkdir(parents=True)
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with storage.staged(target) as partial:
        partial.mkdir()
        (partial / "whole").write_text("x")
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["whole"]
    with pytest.raises(FileNotFoundError), storage.staged(tmp_path / "model"):
        pass


def test_of_two_that_stage_the_same_the_faster_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with storage.staged(target) as slower:
        slower.mkdir()
        (slower / "slower").touch()
        with storage.staged(target) as faster:
            faster.mkdir()
            (faster / "faster").touch()
    assert [file.name for file in target.iterdir()] == ["faster"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed_at_all_is_no_failure(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As AFS and VirtualBox's shared folders: a checkpoint that was in its place counted as not written."""

    def refused(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError):
        storage.flush_to_disk(tmp_path / "file")
    for_folders = contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(OSError)
    with for_folders:
        storage.flush_to_disk(tmp_path)
