"""A small project that is retrained again and again through the entry script, as a scheduler does."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from olora_ray.tracking.aliases import Aliases
from tests import mlflow_database
from tests.pipelines import project
from tests.ran import ran
from tests.recovery.processes import kill_all

MARKS = ".?!,"
"""Written before the questions of training rows. Held-out rows have '-' there, so that no row is in both sets."""
ANSWERS = {"one": "1111", "two": "2222", "three": "3333"}


class Nightly:
    """A folder with a config, data that grow by files, and a registry."""

    def __init__(self, folder: Path, model: Path, **changes: Any) -> None:
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir()
        self.add("0-first", ["one", "two"], 40)
        write(
            folder / "heldout.jsonl",
            [(f"-{word}", ANSWERS[word]) for word in ANSWERS for _ in range(8)],
        )  # gate.min_rows
        tree = project.settings(folder, model)
        tree["data"] = {
            "train": [{"path": str(self.data)}],
            "eval": [{"path": str(folder / "heldout.jsonl")}],
        }
        tree["data"]["max_length"] = 48
        tree["train"] |= {
            "steps": 12,
            "eval_every": 12,
            "checkpoint_every": 4,
            "global_batch": 4,
            "lr": 2e-2,
        }
        tree["cluster"] |= {"workers": 1, "cpus_per_worker": 1}
        tree["evaluation"] = {"scorer": "macro_f1", "rows": 6, "samples": 0, "max_new_tokens": 6}
        tree["registry"] = {"model": "nightly"}
        tree["gate"] = {
            "guard": None,
            **changes.pop("gate", {}),
        }  # 800 rows on a tiny model take seconds
        self.config = project.write_config(folder, tree | changes)
        mlflow_database.place(folder / "runs")
        self.aliases = Aliases(f"sqlite:///{folder}/runs/mlflow.db", "nightly")

    def add(self, name: str, words: Sequence[str], rows: int, shuffled: bool = False) -> None:
        """Add one file of rows; in a `shuffled` file the rows have each other's answers."""
        asked = [words[number % len(words)] for number in range(rows)]
        random.Random(1).shuffle(asked)  # so that every second row has all the words
        answers = [ANSWERS[word] for word in asked]
        if shuffled:
            random.Random(0).shuffle(answers)
        marked = [f"{MARKS[number % len(MARKS)]}{word}" for number, word in enumerate(asked)]
        write(self.data / f"{name}.jsonl", list(zip(marked, answers, strict=True)))

    def command(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            str(project.ROOT / "pipelines" / "retrain.py"),
            str(self.config),
            *arguments,
        ]

    def environment(self) -> dict[str, str]:
        (self.folder / "t").mkdir(exist_ok=True)
        own = {
            "TMPDIR": str(self.folder / "t"),
            "RAY_TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
        }
        return {
            k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        } | own

    def call(self, *arguments: str, code: int = 0) -> str:
        """Run one night; return its output."""
        done = ran(self.command(*arguments), code=code, env=self.environment())
        return done.stdout + done.stderr

    def call_until(self, line: str) -> str:
        """Run one night, kill everything as soon as `line` is printed, and return the output."""
        seen = ""
        with subprocess.Popen(
            self.command(),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            for text in process.stdout:
                seen += text
                if line in text:
                    kill_all(self.folder)
                    break
            process.wait(timeout=60)
        assert line in seen, seen
        assert process.returncode < 0
        return seen

    def decisions(self) -> list[Run]:
        """Return MLflow's runs of decisions, the oldest first."""
        client = MlflowClient(self.aliases.uri)
        experiment = client.get_experiment_by_name("olora").experiment_id
        found = client.search_runs(
            [experiment], "tags.`olora.kind` = 'retraining'", order_by=["attributes.start_time ASC"]
        )
        return list(found)

    def made(self) -> int:
        """Return the number of versions."""
        return len(self.aliases.versions())


def write(file: Path, rows: list[tuple[str, str]]) -> None:
    with file.open("w") as out:
        for asked, answer in rows:
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": chat}) + "\n")
