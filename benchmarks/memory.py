"""The planned memory of a worker beside the measured memory of a training process: six shapes, on this CPU.

The plan is `estimate` (train/estimate.py), without the process itself. Each shape is trained for three steps in its
own process. The allocator returns freed memory at once, so the peak of the resident memory is the peak of the
tensors. Target: within 10 %.

    python benchmarks/memory.py [--tiny]
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import config, decided, expected, machine, memory_store, table

MIB = 2**20
LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 4096}
TINY_GPT2 = {"n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 4096}
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "all layers, 4 x 512": ("llama", 8192, {}),
    "q and v alone, 4 x 512": ("llama", 8192, {"adapter": {"targets": ["q_proj", "v_proj"]}}),
    "one long sequence, 1 x 4096": (
        "llama",
        8192,
        {"data": {"max_length": 4096}, "train": {"micro_batch": 1}},
    ),
    "large vocabulary, 4 x 512": ("llama", 65536, {}),
    "GPT-2, 4 x 512": ("gpt2", 8192, {}),
    "blocks run again, 4 x 512": ("llama", 8192, {"train": {"activation_checkpointing": True}}),
}
"""Name -> family, vocabulary, changes of the config."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models, to test the script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(grown(json.loads(args.child))))
        return
    print(machine())
    rows = []
    for name, (family, vocabulary, changes) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_model(family, vocabulary, args.tiny, folder)
            sections = sections_of(changes, folder)
            planned, taken = plan(sections), measured(sections)
        rows.append(
            (name, f"{planned / MIB:.0f}", f"{taken / MIB:.0f}", f"{planned / taken - 1:+.1%}")
        )
    print(table(("shape", "planned MiB", "measured MiB", "off"), rows))


def make_model(family: str, vocabulary: int, tiny: bool, folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"llama": TINY if tiny else LLAMA, "gpt2": TINY_GPT2 if tiny else GPT2}[family]
    shape = AutoConfig.for_model(
        family, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, **sizes
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(folder) / name).write_text("{}")


def sections_of(changes: dict[str, Any], folder: str) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": folder, "dtype": "float32"},
        "data": {"train": [{"path": "unused.jsonl"}], "max_length": 512},
        "adapter": {"rank": 8, "alpha": 8},
        "train": {"micro_batch": 4, "global_batch": 4},
        "cluster": {"workers": 1},
    }
    return {name: section | changes.get(name, {}) for name, section in sections.items()}


def made(sections: dict[str, Any]) -> Any:
    model = sections["model"]
    others = {name: part for name, part in sections.items() if name != "model"}
    return decided(config("unused", model, **others))


def plan(sections: dict[str, Any]) -> int:
    from olora_ray.model.source import obtain
    from olora_ray.train.estimate import estimate

    cfg = made(sections)
    return estimate(cfg, obtain(cfg), expected(cfg)).total_bytes()


def measured(sections: dict[str, Any]) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(sections)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1]))


def grown(sections: dict[str, Any]) -> int:
    """Return, in the child, the peak growth of resident memory from the imports to the third step, in bytes."""
    import numpy as np
    import torch
    from common import our_trainer

    from olora_ray.cluster import malloc
    from olora_ray.model.load import empty_model
    from olora_ray.tokens.collate import collate
    from olora_ray.train import parallel
    from olora_ray.train.loop import train_mode

    malloc.keep_freed_memory = lambda *_: (
        None
    )  # freed memory must leave the process, or the peak would contain it
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: larger blocks go back to the system
    cfg = made(sections)
    length = cfg.data.max_length
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(2, 8192, length).astype(np.int32), np.arange(length) > 0) for _ in range(12)
    ]
    store = memory_store(rows, length)
    empty_model(
        cfg.model.name, cfg.model, torch.device("cpu")
    )  # imports 180 MB of transformers' and torch's modules
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    trainer, attention = our_trainer(cfg, cfg.model.name)
    trainer.loss.recompute = cfg.train.activation_checkpointing
    parallel.install(trainer.loss)
    best = None
    batch = collate(list(store)[: cfg.train.micro_batch], attention)
    train_mode(trainer.adapted, True)
    for _ in range(3):
        (trainer.loss(batch) / len(batch.labels)).backward()
        trainer.optimizer.step(cfg.train.lr)
        best = trainer.flat.vector.clone()
    assert best is not None
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main()
