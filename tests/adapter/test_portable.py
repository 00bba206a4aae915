"""The files of an exported folder load elsewhere, and say nothing of where they were made."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from olora_ray.adapter import merge, portable
from tests.export_parts import save_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a tokenizer as transformers 5 writes one that it loaded from a folder."""
    save_tokenizer(tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    fields = json.loads(settings.read_text())
    assert fields["is_local"] is True, "what this is about"
    assert fields["tokenizer_class"] == "TokenizersBackend"
    settings.write_text(json.dumps({**fields, "extra_special_tokens": ["<s>"], "name_or_path": "/home/someone"}))
    return tmp_path / "base"


def test_a_tokenizer_is_copied_without_traces_of_a_machine(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    (base / "model.safetensors").write_bytes(b"x")
    portable.copy_tokenizer(base, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"}
    fields = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert fields.keys().isdisjoint({"is_local", "local_files_only", "name_or_path", "extra_special_tokens"})
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<s>"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_templates_that_are_there_already_are_replaced(base: Path, tmp_path: Path) -> None:
    """As in the merged folder of an adapter-only version: its base has brought them."""
    for folder, text in ((base, "new"), (tmp_path / "out", "old")):
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "additional_chat_templates" / "tools.jinja").write_text(text)
    portable.copy_tokenizer(base, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "new"


@pytest.mark.parametrize("code", [True, False])
def test_a_tokenizer_with_code_of_its_own_is_copied_with_it(base: Path, tmp_path: Path, code: bool) -> None:
    (tmp_path / "out").mkdir()
    files = {"tokenization_ours.py", "sentencepiece.bpe.model"}
    for name in files:
        (base / name).write_text("x")
    if code:
        settings = base / "tokenizer_config.json"
        fields = json.loads(settings.read_text())
        settings.write_text(json.dumps({**fields, "auto_map": {"AutoTokenizer": ["tokenization_ours.Ours", None]}}))
    portable.copy_tokenizer(base, tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there & files == (files if code else set())


def test_the_copied_tokenizer_says_what_the_bases_says(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    portable.copy_tokenizer(base, tmp_path / "out")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", base))
    chat = [{"role": "user", "content": "AB C"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours("AB C").input_ids == theirs("AB C").input_ids
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_a_folder_without_a_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    portable.make_portable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_config_keeps_no_place_and_every_hub_id(tmp_path: Path) -> None:
    fields = {
        "_name_or_path": "/home/someone/model",
        "text_config": {"_name_or_path": "C:\\models\\a", "hidden_size": 8},
        "parts": [{"name_or_path": "./here"}],
        "vision_config": {"_name_or_path": "org/vision"},
        "auto_map": {"AutoConfig": "org/model--code.Config"},
        "generation_file": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    portable.make_portable(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text) == {
        "text_config": {"hidden_size": 8},
        "parts": [{}],
        "vision_config": {"_name_or_path": "org/vision"},
        "auto_map": {"AutoConfig": "org/model--code.Config"},
        "generation_file": None,
    }


def test_a_config_without_places_keeps_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size":   8}')
    portable.make_portable(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"hidden_size":   8}'


def test_what_ends_an_answer_is_written_and_is_no_change_of_the_base(tmp_path: Path) -> None:
    """A server goes on past the end of an answer that only the chat template names."""
    for there in (True, False):
        base, merged = tmp_path / f"base-{there}", tmp_path / f"merged-{there}"
        for folder in (base, merged):
            folder.mkdir()
            (folder / "config.json").write_text('{"bos_token_id": 1}')
            save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
            if there:
                (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
        portable.end_with(merged, (2, 7))
        found = json.loads((merged / "generation_config.json").read_text())
        assert found == (
            {"eos_token_id": [2, 7], "temperature": 0.5} if there else {"bos_token_id": 1, "eos_token_id": [2, 7]}
        )
        assert merge.changed_files(base, merged) == []
        (merged / "generation_config.json").write_text(json.dumps({**found, "temperature": 1.0}))
        assert merge.changed_files(base, merged) == ["generation_config.json is not the base's"]


def test_positions_are_told_by_the_names_of_transformers_4_too() -> None:
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    for rope, old in (
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        (scaled, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ({"full_attention": scaled}, {}),
    ):
        shape = {"hidden_size": 8, "rope_parameters": rope}
        assert portable.portable_config(shape) == {**shape, **old}
    named = {"rope_theta": 1.0, "rope_parameters": scaled}
    assert portable.portable_config(named) == named
