"""The training data of the next version, and whether it is needed; without Ray and MLflow."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from olora_ray.adapter.layer import AdapterWeights, Factors
from olora_ray.common import node_cache
from olora_ray.common.errors import UserError
from olora_ray.config.load import build, dump, load_config, override
from olora_ray.config.schema import Config
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.base import Base
from olora_ray.pipeline.run_folder import Fingerprint, earlier_settings_digest, settings_digest
from olora_ray.retrain import recipe
from olora_ray.retrain.recipe import AGAINST, Inputs, find_decision
from olora_ray.tokens import prepare
from olora_ray.tracking.checksums import GATE, RUN, SETTINGS, Version
from olora_ray.train import checkpoint
from olora_ray.train.checkpoint import TrainState
from tests import mlflow_database, registered, tiny
from tests.pipelines import project
from tests.ran import ran
from tests.refused import refused
from tests.said import said
from tests.tokens import helpers

SPEC = helpers.spec()
NOW, OLD = Fingerprint("base", "new", "held", "s"), Fingerprint("base", "old", "held", "s")


def version(number: int, made_of: Fingerprint, **tags: str) -> Version:
    return Version("m", str(number), {**made_of.tags(), **tags})


def judged(number: int, made_of: Fingerprint, verdict: str, against: str) -> Version:
    return version(number, made_of, **{GATE: verdict, AGAINST: against})


FIRST, CHAMPION = version(1, OLD), version(3, OLD)
WORSE = judged(2, NOW, "refused: worse", "1")
BACK = judged(2, NOW, "rolled back: bad answers", "1")
UNUSED = judged(1, NOW, "refused: x", "")
SAME = version(1, NOW)


@pytest.mark.parametrize(
    ("versions", "champion", "made_of", "settles"),
    [
        ([SAME], SAME, NOW, SAME),
        ([SAME], SAME, OLD, None),
        ([], None, NOW, None),
        ([FIRST, version(2, NOW)], FIRST, NOW, None),  # it waits for its verdict
        ([FIRST, WORSE], FIRST, NOW, WORSE),
        ([UNUSED], None, NOW, UNUSED),
        ([FIRST, WORSE, CHAMPION], CHAMPION, NOW, None),  # the verdict was against another
        ([BACK, FIRST], FIRST, NOW, BACK),
        ([BACK, CHAMPION], CHAMPION, NOW, BACK),
    ],
)
def test_what_settles_a_night_before_it_trains(
    versions: list[Version],
    champion: Version | None,
    made_of: Fingerprint,
    settles: Version | None,
) -> None:
    assert find_decision(versions, champion, made_of) is settles


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A config with two sources: a folder with two files, and a file."""
    (tmp_path / "chats").mkdir()
    for name in ("chats/a.jsonl", "chats/b.jsonl", "other.jsonl"):
        write(tmp_path / name)
    tree: dict[str, Any] = {
        "run": {"name": "nightly", "storage": str(tmp_path / "runs")},
        "model": {"name": "m"},
        "data": {
            "train": [
                {"path": str(tmp_path / "chats"), "format": "text"},
                {"path": str(tmp_path / "other.jsonl"), "format": "text", "weight": 2},
            ]
        },
        "adapter": {"rank": 2},
        "registry": {"model": "m"},
        "retrain": {"from": "champion", "replay": 0.25},
    }
    return build(tree)


def write(file: Path) -> None:
    file.write_text(
        "".join(json.dumps({"text": f"{file.name} {number}"}) + "\n" for number in range(20))
    )


def inputs(config: Config) -> Inputs:
    data = tiny.of_data(config).config
    plan = prepare.plan_here(data, SPEC, "train")
    made_of = Fingerprint("base", plan.digest(), "held", settings_digest(config))
    held_out = prepare.plan_here(data, SPEC, "eval") if config.data.holds_out() else plan
    base = Base(BaseModel("m", "", "base"), None, SPEC, ())
    return Inputs(base, plan, held_out, made_of, config, data)


def champion_of(config: Config, folder: Path, **identity: str) -> Version:
    """Return a champion with a real checkpoint, made from the current data."""
    found = inputs(config)
    recipe.note(config, found.plan)
    weights = AdapterWeights(
        Factors(torch.ones(2, 3), torch.ones(4, 2)), torch.zeros(2, 3), torch.zeros(4, 2)
    )
    what = {"base model": "base", "adapter": config.adapter.identity()} | identity
    place = folder / "checkpoints" / "step-0000005"
    checkpoint.save(place, {"layer": weights}, None, {}, TrainState(step=5), what, dump(config))
    (folder / "config.yaml").write_text(dump(config))
    return version(1, found.fingerprint, **{RUN: str(folder)})


class Made(NamedTuple):
    config: Config
    tags: dict[str, str]


def made(config: Config, champion: Version | None) -> tuple[Made, str]:
    with said() as lines:
        found = Made(*recipe.training_config(config, inputs(config), champion))
    return found, " ".join(lines)


def test_from_the_base_on_everything(config: Config) -> None:
    found, said = made(override(config, {"retrain.from": "base"}), None)
    assert found.config.data == config.data
    assert found.config.train == config.train
    assert found.config.registry.alias == "challenger"
    assert found.config.run.name.startswith("nightly-")
    rows = {recipe.ROWS: "60"}
    assert found.tags == {**inputs(config).fingerprint.tags(), **rows, recipe.ORIGIN: "base"}
    assert said == ""


def test_the_run_has_the_same_name_until_something_changes(config: Config, tmp_path: Path) -> None:
    first = made(config, None)[0].config.run.name
    assert made(config, None)[0].config.run.name == first
    for change in ({"train.lr": 1e-5}, {"adapter.sigma": 0.1}):
        assert made(override(config, change), None)[0].config.run.name != first
    elsewhere = {"gate.must_improve_by": 1, "cluster.workers": 1}
    assert made(override(config, elsewhere), None)[0].config.run.name == first
    write(tmp_path / "chats" / "c.jsonl")
    assert made(config, None)[0].config.run.name != first


def test_on_from_the_champion_with_new_files_and_a_part_of_the_known(
    config: Config, tmp_path: Path
) -> None:
    champion = champion_of(config, tmp_path / "run")
    write(tmp_path / "chats" / "c.jsonl")
    found, _ = made(config, champion)
    chats, again, other = found.config.data.train
    assert (chats.only, chats.weight) == ((f"{tmp_path}/chats/c.jsonl",), 1)
    assert (again.only, again.weight) == (
        (f"{tmp_path}/chats/a.jsonl", f"{tmp_path}/chats/b.jsonl"),
        0.25,
    )
    assert (other.only, other.weight) == ((), 0.5)
    assert found.config.train.start == f"{tmp_path}/run/checkpoints/step-0000005"
    assert found.tags[recipe.ORIGIN] == "champion, version 1"
    assert found.tags["olora.data_digest"] == inputs(config).plan.digest(), (
        "it stands on all the data"
    )
    plan = prepare.plan_here(tiny.decided(found.config), SPEC, "train")
    assert plan.rows == 20 + 0.25 * 40 + 0.5 * 20


def test_a_file_that_moved_is_known_and_one_that_has_grown_is_new(
    config: Config, tmp_path: Path
) -> None:
    champion = champion_of(config, tmp_path / "run")
    (tmp_path / "chats" / "a.jsonl").rename(tmp_path / "chats" / "z.jsonl")
    with (tmp_path / "chats" / "b.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    chats, again, _ = made(config, champion)[0].config.data.train
    assert chats.only == (f"{tmp_path}/chats/b.jsonl",)
    assert again.only == (f"{tmp_path}/chats/z.jsonl",)


def test_where_all_held_out_rows_may_have_been_trained_on_nothing_is_trained(
    config: Config, tmp_path: Path
) -> None:
    drawn = override(config, {"data.eval_fraction": 0.2, "gate.min_rows": 2})
    champion = champion_of(drawn, tmp_path / "run")
    write(tmp_path / "chats" / "c.jsonl")
    assert "warning" not in made(drawn, champion)[1]
    with (tmp_path / "chats" / "b.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    found, said = made(drawn, champion)
    assert "the gate uses only the held-out rows of 2 unchanged files" in said
    assert found.config.train.start is None, "what it has seen does not pass on to its child"
    for changed in ({"run.seed": 5}, {"data.eval_fraction": 0.3}):
        with refused("data.eval_fraction"):
            made(override(drawn, changed), champion)
    with refused("data.eval_fraction"):
        made(drawn, version(1, Fingerprint("base", "unheard of", "held", "s")))


def test_where_too_few_rows_are_held_out_for_the_gate_nothing_is_trained(
    config: Config, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    write(held_out)
    apart = override(config, {"data.eval": [{"path": str(held_out)}], "retrain.from": "base"})
    champion = champion_of(apart, tmp_path / "run")
    made(apart, champion)  # 20 rows are enough
    with refused("gate.min_rows"):
        made(override(apart, {"gate.min_rows": 21}), champion)
    made(override(apart, {"gate.min_rows": 21}), None)  # without a champion there is no comparison
    one_row = {"gate.group": "text"}
    held_out.write_text(
        "".join(json.dumps({"text": f"{number % 7}"}) + "\n" for number in range(40))
    )
    with pytest.raises(UserError):
        made(override(apart, one_row), champion)
    made(override(apart, one_row | {"gate.min_rows": 7}), champion)
    score = {
        "evaluation.scorer": "exact_match",
        "gate.metric": "eval/exact_match",
        "evaluation.rows": 19,
    }
    with refused("evaluation.rows"):
        made(override(apart, score), champion)
    made(override(apart, score | {"evaluation.rows": 20}), champion)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 19)
    sources = [*apart.model_dump()["data"]["eval"], {"path": str(pairs), "format": "preference"}]
    of_pairs = {"data.eval": sources, "gate.metric": "eval/pairs/loss"}
    with refused("19 held-out pairs, but needs 20"):
        made(override(apart, of_pairs), champion)
    made(override(apart, {**of_pairs, "gate.min_rows": 19}), champion)


def test_a_group_that_is_no_column_is_refused_before_anything_is_trained(
    config: Config, tmp_path: Path
) -> None:
    """Regression: only the gate said so, after the version was trained and registered."""
    write(tmp_path / "held_out.jsonl")
    apart = {"data.eval": [{"path": str(tmp_path / "held_out.jsonl")}], "retrain.from": "base"}
    for held_out in (apart, {"data.eval_fraction": 0.2}):
        with refused("gate.group"):
            made(override(config, {"gate.group": "txt", **held_out}), None)
    for group in ("text", "@file", None):
        made(override(config, {"gate.group": group, **apart}), None)


def test_a_champion_that_cannot_be_continued_is_not_and_the_log_says_why(
    config: Config, tmp_path: Path
) -> None:
    good = champion_of(config, tmp_path / "run")
    other = version(1, Fingerprint("other", "data", "held", "s"))
    lost = version(1, inputs(config).fingerprint, **{RUN: str(tmp_path / "nowhere")})
    foreign = version(1, Fingerprint("base", "unheard of", "held", "s"))
    wider = override(config, {"adapter.rank": 4})
    # finetune has trained version 1's run folder on, and registered version 2, which no gate has seen.
    shorter = version(
        1,
        replace(inputs(config).fingerprint, settings="6 steps"),
        **{RUN: str(tmp_path / "run")},
    )
    cases = [
        (config, good, "there is no new file"),
        (config, other, "it has another base model"),
        (config, lost, "has no checkpoint"),
        (config, foreign, "its training files are not recorded in"),
        (wider, good, "its adapter has other settings"),
        (config, shorter, "run was trained longer since"),
    ]
    for settings, champion, why in cases:
        found, said = made(settings, champion)
        assert why in said
        assert found.config.train.start is None
        assert found.config.data == config.data
        assert found.tags[recipe.ORIGIN] == "base"


def test_data_that_have_shrunk_by_more_than_a_share_are_not_trained_on(
    config: Config, tmp_path: Path
) -> None:
    known = champion_of(config, tmp_path / "run")
    champion = version(1, Fingerprint.from_tags(known.tags), **made(config, None)[0].tags)
    made(
        override(config, {"data.train.1.weight": 0.1}), champion
    )  # fewer rows per epoch, but the same files

    (tmp_path / "chats" / "a.jsonl").unlink()
    made(config, champion)
    (tmp_path / "chats" / "b.jsonl").write_text('{"text": "one"}\n' * 9)
    for chosen in (config, override(config, {"retrain.from": "base"})):
        with refused("data.train"):
            made(chosen, champion)
    made(override(config, {"retrain.may_shrink": 1}), champion)
    made(config, known)  # a version of an older release


def test_the_champions_run_is_found_where_the_storage_lies_now(
    config: Config, tmp_path: Path
) -> None:
    champion = champion_of(config, tmp_path / "runs" / "nightly-1")
    write(tmp_path / "chats" / "c.jsonl")
    (tmp_path / "runs").rename(tmp_path / "moved")
    found = made(override(config, {"run.storage": str(tmp_path / "moved")}), champion)[0]
    assert found.config.train.start == f"{tmp_path}/moved/nightly-1/checkpoints/step-0000005"


def test_other_sequences_of_the_same_files_are_told_as_such(config: Config, tmp_path: Path) -> None:
    champion = champion_of(config, tmp_path / "run")
    now = replace(inputs(config).fingerprint, data="of another release")
    same = recipe.changed(replace(inputs(config), fingerprint=now), champion)
    assert same.startswith("training data (the same files, ")
    write(tmp_path / "chats" / "c.jsonl")
    assert recipe.changed(inputs(config), champion) == "training data"


def test_a_champion_whose_settings_have_the_digest_of_an_earlier_release_is_continued(
    config: Config, tmp_path: Path
) -> None:
    config = override(config, {"train.micro_batch": 2})
    champion = champion_of(config, tmp_path / "run")
    earlier = earlier_settings_digest(config)
    assert earlier != settings_digest(config)
    champion = replace(champion, tags={**champion.tags, SETTINGS: earlier})
    write(tmp_path / "chats" / "c.jsonl")
    found, _ = made(config, champion)
    assert found.config.train.start


def test_a_night_without_changes_is_told_without_torch(
    tmp_path: Path, model: Path, node: Path
) -> None:
    shutil.copytree(model, own := tmp_path / "model")
    (template := tmp_path / "own.jinja").write_text(project.TEMPLATE)
    rows = project.make_corpus(tmp_path / "train.jsonl", 20)
    project.make_corpus(tmp_path / "eval.jsonl", 7, first=100)
    file = project.write_config(tmp_path, project.settings(tmp_path, own, registry__model="m"))
    config = load_config(file, {"data.chat_template": str(template)})
    assert recipe.cached_fingerprint(config) is None
    now = recipe.read_inputs(config).fingerprint
    assert recipe.cached_fingerprint(config) == now
    by_rows = recipe.read_inputs(
        override(config, {"data.max_length": "auto"})
    ).config.data.max_length
    assert 64 <= by_rows <= 256  # the number is what is trained with, and known to the next night

    aliases = registered.model(mlflow_database.place(tmp_path / "runs"), "m", 1)
    for tag, text in now.tags().items():
        aliases.client.set_model_version_tag("m", "1", tag, text)
    aliases.client.set_registered_model_alias("m", "champion", "1")
    code = (
        f"import sys; from olora_ray.common import logs, node_cache; node_cache.CACHE = {node_cache.CACHE!r}\n"
        "from pipelines import retrain\nwith logs.printed(): retrain.main(sys.argv[1:])\n"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(file), f"data.chat_template={template}"]
    done = ran(command, cwd=project.ROOT)
    *_, told, imported = done.stdout.splitlines()
    assert (told[9:], imported) == ("nothing changed since version 1 of m (the champion)", "[]")
    assert recipe.cached_fingerprint(override(config, {"train.lr": 0.1})) is None
    for changed in (template, rows, own / "tokenizer.json", own / "model.safetensors"):
        before = changed.read_bytes()
        changed.write_bytes(before + b" \n")
        assert recipe.cached_fingerprint(config) is None, changed
        changed.write_bytes(before)
    assert recipe.cached_fingerprint(config) == now
