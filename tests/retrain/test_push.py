"""The repository of export.push follows the champion: through gate, promotion, rollback and pushes by finetune."""

import shutil
from pathlib import Path

from olora_ray.pipeline import publish
from olora_ray.retrain import run as retraining
from tests import finished_run, hub_stand_in
from tests.refused import refused
from tests.said import said

REPO = "acme/nightly"


def test_the_repository_has_the_champion_s_own_files_and_no_other_version(tmp_path: Path) -> None:
    run = finished_run.make(tmp_path, export={"push": REPO, "license": "mit", "merged": False})
    first = run.registered()
    run.aliases.promote(first, "passed")
    with hub_stand_in.running() as hub, said() as lines:

        def night() -> tuple[int, bool]:
            """Return the number of commits so far, and whether the hub has the second version."""
            retraining.run(run.config)
            assert any("nothing changed since version" in line for line in lines)
            lines.clear()
            return len(hub.commits), hub.repos[REPO]["README.md"] == b"the second"

        assert night() == (1, False)
        # As after a longer training with the same run.name: its files are in the folder that version 1 names, too.
        (Path(run.folder.adapter) / "README.md").write_text("the second")
        second = run.registered()
        assert night() == (1, False), "a challenger"
        publish.push(run.config)  # finetune pushes its candidate, which no gate has seen
        assert hub.repos[REPO]["README.md"] == b"the second"
        assert night() == (3, False)
        assert night() == (3, False)
        shutil.rmtree(run.folder.root)  # as docs/operations.md allows
        hub.broken = "preupload"
        run.aliases.promote(second, "passed")
        with refused("version 2 is not pushed; the same command only pushes"):
            retraining.run(run.config)
        hub.broken = ""
        run.aliases.rollback("bad")
        assert night() == (3, False), "the push failed before the hub took any file"
        run.aliases.promote(second, "promoted by hand")
        assert night() == (4, True)
        run.aliases.rollback("bad")
        Path(run.aliases.files_uri(first), "peft", "README.md").write_text("changed")
        with refused("peft/README.md was changed after the registration"):
            retraining.run(run.config)
        assert (len(hub.commits), hub.repos[REPO]["README.md"]) == (4, b"the second")
