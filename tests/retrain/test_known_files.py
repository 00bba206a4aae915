"""The held-out rows on which a version was certainly not trained."""

import json
from pathlib import Path

import pytest

from olora_ray.common.errors import StoreUnavailable
from olora_ray.config.load import build, override
from olora_ray.config.schema import Config
from olora_ray.data.tokenizer_spec import TokenizerSpec
from olora_ray.pipeline.run_folder import TAGS
from olora_ray.retrain import recipe
from olora_ray.retrain.recipe import KnownFiles
from olora_ray.tokens import prepare, store
from olora_ray.tokens.plan import Plan
from olora_ray.tracking.checksums import Version

SPEC = TokenizerSpec("{}", "", {}, 0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        grow(tmp_path, name)
    run = {"name": "n", "storage": str(tmp_path / "runs"), "seed": 3}
    data = {"train": [{"path": str(tmp_path / "data"), "format": "text"}], "eval_fraction": 0.2}
    return build({"run": run, "model": {"name": "m"}, "data": data})


def grow(folder: Path, name: str) -> None:
    with (folder / "data" / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(20))


def plan(config: Config) -> Plan:
    return prepare.plan_here(config, SPEC, "eval")


def noted(config: Config) -> KnownFiles:
    """Return the note of a version that is trained now."""
    train = prepare.plan_here(config, SPEC, "train")
    recipe.note(config, train)
    found = recipe.of_version(config, Version("m", "1", {TAGS["data"]: train.digest()}))
    assert found is not None
    return found


def test_nothing_was_seen_while_files_are_only_added(config: Config, tmp_path: Path) -> None:
    known = noted(config)
    assert recipe.unseen_rows(config, plan(config), known) is None
    grow(tmp_path, "c")
    assert recipe.unseen_rows(config, plan(config), known) is None


def test_of_a_file_that_has_grown_or_gone_no_new_file_is_sure(
    config: Config, tmp_path: Path
) -> None:
    known = noted(config)
    grow(tmp_path, "a")
    grow(tmp_path, "c")
    held_out = plan(config)
    names = [Path(each.file.uri).stem for each in held_out.files]
    assert recipe.unseen_rows(config, held_out, known) == {names.index("b")}
    grow(tmp_path, "b")
    assert recipe.unseen_rows(config, plan(config), known) == set()


def test_another_draw_has_other_rows_in_all_files(config: Config) -> None:
    known = noted(config)
    for changes in ({"run.seed": 4}, {"data.eval_fraction": 0.3}):
        other = override(config, changes)
        assert recipe.unseen_rows(other, plan(other), known) == set()
    before = override(
        config, {"data.eval_fraction": None, "data.eval": config.data.model_dump()["train"]}
    )
    assert recipe.unseen_rows(config, plan(config), noted(before)) == set(), (
        "all rows were trained on then"
    )
    assert recipe.unseen_rows(config, plan(config), None) == set()


def test_rows_of_their_own_are_never_those_of_the_training(config: Config, tmp_path: Path) -> None:
    own = override(
        config, {"data.eval_fraction": None, "data.eval": config.data.model_dump()["train"]}
    )
    assert recipe.unseen_rows(own, plan(own), None) is None


def test_a_store_that_does_not_answer_is_no_store_that_is_gone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: its files counted as unknown, and the gate refused the version that the night had trained."""
    version = Version("m", "1", {TAGS["data"]: "digest"})
    assert recipe.of_version(config, version) is None

    def away(_: str) -> None:
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(store, "read_manifest", away)
    with pytest.raises(StoreUnavailable):
        recipe.of_version(config, version)
