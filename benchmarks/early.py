"""Time until training starts on a large corpus, beside the time to tokenise all of it first.

The benchmark writes a corpus of generated text. Then it starts twice without any tokens: once it only prepares the
token store, and once it runs pipelines/finetune.py (SmolLM2-135M, two workers), and stops it with SIGTERM after its
first step. The time to the first step counts from the command, so it includes the start of Ray and the loading of the
model. The time of the preparation alone does not.

    python benchmarks/early.py [--megabytes 1200]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import MODEL, machine, table

ROOT = Path(__file__).resolve().parent.parent
PREPARE = """
import sys, time
from olora_ray.common.logs import quiet_environment
quiet_environment()
from olora_ray.common import logs
from olora_ray.config.decided import DataConfig, with_values
from olora_ray.config.load import load_config
from olora_ray.pipeline.base import open_base
from olora_ray.cluster.connection import connect
from olora_ray.tokens.prepare import prepare
config = with_values(load_config(sys.argv[1]), DataConfig, {"data.packing": True})
with logs.printed():
    base = open_base(config)
    with connect(config):
        began = time.perf_counter()
        prepare(config, base.spec, "train")
        print("seconds", time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    print(machine())
    Path(args.storage, "models").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        folder = Path(scratch)
        write_corpus(folder / "corpus.jsonl", args.megabytes * 10**6)
        alone = prepare_alone(settings(folder, "alone", args.storage))
        shutil.rmtree(folder / "alone")
        first = first_step(settings(folder, "beside", args.storage))
    print(f"{args.megabytes} MB of text")
    rows = [
        ("preparation alone", f"{alone:.0f}", ""),
        ("first step, training beside the preparation", f"{first:.0f}", f"{first / alone:.2f}"),
    ]
    print(table(("", "seconds", "ratio"), rows))


def write_corpus(file: Path, size: int) -> None:
    generator = np.random.default_rng(0)
    words = [
        "".join(chr(97 + c) for c in generator.integers(0, 26, n))
        for n in generator.integers(2, 10, 20_000)
    ]
    with file.open("w") as out:
        while out.tell() < size:
            ranks = np.minimum(generator.zipf(1.3, (500, 350)) - 1, len(words) - 1)
            for row in ranks:
                out.write(json.dumps({"text": " ".join(words[i] for i in row)}) + "\n")


def settings(folder: Path, name: str, models: str) -> Path:
    storage = folder / name
    storage.mkdir()
    (storage / "models").symlink_to(Path(models).resolve() / "models")
    source = {"path": str(folder / "corpus.jsonl"), "format": "text"}
    batch = {"global_batch": 2, "micro_batch": 1}
    tree = {
        "run": {"name": "early", "storage": str(storage)},
        "model": {"name": MODEL},
        "data": {"train": [source], "max_length": 256},
        "train": {"epochs": 1, "log_every": 1, "checkpoint_every": 20, **batch},
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "evaluation": {"samples": 0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


def prepare_alone(file: Path) -> float:
    command = [sys.executable, "-c", PREPARE, str(file)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def first_step(file: Path) -> float:
    """Return the seconds from the command to its first step; the run is stopped then."""
    command = [sys.executable, "pipelines/finetune.py", str(file)]
    began = time.perf_counter()
    seconds = 0.0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if " | loss " in line and not seconds:
                seconds = time.perf_counter() - began
                process.terminate()
    if process.returncode != 143:
        raise SystemExit("the run has failed")
    return seconds


if __name__ == "__main__":
    main()
