"""A small but real project to run the entry scripts on: a tiny Llama with its tokenizer, and a corpus."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from olora_ray.common import node_cache
from tests import mlflow_database
from tests.ran import ran

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path, layers: int = 2, width: int = 64) -> Path:
    """A random Llama and a byte-level tokenizer with a chat template, as a model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_corpus(file: Path, rows: int, first: int = 0) -> Path:
    """Chat rows that ask for the next number."""
    with file.open("w") as out:
        for number in range(first, first + rows):
            messages = [
                {"role": "user", "content": f"after {number}?"},
                {"role": "assistant", "content": str(number + 1)},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def make_rows(folder: Path) -> Path:
    """Fill a folder with train.jsonl (60 rows), eval.jsonl (7 rows), and an MLflow with nothing in it in runs/."""
    make_corpus(folder / "train.jsonl", 60)
    make_corpus(folder / "eval.jsonl", 7, first=100)
    mlflow_database.place(folder / "runs")
    return folder


def make_pairs(file: Path, rows: int, first: int = 0) -> Path:
    """Preference pairs that prefer the next number to the number itself."""
    with file.open("w") as out:
        for number in range(first, first + rows):
            question = [{"role": "user", "content": f"and after {number}?"}]
            chosen, rejected = (
                [{"role": "assistant", "content": str(answer)}] for answer in (number + 1, number)
            )
            row = {"prompt": question, "chosen": chosen, "rejected": rejected}
            out.write(json.dumps(row) + "\n")
    return file


def with_pairs(folder: str | Path) -> dict[str, Any]:
    """The section data of a config: rows with answers and preference pairs, in the same packs."""
    return {
        "train": [{"path": f"{folder}/train.jsonl"}, {"path": f"{folder}/pairs.jsonl"}],
        "eval": [{"path": f"{folder}/eval.jsonl"}, {"path": f"{folder}/eval-pairs.jsonl"}],
        "max_length": 64,
    }


def make_tiny(folder: Path) -> Path:
    """Fill a folder with model/, rows (train.jsonl 60, eval.jsonl 7) and pairs (pairs.jsonl 30, eval-pairs.jsonl 5)."""
    make_model(folder / "model")
    make_pairs(folder / "pairs.jsonl", 30)
    make_pairs(folder / "eval-pairs.jsonl", 5, first=100)
    make_corpus(folder / "train.jsonl", 60)
    make_corpus(folder / "eval.jsonl", 7, first=100)
    return folder


def on_s3(folder: Path, bucket: str, database: Path, pairs: bool = False) -> dict[str, Any]:
    """Copy a tiny project into a bucket; the fields that put model, data and storage of a config there."""
    root = f"{bucket.removesuffix('/runs')}/project"
    node_cache.upload(folder, root)
    data = {
        "train": [{"path": f"{root}/train.jsonl"}],
        "eval": [{"path": f"{root}/eval.jsonl"}],
        "max_length": 64,
    }
    return {
        "run__storage": bucket,
        "model__name": f"{root}/model",
        "data": with_pairs(root) if pairs else data,
        "tracking": {"uri": f"sqlite:///{database}"},
    }


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A config tree for one worker and a few steps; dotted changes are written with double underscores."""
    tree: dict[str, Any] = {
        "run": {"name": "small", "storage": str(folder / "runs"), "seed": 3},
        "model": {"name": str(model), "dtype": "float32"},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "eval.jsonl")}],
            "max_length": 64,
        },
        "adapter": {"rank": 4, "alpha": 8},
        "train": {
            "steps": 6,
            "global_batch": 4,
            "micro_batch": 1,
            "lr": 1e-2,
            "eval_every": 3,
            "checkpoint_every": 2,
            "log_every": 2,
        },
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "evaluation": {"scorer": "macro_f1", "rows": 6, "samples": 2, "max_new_tokens": 5},
        "registry": {"model": "small"},
    }
    for field, value in changes.items():
        section, _, name = field.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return tree


def write_config(folder: Path, tree: dict[str, Any], name: str = "config.yaml") -> Path:
    """The tree as a YAML file."""
    file = folder / name
    file.write_text(yaml.safe_dump(tree))
    return file


def finetune(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run pipelines/finetune.py as a user does; `more` as for `run_script`."""
    return run_script("finetune.py", *arguments, **more)


def run_script(
    script: str,
    *arguments: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    code: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run an entry script as a user does, with more variables in `env`; it must end with `code`, if that is given."""
    environment = {**_environment(), **(env or {})}
    return ran(_command(arguments, script), code=code, cwd=cwd, env=environment)


def finetune_until(
    file: Path, line: str, act: Callable[[], None]
) -> subprocess.CompletedProcess[str]:
    """Run pipelines/finetune.py, and `act` once it has printed `line`."""
    command = _command([file])
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        seen, errors = "", []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        reader.start()
        for text in process.stdout:
            if line in text and line not in seen:
                act()
            seen += text
        reader.join()
    return subprocess.CompletedProcess(command, process.returncode, seen, "".join(errors))


def _command(arguments: Sequence[str | Path], script: str = "finetune.py") -> list[str]:
    return [sys.executable, str(ROOT / "pipelines" / script), *map(str, arguments)]


def _environment() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return environment
