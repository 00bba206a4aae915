"""The GGUF file of a merged model: the same numbers and tokens when it is read, or one line before the training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from olora_ray.common.errors import UserError
from olora_ray.contrib import gguf as export_gguf
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel, obtain
from olora_ray.pipeline import export, exporter
from tests import tiny
from tests.export_parts import IDS, logits
from tests.families import zoo
from tests.families.variants import ALL
from tests.pipeline.test_export_losses import spec_of
from tests.pipeline.test_export_shares import STEP, Run

SPECIAL = ["<s>", "</s>", "<|user|>"]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(digits: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{WORDS}{digits}{REST}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN])


def tokenizer(folder: Path, before: Any = PLAIN, normalizer: Any = None, **changes: Any) -> None:
    """Save a byte-level tokenizer with a few merges, whose ids are those of a tiny model with 300 tokens."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġa"]
    bpe = {
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [("a", "b"), ("Ġ", "a")],
    }
    raw = Tokenizer(models.BPE(**bpe, **changes))
    raw.pre_tokenizer, raw.decoder = before, decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.add_special_tokens(SPECIAL)
    whole = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    whole.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    whole.save_pretrained(folder)


def llama(folder: Path, **changes: Any) -> Path:
    tiny.llama(vocab_size=300, **changes).save_pretrained(folder)
    tokenizer(folder)
    return folder


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def problem(folder: Path, kind: str = "f32") -> str | None:
    config = tiny.config(model__name=str(folder), export__also={"gguf": kind})
    base = BaseModel(str(folder), str(folder), "")
    return next(exporter.problems(base, skeleton(base, config.model), config), None)


def written(folder: Path, kind: str = "f32", ends: tuple[int, ...] = (1,)) -> Path:
    config = tiny.config(model__name=str(folder), export__also={"gguf": kind})
    assert problem(folder, kind) is None
    out = folder / f"model-{kind}.gguf"
    model = skeleton(BaseModel(str(folder), str(folder), ""), config.model)
    trained = exporter.Trained(config.run.name, model, config, ends, None)
    export_gguf.write_file(trained, folder, out, kind)
    return out


def header(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 32, "rope_parameters": LLAMA3}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # the only one that transformers reads from a GGUF file
    ],
)
def test_transformers_reads_the_same_model(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    variant = replace(ALL[name], sizes=ALL[name].sizes | {"vocab_size": 300} | changes)
    model = zoo.make(variant)
    folder, before = tmp_path / "base", logits(model)
    model.save_pretrained(folder)
    tokenizer(folder)
    # As a base model of a run: transformers passes the scaling of positions by, and this project sets it.
    config = tiny.config(
        model__name=str(written(folder)),
        model__dtype="float32",
        run__storage=str(tmp_path / "runs"),
    )
    read = AutoModelForCausalLM.from_pretrained(obtain(config).folder, dtype=torch.float32)
    assert (logits(read) - before).abs().max() < 1e-5


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-2), ("bf16", 0.1), ("q8_0", 0.2)])
def test_a_smaller_type_is_nearly_the_same_model(tmp_path: Path, kind: str, error: float) -> None:
    folder = llama(tmp_path / "base")
    before = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    file = written(folder, kind)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    assert 0 < (logits(read) - before).abs().max() < error
    smaller = file.stat().st_size / written(folder).stat().st_size
    assert smaller < 0.65, "16 bits, or about 9"


def test_a_row_that_has_no_blocks_of_32_is_written_in_16_bits(tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = llama(tmp_path / "base", intermediate_size=112)
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in GGUFReader(written(folder, "q8_0")).tensors
    }
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("before", "changes", "name"),
    [
        (PLAIN, {}, "gpt-2"),
        (DIGITS, {}, "smollm"),
        (split(r"\p{N}"), {"normalizer": normalizers.NFC()}, "qwen2"),
        (split(r"\p{N}{1,3}"), {"ignore_merges": True}, "llama-bpe"),
    ],
)
def test_the_rules_of_the_tokenizer_are_named(
    tmp_path: Path, before: Any, changes: dict[str, Any], name: str
) -> None:
    folder = llama(tmp_path / "base")
    tokenizer(folder, before, **changes)
    assert header(written(folder))["tokenizer.ggml.pre"] == name


def test_tokens_and_template_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    folder = llama(tmp_path / "base")
    own = AutoTokenizer.from_pretrained(folder)
    fields = header(written(folder, ends=(0, 1, 2)))
    assert fields["tokenizer.ggml.tokens"][: len(own)] == own.convert_ids_to_tokens(range(len(own)))
    assert fields["tokenizer.ggml.tokens"][len(own) :] == [
        f"[PAD{number}]" for number in range(len(own), 300)
    ]
    assert fields["tokenizer.ggml.token_type"] == [3] * 3 + [1] * (len(own) - 3) + [5] * (
        300 - len(own)
    )
    assert fields["tokenizer.ggml.merges"] == ["a b", "Ġ a"]
    assert fields["tokenizer.chat_template"] == own.chat_template
    ends = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ends == [1, 0, 2]
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (
        False,
        False,
    )


@pytest.mark.parametrize(
    ("frame", "found"), [("<s> $A", (True, False)), ("<s> $A </s>", (True, True))]
)
def test_what_the_tokenizer_puts_around_a_text_is_written(
    tmp_path: Path, frame: str, found: tuple[bool, bool]
) -> None:
    folder = llama(tmp_path / "base")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        frame, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    raw.save(str(folder / "tokenizer.json"))
    fields = header(written(folder))
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == found


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
            "splits? a text as this tokenizer does",
        ),
        (
            lambda tree: tree["model"].update(ignore_merges=True),
            "splits? a text as this tokenizer does",
        ),
        (
            lambda tree: tree.update(normalizer={"type": "Lowercase"}),
            "splits? a text as this tokenizer does",
        ),
        (lambda tree: tree["added_tokens"][0].update(lstrip=True), "the spaces beside them"),
        (lambda tree: tree["model"]["vocab"].update(abc=300), "more tokens than the model"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    tmp_path: Path, change: Any, why: str
) -> None:
    folder = llama(tmp_path / "base")
    assert problem(folder) is None
    rewrite(folder, change)
    line = problem(folder)
    assert line is not None
    assert "\n" not in line
    with pytest.raises(UserError, match=why):
        raise UserError(line)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (tiny.gpt2, "gpt2 is none of the model types that it can write (llama, qwen2, qwen3)"),
        (
            lambda: tiny.llama(
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
            ),
            "it cannot write rotary positions of type linear",
        ),
    ],
)
def test_a_model_that_cannot_be_written_is_refused_before_the_training(
    tmp_path: Path, make: Any, why: str
) -> None:
    folder = tmp_path / "base"
    make().save_pretrained(folder)
    tokenizer(folder)
    changes = {
        "model__name": str(folder),
        "run__storage": str(tmp_path / "runs"),
        "data__max_length": 64,
    }
    config = tiny.config(export__also={"gguf": "q8_0"}, **changes)
    with pytest.raises(UserError) as error:
        tiny.plan(config, BaseModel(str(folder), str(folder), ""))
    line = str(error.value)
    assert line.startswith("export.also.gguf: ")
    assert why in line
    assert line.endswith("--outtype q8_0")


def test_layers_with_a_window_are_refused(tmp_path: Path) -> None:
    model = zoo.make(ALL["qwen2"])
    model.config.layer_types[-1] = "sliding_attention"
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    assert "layers with a sliding window" in (problem(tmp_path) or "")


def test_a_file_needs_the_merged_model(tmp_path: Path) -> None:
    folder = str(llama(tmp_path / "base"))
    config = tiny.config(model__name=folder, export__also={"gguf": "q8_0"}, export__merged=False)
    with pytest.raises(
        UserError, match=r"^export\.also\.gguf: .*; set export\.merged: true, or delete this line$"
    ):
        tiny.plan(config, BaseModel(folder, folder, ""))


def _shrink(tree: dict[str, Any]) -> None:
    """Leave the tokens that the run's model has."""
    vocabulary = tree["model"]["vocab"].items()
    tree["model"]["vocab"] = {
        token: number for token, number in vocabulary if number < tiny.VOCABULARY
    }
    tree["model"]["merges"] = []


def test_an_export_writes_the_file_of_its_own_merged_model(tmp_path: Path) -> None:
    run = Run(tmp_path)
    tokenizer(run.case.base)
    rewrite(run.case.base, _shrink)
    export.export_run(spec_of(run, export__also={"gguf": "f32"}), run.folder, STEP)
    folder = Path(run.folder.export("gguf"))
    assert [file.name for file in folder.iterdir()] == ["test-F32.gguf"]
    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="test-F32.gguf", dtype=torch.float32
    )
    merged = AutoModelForCausalLM.from_pretrained(run.folder.merged, dtype=torch.float32)
    assert torch.equal(read(IDS).logits, merged(IDS).logits)
    export.export_run(spec_of(run), run.folder, STEP)
    assert not folder.exists(), "it was of an earlier export"
