"""Time until training starts on a large corpus, and the memory of driver and workers meanwhile.

The benchmark writes a corpus of generated text. Then it starts twice without any tokens: once it only prepares the
token store, and once it runs pipelines/finetune.py (SmolLM2-135M, two workers) until the store is complete or
--seconds have passed, and stops it with SIGTERM. The time to the first step counts from the command, so it includes
the start of Ray and the loading of the model. The time of the preparation alone does not.

    python benchmarks/early.py [--megabytes 1200] [--seconds 240]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import MODEL, machine, processes_below, table

ROOT = Path(__file__).resolve().parent.parent
SMALL = """
import sys, time
from olora_ray.common.logs import quiet_environment
quiet_environment()
from olora_ray.common import logs
from olora_ray.config.decided import DataConfig, with_values
from olora_ray.config.load import load_config
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.connection import connect
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
    parser.add_argument(
        "--seconds", type=float, default=240, help="limit of the training beside the preparation"
    )
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    args = parser.parse_args()
    print(machine())
    Path(args.storage, "models").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        folder = Path(scratch)
        write_corpus(folder / "corpus.jsonl", args.megabytes * 10**6)
        alone = prepare_alone(settings(folder, "alone", args.storage))
        shutil.rmtree(folder / "alone")
        found = train_beside(settings(folder, "beside", args.storage), args.seconds)
    rows = [
        ("preparation alone", f"{alone:.0f}", ""),
        (
            "first step, training beside the preparation",
            f"{found['first']:.0f}",
            f"{found['first'] / alone:.2f}",
        ),
    ]
    if found["prepared"]:
        rows.append(
            (
                "preparation beside training",
                f"{found['prepared']:.0f}",
                f"{found['prepared'] / alone:.2f}",
            )
        )
    print(f"{args.megabytes} MB of text")
    print(table(("", "seconds", "ratio"), rows))
    end = "the store was complete" if found["prepared"] else "it was stopped"
    print(f"steps done when {end}: {found['steps']:.0f}")
    print(
        f"peak memory (resident): driver {found['driver']:.0f} MB, a worker {found['worker']:.0f} MB"
    )


def write_corpus(file: Path, size: int) -> None:
    generator = np.random.default_rng(0)
    words = [
        "".join(chr(97 + c) for c in generator.integers(0, 26, n))
        for n in generator.integers(2, 10, 20_000)
    ]
    with file.open("w") as out:
        while out.tell() < size:
            ranks = np.minimum(generator.zipf(1.3, (500, 350)) - 1, len(words) - 1)
            out.writelines(
                json.dumps({"text": " ".join(words[i] for i in row)}) + "\n" for row in ranks
            )


def settings(folder: Path, name: str, models: str) -> Path:
    storage = folder / name
    storage.mkdir()
    (storage / "models").symlink_to(Path(models).resolve() / "models")
    tree = {
        "run": {"name": "early", "storage": str(storage)},
        "model": {"name": MODEL},
        "data": {
            "train": [{"path": str(folder / "corpus.jsonl"), "format": "text"}],
            "max_length": 256,
        },
        "train": {
            "epochs": 1,
            "global_batch": 2,
            "micro_batch": 1,
            "log_every": 1,
            "checkpoint_every": 20,
        },
        "cluster": {"workers": 2, "cpus_per_worker": 0.5},
        "evaluation": {"samples": 0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


def prepare_alone(file: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", SMALL, file], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def train_beside(file: Path, seconds: float) -> dict[str, float]:
    """Return seconds to the first step and to the complete store, and peak memories in megabytes."""
    command = [sys.executable, "pipelines/finetune.py", str(file)]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peaks = {"driver": 0.0, "worker": 0.0}
    watch = threading.Thread(target=_watch, args=(process, peaks), daemon=True)
    watch.start()
    assert process.stdout
    first = prepared = steps = 0.0
    ended = False
    for line in process.stdout:
        if " | loss " in line:
            first = first or time.perf_counter() - began
            steps += not ended
        if "tokens: train: " in line and " sequences, " in line:
            prepared = time.perf_counter() - began
        if not ended and (prepared or time.perf_counter() - began > seconds):
            ended = True
            process.terminate()
    if process.wait() != 143:
        raise SystemExit("the run has failed")
    return {"first": first, "prepared": prepared, "steps": steps, **peaks}


def _watch(process: "subprocess.Popen[str]", peaks: dict[str, float]) -> None:
    while process.poll() is None:
        peaks["driver"] = max(peaks["driver"], _resident(process.pid))
        workers = processes_below(process.pid, "RayTrainWorker")
        peaks["worker"] = max([peaks["worker"], *map(_resident, workers)])
        time.sleep(1)


def _resident(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0.0


if __name__ == "__main__":
    main()
