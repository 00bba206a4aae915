"""The config is read whole, and every problem in it is named at once."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from olora_ray.common.errors import UserError
from olora_ray.config.load import (
    build,
    changed,
    dump,
    flatten,
    load_config,
    override,
    parse_assignments,
    parse_yaml,
)
from olora_ray.config.schema import IN_STORAGE, Config
from tests import tiny
from tests.refused import refused
from tests.said import said

SHIPPED = sorted(Path(__file__).parents[2].glob("pipelines/configs/*.yaml"))


def tree(**changes: Any) -> dict[str, Any]:
    """The smallest config, with sections changed."""
    smallest = {
        "run": {"name": "a"},
        "model": {"name": "m"},
        "data": {"train": [{"path": "a.jsonl"}]},
    }
    return {**smallest, **changes}


def problem(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(tree(**changes))
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_parses(path: Path) -> None:
    config = load_config(path)
    assert tiny.decided(config).accumulation() >= 1
    assert override(config, {}) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": {"rnk": 4}}, ["adapter.rnk: unknown field; did you mean adapter.rank?"]),
        ({"trian": {}}, ["trian: unknown field; did you mean train?"]),
        (
            {"data": {"train": [{"path": "a", "formt": "text"}]}},
            ["data.train.0.formt: unknown field; did you mean data.train.0.format?"],
        ),
        (
            {"data": {"train": [{"path": "a", "format": "mesages"}]}},
            ["data.train.0.format: ", "did you mean 'messages'?"],
        ),
        ({"train": {"": 1}}, ["config: train.: unknown field"]),
        ({"registry": {"alias": "latest"}}, ["registry.alias: the alias 'latest' "]),
        ({"registry": {"alias": "Latest"}}, ["registry.alias: the alias 'Latest' "]),
        ({"registry": {"alias": "v3"}}, ["registry.alias: the alias 'v3' "]),
        (
            {"data": {"train": "a", "eval": "a", "eval_fraction": 0.1}},
            ["data.eval or data.eval_fraction, not both"],
        ),
        (
            {"cluster": {"gpus_per_worker": 2, "workers": 1}},
            ["cluster.gpus_per_worker: a worker uses one GPU, and 2 per worker"],
        ),
        (
            {"cluster": {"gpus_per_worker": 0.5, "workers": 2}},
            ["cluster.gpus_per_worker=0.5 with cluster.workers=2: NCCL"],
        ),
        (
            {"cluster": {"gpus_per_worker": 0.5, "workers": [1, 2]}},
            ["cluster.gpus_per_worker=0.5 with cluster.workers=(1, 2): NCCL"],
        ),
        *(
            ({"cluster": {"workers": wrong}}, ["cluster.workers: ", f"not {wrong!r}"])
            for wrong in (0, [0, 2], [1, 2, 3], "many", [1], True, [4, 1])
        ),
        ({"cluster": {"workers": [1, 2**40]}}, ["workers: 1099511627776 is out of range"]),
        ({"train": {"steps": 2**31}}, ["train: steps: 2147483648 is out of range"]),
        ({"train": {"lr": float("inf")}}, ["train.lr: input should be a finite number or 'auto'"]),
        (
            {"gate": {"must_improve_by": float("nan")}},
            ["gate.must_improve_by: input should be a finite number (got nan)"],
        ),
        ({"adapter": {"rank": "9" * 5000}}, ["adapter.rank: "]),
        ({"adapter": {"rank": "many"}}, ["config: adapter.rank: ", "integer", "(got 'many')"]),
        ({"adapter": {"rank": 0}}, ["adapter.rank: ", "greater than or equal to 1", "(got 0)"]),
        ({"adapter": {"method": "qlora"}}, ["adapter.method: ", "model.quantization=nf4"]),
        ({"adapter": {"method": "svd"}}, ["adapter.method: ", "'olora', 'lora'", "(got 'svd')"]),
        (
            {"adapter": {"method": "eva", "init_tokens": 32}},
            ["adapter: init_tokens=32 ", "= 32;", "rho"],
        ),
        ({"data": {"train": [{"format": "text"}]}}, ["data.train.0.path: required, but not set"]),
        (
            {"gate": {"metric": "eval/exact_match"}},
            ["gate: metric eval/exact_match is not measured", "scorer"],
        ),
        (
            {
                "data": {"train": [{"path": "a"}], "eval": [{"path": "b", "format": "text"}]},
                "evaluation": {"scorer": "exact_match"},
                "gate": {"and": [{"metric": "eval/exact_match", "at_least": 1}]},
            },
            ["gate: metric eval/exact_match is not measured", "format text", "use eval/loss"],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_value_is_named_with_its_field(
    changes: dict[str, Any], expected: list[str]
) -> None:
    message = problem(**changes)
    assert all(part in message for part in expected), message
    assert len(message) < 600


NUMBERS = """run.seed train.early_stop train.steps adapter.rank adapter.alpha adapter.sigma evaluation.rows
gate.must_improve_by gate.and.0.at_least data.eval_fraction data.train.0.weight cluster.gpus_per_worker
cluster.cpus_per_worker export.rank"""


@pytest.mark.parametrize("field", NUMBERS.split())
@pytest.mark.parametrize("switch", [True, False])
def test_a_switch_is_no_number(field: str, switch: bool) -> None:
    config = tiny.config(gate__and=[{"metric": "eval/loss", "at_least": 0}])
    with pytest.raises(
        UserError,
        match=rf"^config: {re.escape(field)}: expected a number, not {str(switch).lower()}$",
    ):
        override(config, {field: switch})


PATHS_AS_NAMES = [
    "..",
    ".",
    "../x",
    "/x",
    "a/b",
    "a/../../x",
    "a\\b",
    "a\n",
    "",
    "a.",
    ".a",
    "~",
    "a b\x00",
]


@pytest.mark.parametrize("name", PATHS_AS_NAMES)
@pytest.mark.parametrize(
    ("section", "field"), [("run", "name"), ("registry", "alias"), ("registry", "model")]
)
def test_a_name_is_not_a_path(section: str, field: str, name: str) -> None:
    assert f"{section}.{field}: " in problem(**{section: {field: name}})


@pytest.mark.parametrize(
    "name", sorted({*IN_STORAGE, "mlflow.db", "mlflow.db-wal", "mlflow.db-journal", "locks"})
)
def test_a_run_does_not_take_the_place_of_what_the_storage_keeps(name: str) -> None:
    message = problem(run={"name": name})
    assert message.startswith("config: run.name: ")
    assert f"'{name}'" in message


@pytest.mark.parametrize(
    ("section", "field", "letter", "most"),
    [
        ("run", "name", "a", 200),
        ("registry", "model", "a", 200),
        ("tracking", "experiment", "é", 256),
    ],
)
def test_a_name_that_a_file_or_mlflow_cannot_have_is_refused(
    section: str, field: str, letter: str, most: int
) -> None:
    longest = letter * most
    build(tree(**{section: {field: longest}}))
    message = problem(**{section: {field: longest + "a"}})
    assert f"{section}.{field}: " in message
    assert re.search(r"20[0-2] bytes|at most", message)


def test_an_address_does_not_go_up() -> None:
    message = problem(
        run={"name": "a", "storage": "s3://bucket/a/../b"},
        model={"name": "package://some/../../etc"},
        data={"train": [{"path": "hf://../x"}]},
    )
    for field in ("run.storage", "model.name", "data.train.0.path"):
        assert re.search(rf"{re.escape(field)}: [^:]*'\.\.'", message)


@pytest.mark.parametrize(
    ("place", "right"), [("s3:/b/runs", "s3://b/runs"), ("file:/mnt/runs", "file:///mnt/runs")]
)
def test_an_address_that_lost_a_slash_is_no_folder(place: str, right: str) -> None:
    message = problem(run={"name": "a", "storage": place}, data={"train": [{"path": place}]})
    for field in ("run.storage", "data.train.0.path"):
        assert f"{field}: an address needs /" in message
    assert f"use {right}" in message
    assert build(tree(model={"name": "models:/support/3"})).model.name == "models:/support/3"


@pytest.mark.parametrize("place", ["s3://b/p?region=x", "s3://b/p#1", "gs://b/a%20b"])
def test_an_address_that_others_lie_below_has_no_options(place: str) -> None:
    message = problem(
        run={"name": "a", "storage": place}, model={"name": place}, train={"start": place}
    )
    for field in ("run.storage", "model.name", "train.start"):
        assert f"{field}: " in message
    assert "AWS_ENDPOINT_URL and AWS_REGION" in message


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("run.storage", "/elsewhere", True),
        ("train.steps", 7, True),
        ("cluster.workers", 4, True),
        ("data.max_length", 512, True),  # its default
        ("train.lr", 0.5, False),
        ("run.seed", 1, False),
        ("model.name", "n", False),
        ("data.train.0.path", "b.jsonl", False),
        ("adapter.rank", 32, False),
    ],
)
def test_a_run_without_a_name_gets_one_from_what_decides(
    field: str, value: Any, same: bool
) -> None:
    name = "olora-r16-081258a9"  # also of later versions: a run that was interrupted is found by it
    assert build(tree(run={})).run.name == build(tree(run={"name": "auto"})).run.name == name
    own = build(changed(tree(run={}), {field: value})).run.name
    assert (own == name) == same
    assert own.startswith("olora-r32-" if field == "adapter.rank" else "olora-r16-")


def test_all_problems_are_told_together() -> None:
    message = problem(
        adapter={"rank": 0, "alpah": 3, "targets": 3},
        train={"lr": []},
        cluster={"gpus_per_worker": "some"},
        run={"name": ""},
    )
    for field in [
        "adapter.rank",
        "adapter.alpah",
        "adapter.targets",
        "train.lr",
        "cluster.gpus_per_worker",
        "run.name",
    ]:
        assert f" {field}: " in message
    assert message.startswith("config has 7 problems: run.name: ")
    assert not any(
        word in message for word in ("tuple[", "literal[", "constrained", "Value error", "pydantic")
    )


def test_fields_that_are_words_of_python_are_spelled_as_in_the_file() -> None:
    config = build(
        tree(
            gate={"and": [{"metric": "eval/loss", "at_most": 2.0}]},
            retrain={"from": "champion", "replay": 0.5},
        )
    )
    assert config.gate.conditions[0].at_most == 2.0
    assert flatten(config)["gate.and.0.at_most"] == 2.0
    assert build(parse_yaml(dump(config), "dump")) == config
    changed = override(config, {"gate.and.0.at_most": 1.5, "retrain.from": "base"})
    assert (changed.gate.conditions[0].at_most, changed.retrain.origin) == (1.5, "base")


@pytest.mark.parametrize(
    ("workers", "why"),
    [
        (6, "use a divisor of the number of workers"),
        (4, "use strategy=ddp or fewer replicas"),
        ([4, 8], "use one number of workers"),
    ],
)
def test_copies_of_a_sharded_base_divide_the_workers(workers: int | list[int], why: str) -> None:
    cluster = {"workers": workers, "fsdp_replicas": 4}
    message = problem(cluster={"strategy": "fsdp", **cluster})
    shown = tuple(workers) if isinstance(workers, list) else workers
    assert message.startswith(f"config: cluster.fsdp_replicas=4 with cluster.workers={shown}: ")
    assert message.endswith(why)
    assert build(tree(cluster=cluster)).cluster.fsdp_replicas == 4
    for number in (1, 8):
        assert build(tree(cluster={"workers": number, "fsdp_replicas": 4, "strategy": "fsdp"}))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "1e+2", "-3e5", ".5"])
def test_numbers_are_read_as_people_write_them(text: str) -> None:
    assert parse_yaml(text, "here") == float(text)
    assert parse_assignments([f"train.lr={text}"]) == {"train.lr": float(text)}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


BEGIN = "run: {name: a}\nmodel: {name: m}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BEGIN + "data: [\ntrain: ]: 3\n", r"run\.yaml, line 4: not valid YAML"),
        ("", "expected sections .* NoneType"),
        ("- a\n", "expected sections .* list"),
        (BEGIN + "data: {train: [{path: a}]}\ntrain:\n", r"run\.yaml: train: "),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.csv", "prompt,completion\na,b\n"), ("rows.jsonl", "{}\n{}\n"), ("a.json", "[{}]")],
)
def test_rows_in_place_of_a_config_are_told_from_one(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with refused(f"olora-ray init {tmp_path}/{name}"):
        load_config(tmp_path / name)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe9}")
    with pytest.raises(UserError):
        load_config(tmp_path / "latin.yaml")


def test_assignments_change_fields_of_every_depth() -> None:
    words = [
        "adapter.rank=32",
        "adapter.targets=[q_proj, v_proj]",
        "data.train.0.weight=2",
        "data.train.0.path=hf://a/b?split=train",
        "run.name=b",
        "train.clip=",
    ]
    changed = override(build(tree()), parse_assignments(words))
    assert changed.adapter.rank == 32
    assert changed.adapter.targets == ("q_proj", "v_proj")
    assert changed.data.train[0].weight == 2.0
    assert changed.data.train[0].path == "hf://a/b?split=train"
    assert changed.run.name == "b"
    assert changed.train.clip is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter.rnk": 3}, "did you mean adapter.rank?"),
        ({"adapter.rank": "x"}, "adapter.rank: "),
        ({"data.train.1.path": "b"}, "data.train.1.path: '1' has no fields to set"),
        (
            {"data.train.7": "b"},
            "data.train.7: no such entry; the list has 1 entries, counted from 0",
        ),
        ({"cluster.gpus_per_worker": 0.5}, "cluster.gpus_per_worker=0.5 with cluster.workers=auto"),
    ],
)
def test_a_change_is_validated_like_a_file(changes: dict[str, Any], expected: str) -> None:
    with refused(expected):
        override(build(tree()), changes)


@pytest.mark.parametrize(
    ("train", "words", "steps", "told"),
    [
        ("steps: 60", ["train.epochs=3"], None, "train.epochs overrides train.steps=60 "),
        ("steps: 60, epochs: 2", [], 60, "train.steps=60 overrides train.epochs=2"),
        ("epochs: 2", ["train.steps=9"], 9, ""),
        ("steps: 60, epochs: 1", [], 60, ""),  # as a run's config.yaml has it
    ],
)
def test_of_epochs_and_steps_the_later_word_counts(
    tmp_path: Path, train: str, words: list[str], steps: int | None, told: str
) -> None:
    path = write(tmp_path, f"{BEGIN}data: {{train: a}}\ntrain: {{{train}}}\n")
    with said() as lines:
        assert load_config(path, parse_assignments(words)).train.steps == steps
    assert [told in line for line in lines] == [True] * bool(told)


@pytest.mark.parametrize("train", ["a.jsonl", "[a.jsonl]", "{path: a.jsonl}", "[{path: a.jsonl}]"])
def test_a_source_has_its_number_however_it_is_written(tmp_path: Path, train: str) -> None:
    """--help and the messages name fields as data.train.0.format."""
    path = write(tmp_path, f"run: {{name: a}}\nmodel: {{name: m}}\ndata: {{train: {train}}}\n")
    data = load_config(
        path, parse_assignments(["data.train.0.weight=2", "data.eval.0.path=b.jsonl"])
    ).data
    assert [(source.path, source.weight) for source in (*data.train, *data.eval)] == [
        ("a.jsonl", 2),
        ("b.jsonl", 1),
    ]
    assert (
        load_config(path, parse_assignments(["data.train.0=c.jsonl"])).data.train[0].path
        == "c.jsonl"
    )


words = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=12)
configs = st.builds(
    lambda rank, lr, targets, uri, fields, name: build(
        tree(
            adapter={"rank": rank, "targets": targets},
            train={"lr": lr},
            tracking={"uri": uri},
            run={"name": name},
            data={
                "train": [
                    {"path": "ä: #x.jsonl", "fields": fields},
                    {"path": "b", "format": "text"},
                ],
                "eval": [],
            },
        )
    ),
    rank=st.integers(1, 512),
    lr=st.floats(1e-12, 10.0),
    targets=st.one_of(st.just("all-linear"), st.lists(words, min_size=1, max_size=3)),
    uri=st.one_of(st.none(), words),
    fields=st.dictionaries(words, words, max_size=3),
    name=st.sampled_from(["a", "1e-4", "007", "null", "yes", "2026.1"]),
)


@given(configs)
def test_a_dump_is_read_back_to_an_equal_config(config: Config) -> None:
    assert build(parse_yaml(dump(config), "dump")) == config
    assert build(yaml.safe_load(dump(config))) == config  # and by any other YAML reader


def test_a_message_has_an_end_whatever_it_is_about() -> None:
    long = "x" * 100_000
    message = problem(
        adapter={"rank": long, "targets": [{}] * 5000, long: 1},
        run={"name": f"https://ann:c4n4ry{long}@host"},
    )
    assert len(message) < 12_000
    assert message.count("\n") == 0
    assert "c4n4ry" not in message
    assert message.endswith("; and 4905 more")
    assert "(got 'xxx" in message
