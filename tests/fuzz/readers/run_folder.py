"""Files in the folder of a run or a search, as a run that is started again reads them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from olora_ray.common import records
from olora_ray.config.load import dump
from olora_ray.evaluation.rows import RowResults
from olora_ray.pipeline import report
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.sweep import record, search_folder
from olora_ray.sweep.record import SearchRecord
from olora_ray.train.scoring import Baseline
from tests import tiny
from tests.fuzz import mutate
from tests.fuzz.case import Case

IDENTITY = {"base model": "a", "training data": "b"}
CURVE = {
    "step": 6,
    "best_loss": 1.5,
    "best_step": 3,
    "stale": 1,
    "history": [{"step": 3.0, "eval/loss": 1.5}],
    "before": [[1]],
}
ANSWER = {"prompt": [1, 2], "reference": [3], "before": [4], "after": [5]}
TRIAL = {
    "number": 1,
    "params": {"train.lr": 0.1},
    "status": "finished",
    "curve": [[1, 2.0], [2, 1.5]],
    "step": 2,
    "value": 1.5,
    "seconds": 3.0,
    "first_step": 1.0,
    "reason": "",
}
FILES: dict[str, Any] = {
    "result.json": {"run": "test", "steps": 6, "metrics": {"eval/loss": 1.5}, "registered": None},
    "training.json": {"problem": None, "state": CURVE, "stopped_early": False, "answers": [ANSWER]},
    "tracking.json": {"uri": "sqlite:///x", "run_id": "abc"},
    "export/parity.json": {"ok": True, "step": 6},
    "progress.json": {"seconds": 9.0, "complete": True, "note": "why", "cut": [3]},
    "trials/1/trial.json": TRIAL,
    "baseline.json": {"identity": IDENTITY, "loss": 1.5, "answers": [[1, 2], [3]]},
    "rows.json": {"data": "a", "losses": [1.0, 2.0], "tokens": [3, 4], "scores": {"exact_match": [1.0, 0.0]}},
}


def cases(seed: int, made: Any) -> Iterator[Case]:
    """Each file with other values or other bytes; and the config that was kept."""
    kept = dump(tiny.config())
    for number in range(10**9):
        random = Random(f"run folder {seed} {number}")
        name = random.choice([*FILES, "config.yaml"])
        if name == "config.yaml":
            yield Case((name, mutate.text(random, kept).encode("utf-8", "surrogatepass")))
        elif number % 3:
            yield Case((name, mutate.as_json(mutate.tree(random, FILES[name]), random).encode()))
        else:
            yield Case((name, mutate.raw(random, json.dumps(FILES[name]).encode())))


def read(content: tuple[str, bytes], place: Path, made: Any) -> None:
    """All that is read when a run or a search of this name begins."""
    name, changed = content
    shutil.rmtree(place / "runs", ignore_errors=True)
    config = tiny.config(run__storage=str(place / "runs"))
    folder = RunFolder(config.folder())
    for each, tree in {**FILES, "checkpoints/step-0000006/manifest.json": {}, "tune/tuner.pkl": 0}.items():
        file = Path(folder.root) / each
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree))
    folder.claim(config, folder.state())
    (Path(folder.root) / name).write_bytes(changed)
    config, state = folder.check(config)
    if done := state.finished(config):
        report.already_finished(config, state, done)
    folder.exported(config, 6)
    folder.tracking_run("sqlite:///x", config.run.storage)
    state.trained(config)
    search_folder.progress(folder.root)
    trials = tuple(record.read_all(folder.root).values())
    SearchRecord("test", "eval/loss", "min", "random", "none", 1.0, trials, ("train.lr",)).ranked()
    Baseline.read(f"{folder.root}/baseline.json", IDENTITY, 2)
    records.read(f"{folder.root}/rows.json", RowResults)
