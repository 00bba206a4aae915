"""A model's name leads to a folder that loads frozen, or to one clear error."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olora_ray.common import node_cache
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.model import convert, folder, load, source
from olora_ray.model.source import BaseModel
from tests import tiny
from tests.s3_server import Server

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any]) -> Path:
    """A tiny Llama on disk, without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def named(name: object, **changes: Any) -> Config:
    return tiny.config(model__name=str(name), **changes)


def obtain(name: object) -> BaseModel:
    return source.obtain(named(name))


def refusal(name: object) -> str:
    with pytest.raises(UserError) as caught:
        obtain(name)
    return str(caught.value)


@pytest.mark.parametrize("writable", [True, False])
def test_the_digest_of_large_weights_is_kept_until_they_change(
    copy: Path, node: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    plain = obtain(copy).digest
    monkeypatch.setattr(folder, "KEPT_FROM", 1)
    if not writable:
        node.write_text("a file, below which there is no folder")
    assert [obtain(copy).digest for _ in range(2)] == [plain, plain]
    if writable:
        (kept,) = (node / "digests").iterdir()
        kept.write_text("0" * 64)
        assert obtain(copy).digest != plain, "it was read, not made again"
        os.utime(copy / "model.safetensors", ns=(1, 1))
        assert obtain(copy).digest == plain


def test_a_model_is_its_whole_folder(model_folder: Path, copy: Path) -> None:
    plain = obtain(model_folder).digest
    assert obtain(copy).digest == plain
    config = json.loads((copy / "config.json").read_text())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    changes = {
        "config.json": json.dumps(config | {"rope_theta": 5}),
        "generation_config.json": '{"eos_token_id": 5}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"chat_template": "x"}',
        "chat_template.jinja": "x",
        "additional_chat_templates/tools.jinja": "x",
        "tokenizer.model": "x",
        "merges.txt": "x",
        "model.safetensors": bytes(weights),
        "more.safetensors": bytes(weights),
    }
    found = set()
    for name, content in changes.items():
        place, before = copy / name, (copy / name).read_bytes() if (copy / name).exists() else None
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
        found.add(other := obtain(copy).digest)
        assert (folder.weights(plain) == folder.weights(other)) == ("safetensors" not in name), name
        assert other != plain, name
        place.write_bytes(before) if before is not None else place.unlink()
    assert len(found) == len(changes)
    assert obtain(copy).digest == plain


def test_what_saving_a_model_again_changes_is_no_part_of_it(model_folder: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    again = {
        **dict(reversed(config.items())),
        "transformers_version": "9",
        "_name_or_path": "/elsewhere",
    }
    (copy / "config.json").write_text(json.dumps(again, indent=7))
    (copy / "README.md").write_text("about it")
    (copy / "pytorch_model.bin").write_bytes(b"not read")
    assert obtain(copy).digest == obtain(model_folder).digest


def test_code_is_a_part_of_a_model_where_it_would_be_run(copy: Path) -> None:
    before = [
        source.obtain(named(copy, model__trust_remote_code=trusted)).digest
        for trusted in (False, True)
    ]
    (copy / "modeling_ours.py").write_text("pass")
    after = [
        source.obtain(named(copy, model__trust_remote_code=trusted)).digest
        for trusted in (False, True)
    ]
    assert before[0] == after[0] == before[1] != after[1]


def indexed(folder: Path, name: str) -> None:
    """Write an index that puts the weights into `name`."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        places = dict.fromkeys(weights.keys(), name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{folder}/../outside.safetensors", "sub/x.safetensors", ".."]
)
def test_an_index_that_names_a_file_elsewhere_is_refused_before_it_is_read(
    copy: Path, name: str
) -> None:
    shutil.copy(copy / "model.safetensors", copy.parent / "outside.safetensors")
    indexed(copy, name.format(folder=copy))
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    for attempt in (lambda: obtain(copy), lambda: load.load_model(copy, named(copy).model, CPU)):
        with pytest.raises(UserError):
            attempt()


NO_OBJECTS = ("[]", "null", "{", "\xff", "[" * 100_000)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            ("model.safetensors.index.json", text)
            for text in (*NO_OBJECTS, '{"weight_map": {"a": 5}}', "{}")
        ),
        *(("config.json", text) for text in NO_OBJECTS),
    ],
)
def test_a_damaged_file_is_named(copy: Path, name: str, text: str) -> None:
    (copy / name).write_text(text, encoding="latin-1")
    assert name in refusal(copy)


def test_weights_that_the_index_names_must_be_there(copy: Path) -> None:
    indexed(copy, "model-00001-of-00002.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00002-of-00002.safetensors")
    assert (
        "has no 'model-00001-of-00002.safetensors', which model.safetensors.index.json names"
        in refusal(copy)
    )


def test_a_model_saved_as_one_file_over_its_shards_is_a_model(copy: Path) -> None:
    # transformers then removes the shards, and leaves their index.
    tiny.llama().save_pretrained(copy, max_shard_size="100KB")
    tiny.llama().save_pretrained(copy)
    there = sorted(file.name for file in copy.glob("model*"))
    assert there == ["model.safetensors", "model.safetensors.index.json"], "what this is about"
    assert obtain(copy).digest
    assert load.load_model(copy, named(copy).model, CPU) is not None


def test_the_hub_s_cache_of_links_into_its_blobs_is_a_model(copy: Path, tmp_path: Path) -> None:
    indexed(copy, "model-00001-of-00001.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(copy.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert obtain(snapshot).digest == obtain(copy).digest
    assert load.load_model(snapshot, named(snapshot).model, CPU) is not None


def with_header(folder: Path, header: bytes, length: int | None = None) -> None:
    content = len(header).to_bytes(8, "little") if length is None else length.to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(content + header + bytes(64))


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**64 - 1),
        (b"{}", 2**30),
        (b"not JSON", None),
        (b"[" * 100_000, None),
        (b'{"a": {"shape": [2], "data_offsets": [0]}}', None),
        (b'{"a": {"shape": [-2, -2], "data_offsets": [0, 16]}}', None),
        (b'{"a": {"shape": [1000000, 1000000], "data_offsets": [0, 16]}}', None),
        (b'{"a": {"shape": [4], "data_offsets": [0, 1600]}}', None),
    ],
)
def test_a_header_of_weights_that_cannot_be_is_refused(
    copy: Path, header: bytes, length: int | None
) -> None:
    with_header(copy, header, length)
    assert "model.safetensors" in refusal(copy)
    with pytest.raises(UserError):
        folder.parameters(copy)


PER_LAYER = {"vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 256}
"""Of Gemma 3n and 4: no numbers of layers."""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers cannot be 1e+09"),
        ({"vocab_size": 10**30}, "vocab_size cannot be 1e+30"),
        ({"rope_scaling": {"factor": 10**30}}, "factor cannot be 1e+30"),
        ({"n_layer": 2001}, "n_layer cannot be 2e+03"),
        (PER_LAYER, None),
        ({"text_config": PER_LAYER}, None),
        ({"n_layer": 2000}, None),
    ],
)
def test_sizes_beyond_reason_are_refused_before_the_model_is_built(
    copy: Path, changes: dict[str, Any], problem: str | None
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    if problem:
        assert problem in refusal(copy)
    else:
        assert obtain(copy).folder == str(copy)


@pytest.mark.parametrize(
    ("gone", "adapter", "problem"),
    [
        ("config.json", False, "has no config.json, so it is not a model folder"),
        (
            "config.json",
            True,
            "has no config.json, so it is an adapter, not a model; name its base",
        ),
        ("model.safetensors", False, "no usable weights: no *.safetensors"),
        ("generation_config.json", True, "has an adapter (adapter_config.json)"),
    ],
)
def test_a_folder_that_is_no_base_model_is_refused(
    copy: Path, gone: str, adapter: bool, problem: str
) -> None:
    (copy / gone).unlink()
    if adapter:
        (copy / "adapter_config.json").write_text("{}")
    assert problem in refusal(copy)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "no such file or folder, and not a hub id"),
        ("/nowhere/model", "no such file or folder"),
        ("nowhere", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("package://no_such_package/x.gguf", "Python package 'no_such_package' is not installed"),
        ("package://yaml/x.gguf", "no such file in the package; its files: "),
        ("package://yaml/deep/x.gguf", "its files: none"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name: str, expected: str) -> None:
    message = refusal(name)
    assert message.startswith(f"model.name: {name}: ")
    assert expected in message


def test_a_package_may_hold_a_model(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").touch()
    copy.rename(tmp_path / "carrier" / "weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    base = obtain("package://carrier/weights")
    assert base.folder == str(tmp_path / "carrier" / "weights")
    assert base.name == "package://carrier/weights"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
def test_the_base_loads_frozen_in_evaluation_mode(
    model_folder: Path, dtype: str, attention: str
) -> None:
    config = named(model_folder, model__dtype=dtype, model__attention=attention).model
    loaded: Any = load.load_model(model_folder, config, CPU)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {parameter.dtype for parameter in loaded.parameters()} == {convert.DTYPES[dtype]}
    assert loaded.config._attn_implementation == attention
    expected = tiny.llama(dtype=convert.DTYPES[dtype]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"hidden_size": 32}, "does not load: "),
        ({"num_hidden_layers": 3}, "does not load: "),  # no random numbers
        (
            {"num_hidden_layers": 500},
            r"config\.json describes .* parameters, its weights have ",
        ),  # they fill the memory
    ],
)
def test_weights_that_do_not_fit_the_config_are_an_error(
    copy: Path, fields: dict[str, int], problem: str
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(UserError, match=problem):
        load.load_model(copy, named(copy).model, CPU)


def test_weights_that_lie_there_twice_are_counted_once(model_folder: Path, copy: Path) -> None:
    # Mistral has its weights in shards, and in one file for its own code.
    count = folder.parameters(model_folder)
    shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")
    assert folder.parameters(copy) == count
    indexed(copy, "model-00001-of-00001.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    assert folder.parameters(copy) == count
    assert [file.name for file in folder.loaded_files(copy)] == ["model-00001-of-00001.safetensors"]


def test_a_folder_without_a_tokenizer_is_an_error(model_folder: Path) -> None:
    with pytest.raises(UserError):
        load.load_tokenizer(obtain(model_folder), named(model_folder).model)


@pytest.mark.parametrize(
    ("tokenizer", "generation", "expected"),
    [
        (7, {"eos_token_id": 5}, (5, 7)),
        (7, {"eos_token_id": [9, 7]}, (7, 9)),
        (7, {}, (7,)),
        (7, None, (7,)),
        (None, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_end_tokens_come_from_tokenizer_and_generation_config(
    copy: Path, tokenizer: int | None, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    file = copy / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not None:
        file.write_text(json.dumps(generation))
    stand_in: Any = SimpleNamespace(eos_token_id=tokenizer)
    assert load.end_tokens(obtain(copy), stand_in) == expected


def test_a_node_that_does_not_see_the_drivers_folder_says_so(copy: Path) -> None:
    found = source.obtain(named(copy))
    assert source.on_this_node(found, named(copy)) == found
    shutil.rmtree(copy)
    with pytest.raises(UserError):
        source.on_this_node(found, named(copy))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_another_version_at_the_same_place_of_a_node_is_refused(copy: Path, name: str) -> None:
    # The workers of that node silently trained the adapter on another base than the rest.
    found = source.obtain(named(copy))
    content = bytearray((copy / name).read_bytes())
    content[content.rindex(b"}") - 1 if name == "config.json" else -1] ^= 1
    (copy / name).write_bytes(content)
    refused = (
        rf"^model\.name: {copy} has other files on this node than on the driver's node; "
        r"put it, or run\.storage, where"
    )
    with pytest.raises(UserError, match=refused):
        source.on_this_node(found, named(copy))


def test_a_hub_model_of_which_files_are_missing_on_a_node_is_fetched_to_its_end(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first worker of a node downloads the model; workers a second later took the folder for complete.
    config, fetched = named("org/model"), list[Path]()

    def download(*_: object, **__: object) -> str:
        if (tmp_path / "on its way").exists():
            (tmp_path / "on its way").rename(copy / "model.safetensors")
        fetched.append(copy)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = source.obtain(config)
    assert source.on_this_node(found, config) == found
    assert len(fetched) == 1, "the driver's alone: what is whole is not asked for again"
    (copy / "model.safetensors").rename(tmp_path / "on its way")
    assert source.on_this_node(found, config) == found
    assert len(fetched) == 2


@pytest.mark.usefixtures("node")
class TestObjectStore:
    def test_a_model_there_is_fetched_once_and_again_when_it_changes(
        self, s3_server: Server, bucket: str, copy: Path
    ) -> None:
        place = f"{bucket}/models/tiny"
        node_cache.upload(copy, place)
        first = obtain(place)
        assert first.digest == obtain(copy).digest
        with s3_server.counted() as requests:
            assert obtain(place) == first
        assert not [path for method, path in requests if method == "GET" and "safetensors" in path]
        weights = load_file(copy / "model.safetensors")
        name = next(iter(weights))
        save_file(
            {**weights, name: weights[name] + 1},
            copy / "model.safetensors",
            metadata={"format": "pt"},
        )
        time.sleep(1.1)  # the times of S3 are whole seconds
        node_cache.upload(copy, place)
        second = obtain(place)
        assert second.digest == obtain(copy).digest != first.digest

    def test_one_that_is_not_there_is_told(self, bucket: str) -> None:
        assert refusal(f"{bucket}/none") == f"model.name: {bucket}/none: no such file or folder"
