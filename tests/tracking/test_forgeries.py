"""Whatever a forger does to a champion, it is neither served nor loaded nor promoted, and the log says why."""

from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.serving.watch import Watch
from olora_ray.tracking import models
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import JUDGED, TAG
from olora_ray.tracking.models import BaseOfAdapter, Contents
from olora_ray.tracking.start import start_run
from tests import tiny
from tests.export_parts import Case, save_tokenizer
from tests.refused import refused
from tests.said import said
from tests.tracking.forgeries import ONLY_BY_KEY, TOLD, WEIGHTS, Forger, alias
from tests.tracking.test_signatures import make_keys

pytest.importorskip("model_signing")


@pytest.fixture(scope="module")
def adapter(case: Case) -> Contents:
    folder = case.write_adapter(case.base.parent / "adapter")
    save_tokenizer(folder)
    return Contents(folder, BaseOfAdapter("org/base", "digest", str(case.base)))


@pytest.fixture
def by(database: Path, adapter: Contents, tmp_path: Path, request: pytest.FixtureRequest) -> Forger:
    """A model of two versions, which are signed by ours.pem; the first one is the champion."""
    name = request.node.name
    private, _ = make_keys(tmp_path / "ours")
    theirs, _ = make_keys(tmp_path / "theirs")
    for _ in range(2):
        tracker = start_run(tiny.config(run__storage=str(database)), "test", {})
        models.register(tracker, adapter, name, "challenger", {}, key=f"file:{private}")
    aliases = Aliases(tracker.uri, name)
    aliases.promote("1", "passed: better")
    return Forger(aliases, "1", "2", theirs)


@pytest.mark.parametrize("forgery", TOLD, ids=lambda each: each.__name__)
def test_a_forged_champion_is_refused_and_told(
    forgery: Callable[[Forger], None], by: Forger, tmp_path: Path
) -> None:
    key = str(tmp_path / "ours.pub") if forgery in ONLY_BY_KEY else None
    uri, name, told = by.aliases.uri, by.aliases.name, TOLD[forgery]
    running, restarted = (
        Watch(f"{name}@champion", uri, tmp_path / each, key) for each in ("running", "restarted")
    )
    good = running.look()
    assert good
    forgery(by)
    assert running.look() == good, "it stays the version before"
    with said() as lines:
        assert restarted.look() is None
    assert told in "".join(lines)
    with refused(told):
        models.find(f"models:/{name}@champion", uri, tmp_path / "loaded", key)
    if forgery is not alias:  # a person may judge that version, which has all its files
        with refused(told):
            Aliases(uri, name, key).promote(by.aliases.current()["champion"], "by hand")


def test_a_verdict_of_an_older_release_counts_and_the_log_says_what_is_missing(
    by: Forger, tmp_path: Path
) -> None:
    name = by.aliases.name
    by.aliases.client.delete_model_version_tag(name, "1", JUDGED)
    with said() as lines:
        models.find(f"models:/{name}@champion", by.aliases.uri, tmp_path)
    assert f"{name} version 1: an older release wrote its verdict" in "".join(lines)


def test_a_version_that_changes_while_it_is_judged_gets_no_verdict(by: Forger) -> None:
    aliases = by.aliases
    tags = {JUDGED: aliases.version("2").checksum}
    Forger(aliases, "2", "1", by.key).change(WEIGHTS, TAG)
    for move in (aliases.promote, aliases.refuse):
        with refused("was changed after its verdict"):
            move("2", "passed: better", tags, instead_of="1")
    assert aliases.current() == {"champion": "1", "challenger": "2"}
    assert not aliases.version("2").verdict
