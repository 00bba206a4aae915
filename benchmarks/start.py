"""Time from the command pipelines/finetune.py to its first step, with tokens and base model already prepared.

SmolLM2-135M, rank 16 on all linear layers; several runs one after the other, medians. The first step ends when its
checkpoint is written. The peers are what a Ray user writes by hand, TorchTrainer and PEFT with as many workers, and a
script with PEFT and transformers' Trainer in one process; both up to the first step, and without data.

    python benchmarks/start.py [--rounds 5] [--workers 2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import MODEL, machine, met, model_folder, table

from olora_ray.config.schema import Model
from olora_ray.model.load import pick_dtype
from olora_ray.train.checkpoint import MANIFEST
from olora_ray.train.checkpoints import name_of

ROOT = Path(__file__).resolve().parent.parent
PEER = str(Path(__file__).with_name("start_of_peft.py"))
PEER_BY_HAND = str(Path(__file__).with_name("start_of_torchtrainer.py"))
OURS, BY_HAND, ALONE = "ours", "TorchTrainer and PEFT", "PEFT and Trainer, one process"
TARGETS = {BY_HAND: 0.6, ALONE: 1.4}
"""Peer -> at most so many times its seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    folder = model_folder(MODEL, args.storage)
    Path(args.storage, "models").mkdir(parents=True, exist_ok=True)
    print(machine())
    found: dict[str, list[float]] = {OURS: [], BY_HAND: [], ALONE: []}
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        storage = Path(scratch)
        (storage / "models").symlink_to(Path(args.storage).resolve() / "models")
        write_corpus(storage / "corpus.jsonl", rows=400)
        for turn in range(args.rounds + 1):
            file = settings(storage, f"start-{turn}", args.workers)
            seconds = {
                OURS: our_start(file, storage / file.stem),
                BY_HAND: start_of_peer(PEER_BY_HAND, folder, str(args.workers)),
                ALONE: start_of_peer(PEER, folder),
            }
            print(f"round {turn}: {seconds}", file=sys.stderr)
            if turn > 0:  # the first round prepares tokens and models
                for name, each in seconds.items():
                    found[name].append(each)
    print(starts_table(found))


def write_corpus(file: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    words = [
        "".join(chr(97 + c) for c in generator.integers(0, 26, n))
        for n in generator.integers(2, 10, 5_000)
    ]

    def text() -> str:
        count = int(np.clip(generator.lognormal(np.log(20), 0.5), 4, 40))
        return " ".join(words[i] for i in generator.integers(0, len(words), count))

    with file.open("w") as out:
        for _ in range(rows):
            question = {"role": "user", "content": text()}
            answer = {"role": "assistant", "content": text()}
            out.write(json.dumps({"messages": [question, answer]}) + "\n")


def settings(storage: Path, name: str, workers: int) -> Path:
    train = {"steps": 1, "global_batch": 2, "micro_batch": 1, "checkpoint_every": 1}
    tree = {
        "run": {"name": name, "storage": str(storage)},
        "model": {"name": MODEL},
        "data": {"train": [{"path": str(storage / "corpus.jsonl")}], "max_length": 512},
        "train": {**train, "log_every": 1, "keep": 9},
        "cluster": {"workers": workers, "cpus_per_worker": 1},
        "tracking": {"uri": f"sqlite:///{storage.resolve()}/mlflow.db"},
        "evaluation": {"samples": 0},
        "export": {"merged": False},
    }
    file = storage / f"{name}.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


def our_start(file: Path, folder: Path) -> float:
    began = time.time()
    command = [sys.executable, "pipelines/finetune.py", str(file)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{file.stem}: the run has failed")
    return (folder / "checkpoints" / name_of(1) / MANIFEST).stat().st_mtime - began


def start_of_peer(script: str, folder: str, *workers: str) -> float:
    """Return the seconds until the first step of a peer, which prints the time of its end."""
    dtype = str(pick_dtype(Model(name=folder), torch.device("cpu"))).removeprefix("torch.")
    command = [sys.executable, script, folder, dtype, *workers]
    began = time.time()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1]) - began


def starts_table(found: dict[str, list[float]]) -> str:
    rows = [
        (name, f"{median(each):.2f}", f"{min(each):.2f}", f"{max(each):.2f}")
        for name, each in found.items()
    ]
    lines = [table(("to the first step", "seconds", "least", "most"), rows)]
    for peer, most in TARGETS.items():
        times = median(found[OURS]) / median(found[peer])
        lines.append(f"{OURS}: {times:.2f} times {peer}, target {most:g}: {met(times <= most)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
