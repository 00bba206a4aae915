"""Make the runs of tests/old_runs with the commands of a checkout, such as that of a release before this one.

    python -m tests.old_runs.make --checkout DIR --out FOLDER [--older]

--checkout  the checkout whose pipelines/*.py and olora_ray make the runs
--out       the folder that gets project.tar.xz (the project with its runs) and wanted.json (what the checkout makes of
            the interrupted runs); tests/old_runs for those that the tests read
--older     make only older.tar.xz, with a smaller model: a finished and a half-trained run, and one night

Takes about 5 minutes on two cores. test_old_runs.py says what the runs are for.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.old_runs import ends
from tests.pipelines import project
from tests.recovery import processes

SPACE = {
    "search": {"adapter.rank": {"choice": [2, 4]}, "train.lr": {"loguniform": [1e-3, 3e-2]}},
    "set": {"evaluation.scorer": None, "evaluation.samples": 0},
    "scheduler": {"kind": "none"},  # the step at which another one stops a trial depends on timing
    "trials": 4,
    "concurrency": 1,  # what a trial draws depends on the trials that have ended
}


def main() -> int:
    """Make the runs; returns the exit code."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--older", action="store_true")
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="old-", dir="/tmp"))  # short: Ray's sockets lie below it
    try:
        maker = Maker(asked.checkout.resolve(), place)
        asked.out.mkdir(parents=True, exist_ok=True)
        if asked.older:
            maker.make_older()
            pack(maker.project, asked.out / "older.tar.xz")
            return 0
        maker.make()
        pack(maker.project, asked.out / "project.tar.xz")
        wanted = maker.wanted()
        (asked.out / "wanted.json").write_text(json.dumps(wanted, indent=1) + "\n")
    finally:
        processes.kill_all(place)
        shutil.rmtree(place, ignore_errors=True)
    return 0


class Maker:
    """Makes the runs in `place`/project, with temporary files beside it."""

    def __init__(self, checkout: Path, place: Path) -> None:
        self.checkout = checkout
        self.place = place
        self.project = place / "project"

    def make(self) -> None:
        """Write the inputs, and give the commands one after the other."""
        write_inputs(self.project, configs())
        self.call("finetune.py", "finished.yaml")
        for name in ("steady", "automatic"):
            self.interrupt("finetune.py", f"{name}.yaml", after="step 2/6")
        self.call("retrain.py", "nightly.yaml")
        write_rows(self.project / "nights" / "second.jsonl", range(60, 120))
        self.call("retrain.py", "nightly.yaml")
        self.call("sweep.py", "trial.yaml", "whole.yaml", "--register")
        self.interrupt(
            "sweep.py",
            "trial.yaml",
            "part.yaml",
            after="2 of 4 trials have ended",
            exists="runs/trial-part/trials/trial-002/checkpoints/step-0000003",
        )

    def make_older(self) -> None:
        """The same for the runs of `--older`."""
        trees = older_configs()
        write_inputs(self.project, trees, layers=1, width=16)
        self.call("finetune.py", "finished.yaml")
        self.interrupt("finetune.py", "steady.yaml", after="step 2/6")
        self.call("retrain.py", "nightly.yaml")

    def wanted(self) -> dict[str, Any]:
        """Resume the interrupted runs; what they are in the end."""
        for name in ("steady", "automatic"):
            self.call("finetune.py", f"{name}.yaml")
        self.call("sweep.py", "trial.yaml", "part.yaml")
        storage = self.project / "runs"
        return {
            "commit": commit(self.checkout),
            "place": str(self.project),
            "machine": ends.machine(self.project / "model"),
            "steady": ends.of_run(storage, "steady"),
            "automatic": ends.of_run(storage, "automatic"),
            "trial-part": ends.of_search(storage, "trial-part"),
        }

    def call(self, script: str, *arguments: str) -> None:
        """Give a command in the project, to its end."""
        started = time.monotonic()
        done = subprocess.run(
            self._command(script, arguments),
            cwd=self.project,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        output = done.stdout + done.stderr
        print(f"{script} {' '.join(arguments)}: {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode}\n{output[-4000:]}")

    def interrupt(self, script: str, *arguments: str, after: str, exists: str = "") -> None:
        """Give a command with slow steps; send it SIGTERM once it has printed `after`, and `exists` does."""
        fault = f"phase=none;kind=watch;pace=1;dir={self.place}"
        environment = self._environment()
        environment["PYTHONPATH"] = (
            f"{self.checkout}/tests/recovery/faults:{environment['PYTHONPATH']}"
        )
        environment["OLORA_FAULT"] = fault
        output = ""
        with subprocess.Popen(
            self._command(script, arguments),
            cwd=self.project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if after in line and after not in output:
                    while not (self.project / exists).exists():
                        time.sleep(0.1)
                    process.send_signal(signal.SIGTERM)
                output += line
        print(f"{script} {' '.join(arguments)}: {output.splitlines()[-1]}", flush=True)
        if process.returncode != 128 + signal.SIGTERM:
            raise SystemExit(f"exit code {process.returncode}\n{output[-4000:]}")

    def _command(self, script: str, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, str(self.checkout / "pipelines" / script), *arguments]

    def _environment(self) -> dict[str, str]:
        """The variables of a command with its own Ray, and its own caches."""
        own = {
            "PYTHONPATH": str(self.checkout),
            "HOME": str(self.place / "home"),
            "TMPDIR": str(self.place / "t"),
            "RAY_TMPDIR": str(self.place / "t"),
            "RAY_ADDRESS": "local",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        for folder in ("home", "t"):
            (self.place / folder).mkdir(exist_ok=True)
        others = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_", "OLORA_"))
        }
        return others | own


def write_inputs(
    folder: Path, trees: dict[str, dict[str, Any]], layers: int = 2, width: int = 32
) -> None:
    """Write a tiny model, rows, and the configs and spaces of all runs; their paths are relative."""
    folder.mkdir()
    project.make_model(folder / "model", layers, width)
    (folder / "nights").mkdir()
    write_rows(folder / "train.jsonl", range(60))
    write_rows(folder / "nights" / "first.jsonl", range(60))
    write_rows(folder / "eval.jsonl", range(200, 224))  # 24: gate.min_rows
    for name, tree in trees.items():
        tree["run"]["name"] = name
        project.write_config(folder, tree, f"{name}.yaml")
    for name in ("whole", "part"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(SPACE))


def write_rows(file: Path, numbers: range) -> None:
    project.make_corpus(file, len(numbers), numbers.start)


def configs() -> dict[str, dict[str, Any]]:
    """The configs of the runs, by their names."""
    steady = project.settings(Path(), Path("model"))
    steady["run"]["storage"] = "runs"
    steady["data"]["packing"] = True
    # With dropout layers with the same input are computed one by one, also in releases that otherwise join them.
    steady["adapter"]["dropout"] = 0.1
    steady["train"] |= {"checkpoint_every": 3, "log_every": 1}
    steady["registry"]["model"] = "steady"

    finished = _copied(steady)
    finished["cluster"]["workers"] = 1
    finished["registry"]["model"] = "finished"

    automatic = _copied(steady)
    automatic["model"] = {"name": "model"}
    automatic["data"]["max_length"] = "auto"
    automatic["data"]["packing"] = "auto"
    automatic["adapter"]["method"] = "eva"
    automatic["train"] |= {"lr": "auto", "micro_batch": "auto", "activation_checkpointing": "auto"}
    automatic["cluster"] = {"cpus_per_worker": 0.5}
    automatic["registry"]["model"] = "automatic"

    nightly = _copied(finished)
    nightly["data"] = {"train": ["nights"], "eval": ["eval.jsonl"], "max_length": 64}
    nightly["evaluation"] = {"samples": 0}
    nightly["export"] = {"merged": False}
    nightly["registry"]["model"] = "nightly"
    # So that the second night has a new champion, however little it has learned.
    nightly["gate"] = {"guard": None, "anchor": 10.0, "must_improve_by": -9.0}

    trial = _copied(nightly)
    trial["data"] = steady["data"]
    trial["registry"]["model"] = "trial"
    del trial["gate"]
    return {
        "steady": steady,
        "finished": finished,
        "automatic": automatic,
        "nightly": nightly,
        "trial": trial,
    }


def older_configs() -> dict[str, dict[str, Any]]:
    """The configs of `--older`, without fields that came later."""
    trees = configs()
    trees["nightly"]["gate"] = {"min_rows": 24}
    return {name: trees[name] for name in ("steady", "finished", "nightly")}


def _copied(tree: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(tree)))


def pack(folder: Path, file: Path) -> None:
    """Write the folder to an archive: equal files take the space of one, because xz sees all of them at once."""
    with tarfile.open(file, "w:xz", preset=9) as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, path.relative_to(folder), recursive=False, filter=_nobodys)


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if member.name.endswith((".html", ".png")):
        return None  # reports are for people
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def commit(checkout: Path) -> str:
    asked = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.check_output(asked, text=True).strip()


if __name__ == "__main__":
    sys.exit(main())
