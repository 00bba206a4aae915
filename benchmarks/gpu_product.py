"""The product itself on this machine's GPUs: the quickstart's run through Ray, its exports, and its resumption.

benchmarks/gpu.py runs it on one GPU, benchmarks/gpus.py on several.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
NAME = "kit"
SHORT = (
    "evaluation.rows=8",
    "evaluation.samples=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "registry.model=kit",
)
"""Settings of a run that shows everything in a few minutes."""
Found = dict[str, Any]


def product(job: Found) -> dict[str, Found]:
    """Run the quickstart for a few steps, then for more: it trains, its exports agree, and it resumes."""
    steps = int(job["steps"])
    with tempfile.TemporaryDirectory() as storage:
        first = Run(storage, job, f"train.steps={steps}")
        done = {"the quickstart trains and exports": first.check()}
        if done["the quickstart trains and exports"]["ok"]:
            more = Run(storage, job, f"train.steps={2 * steps}")
            found = more.check()
            resumed = f"training continues after step {steps} of {2 * steps}" in more.text
            done["it resumes"] = {**found, "ok": found["ok"] and resumed}
    return done


class Run:
    """A run of pipelines/finetune.py with the quickstart's config; it has ended when this is made."""

    def __init__(
        self, storage: str, job: Found, *settings: str, kill_after: int | None = None
    ) -> None:
        """With `kill_after` a training worker is killed once, after this step."""
        self.folder = Path(storage) / NAME
        workers = f"cluster.workers={job.get('workers', 1)}"
        gpus = f"cluster.gpus_per_worker={int(job['device'] == 'cuda')}"
        own = (f"run.storage={storage}", f"run.name={NAME}", workers, gpus)
        program = [sys.executable, str(ROOT / "pipelines" / "finetune.py")]
        config = str(ROOT / "pipelines" / "configs" / "quickstart.yaml")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the project need not be installed
        began = time.monotonic()
        lines = []
        self.killed = False
        with subprocess.Popen(
            [*program, config, *SHORT, *own, *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if kill_after and not self.killed and f"step {kill_after}/" in line:
                    self.killed = _kill_worker(process.pid)
        self.code = process.returncode
        self.text = "".join(lines)
        self.seconds = time.monotonic() - began

    def check(self) -> Found:
        """Return whether the run ended with exports that agree, and lines of its log."""
        parity = self.folder / "export" / "parity.json"
        agree = parity.exists() and json.loads(parity.read_text())["ok"] is True
        lines = self.text.splitlines()
        told = "; ".join(line for line in lines if "GPU memory:" in line or "error:" in line)
        return {"ok": self.code == 0 and agree, "seconds": self.seconds, "told": told}

    def adapter(self) -> str:
        """Return the digest of the exported adapter."""
        file = self.folder / "export" / "adapter" / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()


def _kill_worker(driver: int) -> bool:
    """Kill one worker of Ray Train that this driver has started."""
    # The driver starts Ray, whose processes are its descendants; Ray names a worker after what it runs.
    for process in psutil.Process(driver).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            return True
    return False
