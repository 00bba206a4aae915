"""Time from the command pipelines/finetune.py to its first step, with tokens and base model already prepared.

SmolLM2-135M, rank 16 on all linear layers; several runs one after the other, medians. The phases are observed from
outside: by log lines, by the workers' processes, and by the files of checkpoints. The peers are what a Ray user writes
by hand, TorchTrainer and PEFT with as many workers, and a script with PEFT and transformers' Trainer in one process;
both up to the first step, and without data. The second table has the same on a Ray that `ray start` has started before,
and the time from the command that follows SIGKILL of the driver to the next step. The third has the CPU seconds that
the imports of each process need. Then come trials of a search on a base model that is already loaded, alone or beside
another trial: the time from the end of the previous trial to the start of the first
step.

    python benchmarks/start.py [--rounds 5] [--workers 2] [--no-search]
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from common import MODEL, machine, met, model_folder, processes_below, table
from overhead import write_corpus
from sweep import Bench, Space
from torch.distributed.elastic.utils.distributed import get_free_port

from olora_ray.config.schema import Model
from olora_ray.model.load import pick_dtype
from olora_ray.train.checkpoint import MANIFEST
from olora_ray.train.checkpoints import name_of

ROOT = Path(__file__).resolve().parent.parent
PEER = str(Path(__file__).with_name("start_of_peft.py"))
PEER_BY_HAND = str(Path(__file__).with_name("start_of_torchtrainer.py"))
LINES = {"imports, checks, plan": " model: ", "Ray": " ray: ", "tokens, MLflow": " training: "}
"""Phase -> text of the log line that ends it."""
PLACED, LOADED, STEP = (
    "workers' processes",
    "imports, process group, model, adapter",
    "self-test, first step",
)
ITEMS = (*LINES, PLACED, LOADED, STEP)
OURS, STANDING, AGAIN = (
    "ours",
    "ours, on a Ray that stands",
    "ours, driver killed, to the next step",
)
BY_HAND, BY_HAND_STANDING, ALONE = (
    "TorchTrainer and PEFT",
    "TorchTrainer and PEFT, there",
    "PEFT and Trainer, one process",
)
TARGETS = (
    (OURS, BY_HAND, 0.6),
    (STANDING, BY_HAND_STANDING, 0.5),
    (OURS, ALONE, 1.4),
    (AGAIN, OURS, 0.8),
)
"""(What, beside what, at most so many times its seconds)."""
IMPORTS = {
    "driver": "olora_ray.pipeline.run",
    "driver, MLflow": "mlflow",
    "Train's controller": "olora_ray.cluster.failures, olora_ray.cluster.train_backend",
    "channel": "olora_ray.cluster.channel",
    "worker": "olora_ray.cluster.worker",
    "trial of a search": "olora_ray.sweep.tuner",
    "torch alone": "torch",
    "Ray alone": "ray",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default="./runs", help="folder for the dequantised model")
    parser.add_argument("--no-search", dest="search", action="store_false")
    args = parser.parse_args()
    folder = model_folder(MODEL, args.storage)
    Path(args.storage, "models").mkdir(parents=True, exist_ok=True)
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.storage) as scratch:
        storage = Path(scratch)
        (storage / "models").symlink_to(Path(args.storage).resolve() / "models")
        write_corpus(storage / "corpus.jsonl", rows=400)
        phases, found = starts(storage, folder, args)
        print(phases_table(phases), flush=True)
        found |= standing(storage, folder, args)
        found[AGAIN] = [killed(storage, turn, args.workers) for turn in range(args.rounds)]
        print(f"\n{starts_table(found)}", flush=True)
        print(f"\n{imports_table(args.rounds)}", flush=True)
        if args.search:
            warm = Warm(storage, Path(args.storage).resolve(), trials=6, steps=3)
            print("\na trial in the place of another, on a base that is loaded")
            for neighbours in (0, 1):
                print(trials_line(neighbours, warm.starts(neighbours)), flush=True)


Seconds = dict[str, list[float]]


def starts(
    storage: Path, folder: str, args: argparse.Namespace
) -> tuple[list[dict[str, float]], Seconds]:
    """Return seconds of each phase of our runs, and of whole starts; the first round prepares tokens and models."""
    phases, found = list[dict[str, float]](), Seconds({OURS: [], BY_HAND: [], ALONE: []})
    for turn in range(args.rounds + 1):
        seen = start(settings(storage, f"start-{turn}", args.workers), storage / f"start-{turn}")
        one = {
            OURS: sum(seen.values()),
            BY_HAND: start_of_peer(folder, args.workers),
            ALONE: start_of_peer(folder),
        }
        print(
            f"round {turn}: {', '.join(f'{name} {each:.1f} s' for name, each in one.items())}",
            file=sys.stderr,
        )
        if turn:
            phases.append(seen)
            for name, each in one.items():
                found[name].append(each)
    return phases, found


def standing(storage: Path, folder: str, args: argparse.Namespace) -> Seconds:
    """Return the seconds to the first step on a Ray that stands; the first start of each there does not count."""
    port = get_free_port()
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
    ]
    command += ["--node-ip-address=127.0.0.1", f"--num-cpus={os.cpu_count()}"]
    found = Seconds({STANDING: [], BY_HAND_STANDING: []})
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as place,
        subprocess.Popen([*command, f"--temp-dir={place}"], stdout=subprocess.DEVNULL) as head,
    ):
        time.sleep(15)  # its own processes have started then
        address = f"127.0.0.1:{port}"
        try:
            for turn in range(args.rounds + 1):
                file = settings(storage, f"standing-{turn}", args.workers)
                found[STANDING].append(
                    sum(start(file, storage / file.stem, address, head.pid).values())
                )
                found[BY_HAND_STANDING].append(start_of_peer(folder, args.workers, address))
        finally:
            head.terminate()
    return {name: seconds[1:] for name, seconds in found.items()}


def killed(storage: Path, turn: int, workers: int) -> float:
    """Return the seconds from the command that follows SIGKILL of the driver to the next step, as its log says."""
    file = settings(storage, f"killed-{turn}", workers, steps=6)
    checkpoint = storage / file.stem / "checkpoints" / name_of(2) / MANIFEST
    command = [sys.executable, "pipelines/finetune.py", str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not checkpoint.exists():
            time.sleep(0.1)
            if process.poll() is not None:
                raise SystemExit(f"{file.stem}: the run ended before it was killed")
        process.kill()
    began = time.time()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        done = [time.time() - began for line in process.stdout if re.search(r" step \d+/", line)]
    if process.returncode:
        raise SystemExit(f"{file.stem}: the run has failed\n")
    return done[0]


def settings(storage: Path, name: str, workers: int, steps: int = 1) -> Path:
    tree = {
        "run": {"name": name, "storage": str(storage)},
        "model": {"name": MODEL},
        "data": {"train": [{"path": str(storage / "corpus.jsonl")}], "max_length": 512},
        "train": {
            "steps": steps,
            "global_batch": 2,
            "micro_batch": 1,
            "log_every": 1,
            "checkpoint_every": 1,
            "keep": 9,
        },
        "cluster": {"workers": workers, "cpus_per_worker": 1},
        "tracking": {"uri": f"sqlite:///{storage.resolve()}/mlflow.db"},
        "evaluation": {"samples": 0},
        "export": {"merged": False},
    }
    file = storage / f"{name}.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


def start(file: Path, folder: Path, address: str = "", head: int | None = None) -> dict[str, float]:
    """Return the seconds of each phase; `head` is the process above those of the Ray at `address`."""
    began = time.time()
    marks: dict[str, float] = {}
    command = [sys.executable, "pipelines/finetune.py", str(file)]
    environment = os.environ | ({"RAY_ADDRESS": address} if address else {})
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        watch = threading.Thread(
            target=_watch, args=(process, head or process.pid, marks), daemon=True
        )
        watch.start()
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            for item, part in LINES.items():
                if part in line:
                    marks.setdefault(item, time.time())
    watch.join()
    if process.returncode:
        raise SystemExit("".join([*lines[-20:], f"{file.stem}: the run has failed\n"]))
    for item, step in ((LOADED, 0), (STEP, 1)):
        marks[item] = (folder / "checkpoints" / name_of(step) / MANIFEST).stat().st_mtime
    return items(began, marks)


def items(began: float, marks: Mapping[str, float]) -> dict[str, float]:
    times = [began, *(marks[item] for item in ITEMS)]
    return {
        item: after - before for item, before, after in zip(ITEMS, times, times[1:], strict=False)
    }


def _watch(process: "subprocess.Popen[str]", ancestor: int, marks: dict[str, float]) -> None:
    while process.poll() is None:
        if processes_below(ancestor, "RayTrainWorker"):
            marks[PLACED] = time.time()
            return
        time.sleep(0.1)


def start_of_peer(folder: str, workers: int = 0, address: str = "") -> float:
    """Return the seconds until the first step: of TorchTrainer with so many workers, or of one process without Ray."""
    dtype = str(pick_dtype(Model(name=folder), torch.device("cpu"))).removeprefix("torch.")
    command = [
        sys.executable,
        *([PEER_BY_HAND, folder, dtype, str(workers)] if workers else [PEER, folder, dtype]),
    ]
    # Ray asks for a token, and only our commands find that out.
    environment = os.environ | (
        {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"} if address else {}
    )
    began = time.time()
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return float(done.stdout.split()[-1]) - began


def phases_table(phases: Sequence[Mapping[str, float]]) -> str:
    rows = [(item, *_spread([each[item] for each in phases])) for item in ITEMS]
    return table(("phases of our start", "seconds", "least", "most"), rows)


def starts_table(found: Mapping[str, Sequence[float]]) -> str:
    rows = [(name, *_spread(values)) for name, values in found.items()]
    lines = [table(("to the first step", "seconds", "least", "most"), rows)]
    for what, beside, most in TARGETS:
        times = median(found[what]) / median(found[beside])
        lines.append(f"{what}: {times:.2f} times {beside}, target {most:g}: {met(times <= most)}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    return f"{median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"


def imports_table(rounds: int) -> str:
    rows = [
        (name, f"{median(processor_seconds(what) for _ in range(rounds)):.2f}")
        for name, what in IMPORTS.items()
    ]
    return table(("imports", "CPU seconds"), rows)


def processor_seconds(modules: str) -> float:
    """Return CPU seconds of a process that only imports modules, without Python's own start."""
    return _used(f"import {modules}") - _used("pass")


def _used(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Warm(Bench):
    side_by_side = 1

    def starts(self, neighbours: int) -> list[tuple[float, float]]:
        self.side_by_side, name = neighbours + 1, f"warm-{neighbours}"
        self.search(name, scheduler="none", adapters=2)
        trials = self.scratch / name / f"quickstart-{name}" / "trials"
        return waits([_times(file.parent) for file in sorted(trials.glob("*/trial.json"))])

    def _space(self, scheduler: str | None, adapters: int) -> Space:
        space = super()._space(scheduler, adapters)
        # The first step has a checkpoint, and no evaluation comes before it.
        fixed = {
            **space["set"],
            "train.eval_every": self.steps,
            "train.checkpoint_every": 1,
            "train.keep": self.steps,
        }
        search = {"train.lr": {"loguniform": [1e-4, 2e-3]}}
        return {**space, "search": search, "set": fixed, "concurrency": self.side_by_side}


def _times(trial: Path) -> tuple[float, float, float, float]:
    record = trial / "trial.json"
    ended = record.stat().st_mtime
    history = json.loads((trial / "training.json").read_text())["state"]["history"]
    step = next(float(row["train/step_seconds"]) for row in history if row["step"] == 1)
    first = (trial / "checkpoints" / name_of(1) / MANIFEST).stat().st_mtime
    return ended, ended - json.loads(record.read_text())["seconds"], first, step


def waits(trials: Sequence[tuple[float, float, float, float]]) -> list[tuple[float, float]]:
    """Return per trial the seconds from the end of its predecessor to its first step, and the seconds of that step.

    `trials` has (end, start, end of the first step, seconds of the step) of each trial.
    """
    found = []
    for _, begun, first, step in trials:
        before = [ended for ended, *_ in trials if ended <= begun]
        if before:
            found.append((first - step - max(before), step))
    return found


def trials_line(neighbours: int, found: Sequence[tuple[float, float]]) -> str:
    middle, least, most = _spread([before for before, _ in found])
    return (
        f"  {'a neighbour trains meanwhile' if neighbours else 'alone'}: {middle} s until its first step begins"
        f" ({least} to {most}), which takes {_spread([step for _, step in found])[0]} s"
    )


if __name__ == "__main__":
    main()
