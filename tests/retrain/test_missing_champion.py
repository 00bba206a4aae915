"""Nights after the champion's alias or version was deleted in MLflow: a worse version never becomes champion.

MLflow is real. Training and measurement are replaced: a night registers a version of one small file, with a tag that
holds its loss on the held-out rows.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from olora_ray.common.errors import UserError
from olora_ray.common.storage import digest
from olora_ray.config.load import load_config, override
from olora_ray.config.schema import Config
from olora_ray.evaluation.rows import RowResults
from olora_ray.pipeline import run as pipeline
from olora_ray.retrain import compare
from olora_ray.retrain import run as retraining
from olora_ray.retrain.recipe import AGAINST
from olora_ray.tracking import checksums
from olora_ray.tracking.aliases import GATE, LAST, Aliases
from olora_ray.tracking.checksums import Version
from olora_ray.tracking.moved_storage import relocate_artifacts
from pipelines import registry
from tests import mlflow_database
from tests.retrain.nightly import Nightly, write
from tests.said import said

LOSS = "test.loss"
NAME = "nightly"
FIRST, SECOND, CHAMPION = 1.30, 1.20, 0.94
"""Losses of the versions 1 to 3."""
WORSE, BETTER = 1.41, 0.50


class Nights:
    """Nights of one model in its own folder."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = override(config, {"run.storage": str(folder / "runs")})
        self.aliases = Aliases(f"sqlite:///{folder}/runs/mlflow.db", NAME)
        self.client: MlflowClient = self.aliases.client
        self.loss = 0.0
        self.meanwhile: Callable[[], object] = lambda: None
        """Happens when the challenger is trained, and nothing is measured yet."""

    def call(self, loss: float | None = None) -> str:
        """Run a night on a new file with a version of this loss (None: on the same files); return the log."""
        if loss is not None:
            self.loss = loss
            file = self.folder / f"{len(self.config.data.train)}.jsonl"
            write(file, [("one", str(loss))])
            sources = [source.model_dump(mode="json") for source in self.config.data.train]
            self.config = override(self.config, {"data.train": [*sources, {"path": str(file)}]})
        with said() as lines:
            retraining.run(self.config)
        return "\n".join(lines)

    def stops(self, loss: float | None = None) -> str:
        """A night that ends in one line for a person."""
        with pytest.raises(UserError) as caught:
            self.call(loss)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def register(self, loss: float, tags: dict[str, str], run_id: str | None = None) -> str:
        """Register one more version without an alias, as finetune.py does; return its number."""
        files = self.folder / "files" / f"{len(list(self.folder.glob('files/*')))}"
        files.mkdir(parents=True)
        (files / "MLmodel").write_text(str(loss))
        text = checksums.of_folders({"": files})
        (files / checksums.FILE).write_text(text)
        tags = {**tags, LOSS: str(loss), checksums.TAG: digest(text)}
        return str(self.client.create_model_version(NAME, str(files), run_id, tags).version)

    def train(self, config: Config, tags: dict[str, str], _base: Any = None) -> dict[str, Any]:
        """Stands for pipeline.run."""
        found = self.aliases.of_run(config.run.name)
        number = found.number if found else self.register(self.loss, tags, config.run.name)
        self.client.set_registered_model_alias(NAME, "challenger", number)
        self.meanwhile()
        return {"mlflow": {"run_id": config.run.name}, "best_step": 1}

    def made(self) -> list[str]:
        return [version.number for version in self.aliases.versions()]


def measured(_: object, wanted: list[tuple[Version, Any]]) -> list[RowResults]:
    """Stands for compare.measured."""
    rows, tokens = 24, 10
    return [
        RowResults(
            "rows",
            (tokens,) * rows,
            (float(v.tags[LOSS]) * tokens,) * rows,
            {},
            tuple((0, n) for n in range(rows)),
        )
        for v, _ in wanted
    ]


@dataclass(frozen=True)
class Begun:
    """A project after three nights that each improved the model."""

    folder: Path
    config: Config


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Begun:
    folder = tmp_path_factory.mktemp("begun")
    nights = Nights(folder, load_config(Nightly(folder, model).config))
    mlflow_database.place(folder / "runs")
    nights.client.create_registered_model(NAME)
    with pytest.MonkeyPatch.context() as patch:
        replaced(patch, nights)
        for loss in (FIRST, SECOND, CHAMPION):
            nights.call(loss)
    assert nights.aliases.current() == {"champion": "3", "previous": "2"}
    return Begun(folder, nights.config)


def replaced(patch: pytest.MonkeyPatch, nights: Nights, measured: Any = measured) -> None:
    patch.setattr(pipeline, "run", nights.train)
    patch.setattr(compare, "measured", measured)


@pytest.fixture
def nights(begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    """After three nights: champion 3, previous 2."""
    old = begun.folder / "runs"
    new = tmp_path / "runs"
    shutil.copytree(old, new)
    relocate_artifacts(str(old), str(new), f"sqlite:///{new}/mlflow.db")
    found = Nights(tmp_path, begun.config)
    replaced(monkeypatch, found)
    return found


def without_alias(nights: Nights) -> None:
    nights.client.delete_registered_model_alias(NAME, "champion")


def without_version(*numbers: str) -> Callable[[Nights], None]:
    def delete(nights: Nights) -> None:
        for number in numbers:
            nights.client.delete_model_version(NAME, number)

    return delete


def without_verdicts(nights: Nights) -> None:
    for number in nights.made():
        for tag in (GATE, AGAINST):
            nights.client.delete_model_version_tag(NAME, number, tag)


def without_record(nights: Nights) -> None:
    """Return a registry as an older release left it."""
    nights.client.delete_registered_model_tag(NAME, LAST)


def rolled_back(nights: Nights) -> None:
    registry.main(["rollback", NAME, "--tracking-uri", nights.aliases.uri])


DELETED = {
    "alias": ([without_alias], "3", "the alias champion is missing"),
    "version": ([without_version("3")], "2", "the champion, version 3, was deleted"),
    "version and previous": (
        [without_version("3", "2")],
        "1",
        "the champion, version 3, was deleted",
    ),
    "all but previous": (
        [without_alias, without_record, without_verdicts],
        "2",
        "the alias champion is missing",
    ),
    "version after a rollback": (
        [rolled_back, without_version("2")],
        "1",
        "the champion, version 2, was deleted",
    ),
}


@pytest.mark.parametrize(("deleted", "against", "why"), DELETED.values(), ids=DELETED)
def test_a_version_must_still_beat_one(
    nights: Nights, deleted: list[Callable[[Nights], None]], against: str, why: str
) -> None:
    for delete in deleted:
        delete(nights)
    before = nights.aliases.current()
    log = nights.call(WORSE)
    worse = nights.made()[-1]
    assert re.search(f"{why}; a new version must beat version {against},", log), log
    assert "refused: eval/loss 1.4100" in log
    assert nights.aliases.version(worse).tags[AGAINST] == against
    assert nights.aliases.current() == {**before, "challenger": worse}, (
        "the deleted alias is not restored"
    )
    assert f"nothing changed since version {worse}" in nights.call(), (
        "a refused version is not trained again"
    )

    log = nights.call(BETTER)
    better = nights.made()[-1]
    assert log.endswith(
        f"version {better} is the champion of {NAME}, version {against} is previous"
    ), "what is pinged"
    assert nights.aliases.current() == {"champion": better, "previous": against}
    assert f"nothing changed since version {better} of nightly (the champion)" in nights.call()


@pytest.mark.parametrize(
    "deleted",
    [[without_version("1", "2", "3")], [rolled_back, without_version("1", "2")]],
    ids=["all versions", "all but one that was rolled back"],
)
def test_without_any_to_compare_with_a_night_ends_before_it_trains(
    nights: Nights, deleted: list[Callable[[Nights], None]]
) -> None:
    for delete in deleted:
        delete(nights)
    before, versions = nights.aliases.current(), nights.made()
    problem = nights.stops(WORSE)
    assert problem.startswith("registry.model=nightly: the champion, version ")
    assert (nights.aliases.current(), nights.made()) == (before, versions)


def test_versions_that_never_passed_are_no_champions(nights: Nights) -> None:
    nights.client.delete_registered_model(NAME)
    nights.client.create_registered_model(NAME)
    nights.client.set_registered_model_alias(NAME, "candidate", nights.register(CHAMPION, {}))
    strict = override(nights.config, {"gate.and": [{"metric": "eval/loss", "at_most": 1.0}]})
    nights.config, usual = strict, nights.config
    assert "refused: eval/loss 1.4100 is above 1" in nights.call(WORSE)
    nights.config = usual
    assert "no champion yet: training the first version" in nights.call(SECOND)
    assert nights.aliases.current() == {"candidate": "1", "champion": "3"}


@pytest.mark.parametrize("delete", [without_alias, without_version("3")], ids=["alias", "version"])
def test_a_champion_that_is_deleted_while_a_night_trains(
    nights: Nights, delete: Callable[[Nights], None]
) -> None:
    nights.meanwhile = lambda: delete(nights)
    assert "refused: eval/loss 1.4100" in nights.call(WORSE)
    assert "champion" not in nights.aliases.current()
