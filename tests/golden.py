"""Digests of what five small runs leave, to compare two commits on one machine: a restructuring changes none of them.

    python -m tests.golden [--checkout DIR] [--only NAME ...] [--out FILE.json] [--compare FILE.json] [--keep FOLDER]

--checkout  the checkout whose pipelines/*.py and olora_ray are run (default: this one)
--only      run some of the configs: quickstart, dropout, mixture, fsdp, search
--out       write the digests to this file
--compare   exit with 1 if a digest differs from that in this file, and name each one that does
--keep      move the runs to this folder, which must not exist, to look at what differs; else delete them

Prints a line for each file: CONFIG ARTEFACT SHA-256. Takes about 5 minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.families import variants, zoo
from tests.pipelines import project

VARYING = {
    "seal",  # of a manifest or sidecar: a digest of its content, in which the files' absolute paths are
    *("mlflow", "mlflow_run"),  # the database's address and the run's id, which is random
    "gradients",  # of the self-test: a rounding error, whose last digits depend on the threads
    *("seconds", "first_step", "spared"),  # times, as the next three
    *(
        "train/tokens_per_second",
        "train/all_tokens_per_second",
        "train/step_seconds",
        "data/wait_fraction",
    ),
}
"""Keys whose values differ from run to run, left out of manifests, sidecars, result.json and leaderboard.json. Nothing
else is left out; in all files FOLDER replaces the path of the run's temporary folder."""
QUICKSTART = (
    "train.steps=3",
    "train.global_batch=4",
    "train.eval_every=3",
    "train.checkpoint_every=3",
    "evaluation.rows=4",
    "evaluation.samples=1",
    "evaluation.max_new_tokens=8",
)
SPACE = {
    "search": {"adapter.rank": {"choice": [2, 4]}, "train.lr": {"loguniform": [1e-3, 3e-2]}},
    "set": {"evaluation.scorer": None, "evaluation.samples": 0},
    "scheduler": {"kind": "none"},  # the step at which another one stops a trial depends on timing
    "trials": 4,
}

Digests = dict[str, str]
"""CONFIG ARTEFACT -> SHA-256."""


def main() -> int:
    """Run the configs, print the digests, and compare them; returns the exit code."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--checkout", type=Path, default=project.ROOT)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    wanted: Digests = json.loads(asked.compare.read_text()) if asked.compare else {}
    root = Path(tempfile.mkdtemp(prefix="g-", dir="/tmp"))  # short: Ray's sockets lie below it
    try:
        found = {
            line: value
            for name in asked.only
            for line, value in _digests(name, root, asked.checkout.resolve())
        }
    finally:
        if asked.keep:
            shutil.move(root, asked.keep)
        shutil.rmtree(root, ignore_errors=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    if not asked.compare:
        return 0
    lines = sorted(found.keys() | {line for line in wanted if line.split()[0] in asked.only})
    wrong = [line for line in lines if found.get(line) != wanted.get(line)]
    for line in wrong:
        print(
            f"differs: {line}: {wanted.get(line, 'absent')} in {asked.compare}, now {found.get(line, 'absent')}"
        )
    print(
        f"{len(lines) - len(wrong)} of {len(lines)} digests are equal to those of {asked.compare}"
    )
    return 1 if wrong else 0


def _digests(name: str, root: Path, checkout: Path) -> Iterator[tuple[str, str]]:
    """Run a config in a folder of its own; its digests, each printed as it is known."""
    folder = root / name
    folder.mkdir()
    script, *arguments = CONFIGS[name](folder, checkout)
    _run([sys.executable, str(checkout / "pipelines" / script), *arguments], folder, checkout)
    for artefact, content in _artefacts(folder / "runs"):
        digest = hashlib.sha256(content.replace(os.fsencode(folder), b"FOLDER")).hexdigest()
        print(f"{name} {artefact} {digest}", flush=True)
        yield f"{name} {artefact}", digest


def _run(command: list[str], folder: Path, checkout: Path) -> None:
    """Run a command with its own Ray, and its own caches: those of the user may hold results of another commit."""
    own = {
        "PYTHONPATH": str(checkout),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "t"),
        "RAY_TMPDIR": str(folder / "t"),
        "RAY_ADDRESS": "local",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for place in ("home", "t"):
        (folder / place).mkdir()
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RAY_", "MLFLOW_", "OLORA_"))
    }
    done = subprocess.run(
        command, cwd=folder, env={**kept, **own}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}"
        )


def _artefacts(runs: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file that is compared, without what varies."""
    manifests = [
        (json.loads(file.read_text()), file.parent) for file in runs.glob("tokens/*/manifest.json")
    ]
    for manifest, store in sorted(
        manifests, key=lambda each: str(each[0]["inputs"]["split"]), reverse=True
    ):
        for file in sorted(store.iterdir()):
            content = _stable(file) if file.suffix == ".json" else file.read_bytes()
            yield f"tokens/{manifest['inputs']['split']}/{file.name}", content
    (export,) = runs.glob("**/export")  # of a search that of the winner alone
    for file in sorted(
        file
        for part in ("adapter", "merged")
        for file in (export / part).rglob("*")
        if file.is_file()
    ):
        yield str(file.relative_to(export)), file.read_bytes()
    for name in ("result.json", "leaderboard.json"):
        for file in runs.glob(f"*/{name}"):
            yield name, _stable(file)
    for file in (
        *runs.glob("*/best.yaml"),
        *runs.glob("mlartifacts/*/artifacts/samples.json"),
    ):  # prompts and answers
        yield file.name, file.read_bytes()


def _stable(file: Path) -> bytes:
    return json.dumps(without_varying(json.loads(file.read_text())), indent=1).encode()


def without_varying(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_varying(item) for key, item in value.items() if key not in VARYING}
    return [without_varying(item) for item in value] if isinstance(value, list) else value


def _quickstart(folder: Path, checkout: Path) -> list[str]:
    shutil.copytree(checkout / "pipelines" / "quickstart", folder / "pipelines" / "quickstart")
    return ["finetune.py", str(checkout / "pipelines" / "configs" / "quickstart.yaml"), *QUICKSTART]


def _tiny(folder: Path, **changes: Any) -> str:
    """A tiny Llama, its corpora and a config of relative paths, with changes as of project.settings."""
    project.make_tiny(folder)
    return project.write_config(folder, project.settings(Path(), Path("model"), **changes)).name


def _dropout(folder: Path, _: Path) -> list[str]:
    return [
        "finetune.py",
        _tiny(folder, train__global_batch=8, adapter__dropout=0.1, data__packing=True),
    ]


def _mixture(folder: Path, _: Path) -> list[str]:
    config = _tiny(folder)
    shutil.rmtree(folder / "model")
    zoo.build(variants.NAMED["qwen3_moe"], folder / "model")
    return ["finetune.py", config]


def _fsdp(folder: Path, _: Path) -> list[str]:
    return ["finetune.py", _tiny(folder, cluster__strategy="fsdp")]


def _search(folder: Path, _: Path) -> list[str]:
    config = _tiny(folder, cluster__workers=1)
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return ["sweep.py", config, "space.yaml", "--register"]


CONFIGS: dict[str, Callable[[Path, Path], list[str]]] = {
    "quickstart": _quickstart,
    "dropout": _dropout,
    "mixture": _mixture,
    "fsdp": _fsdp,
    "search": _search,
}
"""Each writes its inputs to a folder, and returns the entry script of the checkout and its arguments."""

if __name__ == "__main__":
    sys.exit(main())
