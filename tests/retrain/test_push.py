"""The repository of export.push follows the champion: through gate, promotion and rollback."""

import shutil
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.retrain import run as retraining
from olora_ray.tracking.checksums import RUN
from tests import finished_run, hub_stand_in
from tests.said import said

REPO = "acme/nightly"


def test_the_repository_has_the_champion_and_no_other_version(tmp_path: Path) -> None:
    run = finished_run.make(tmp_path, export={"push": REPO, "license": "mit", "merged": False})
    other = shutil.copytree(run.folder.root, Path(run.config.run.storage) / "other")
    (other / "export" / "adapter" / "README.md").write_text("the other")
    first = run.registered()
    run.aliases.promote(first, "passed")
    with hub_stand_in.running() as hub, said() as lines:

        def night() -> tuple[int, bool]:
            """Return the number of commits so far, and whether the hub has the other version."""
            retraining.run(run.config)
            assert any("nothing changed since version" in line for line in lines)
            lines.clear()
            return len(hub.commits), hub.repos[REPO]["README.md"] == b"the other"

        assert night() == (1, False)
        assert night() == (1, False)
        second = run.registered({RUN: str(other)})
        assert night() == (1, False), "a challenger"
        hub.broken = "preupload"
        run.aliases.promote(second, "passed")
        with pytest.raises(UserError, match="the same command only pushes"):
            retraining.run(run.config)
        hub.broken = ""
        assert night() == (2, True)
        run.aliases.rollback("bad")
        assert night() == (3, False)
