"""Who may read and write what is stored."""

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


@pytest.mark.parametrize(("umask", "expected"), [("022", "0o644 0o644 0o755"), ("077", "0o600 0o600 0o700")])
def test_the_modes_of_files_are_what_the_user_has_set(umask: str, expected: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MODES, umask, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == expected


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_among_those_of_others_is_private(temporary: Path) -> None:
    folder = storage.private_folder("ours")
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert storage.private_folder("ours") == folder


def test_a_folder_that_somebody_else_has_put_there_is_refused(temporary: Path) -> None:
    place = temporary / f"ours-{os.getuid()}"
    (temporary / "elsewhere").mkdir()
    place.symlink_to(temporary / "elsewhere")
    with pytest.raises(PermissionError, match="not this user's own folder"):
        storage.private_folder("ours")
    place.unlink()
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(PermissionError, match="not this user's own folder"):
        storage.private_folder("ours")
