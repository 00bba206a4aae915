"""What the nights of a cluster are played with: a config, and files of rows that arrive between them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pipelines import project

Row = dict[str, Any]
NAME = "support"


@dataclass(frozen=True)
class Scenario:
    """A config in a folder, and files of rows."""

    config: Path
    data: Path
    """The folder that the config trains on, whatever files it has."""
    first: list[Row]
    more: list[Row]
    """For a second file."""
    poison: list[Row]
    """Instead of them, by mistake: rows with each other's answers."""

    def arrive(self, name: str, rows: Sequence[Row]) -> Path:
        """A file of rows, new or again."""
        return write(self.data / f"{name}.jsonl", rows)


def quick(folder: Path) -> Scenario:
    """A tiny random Llama that learns which number belongs to which word; it sees the third word later."""
    model = project.make_model(folder / "tiny")
    answers = {"one": "1111", "two": "2222", "three": "3333"}
    # Held-out rows are no training rows: another mark stands before the word.
    chats = {
        word: [chat(f"{mark}{word}", answer) for mark in ".?!,"] for word, answer in answers.items()
    }
    held_out = [chat(f"-{word}", answer) for word, answer in answers.items()]
    every = [row for rows in chats.values() for row in rows]
    config = project.settings(folder, model)
    config["run"] |= {"name": NAME, "storage": str(folder / "storage")}
    config["data"] = {"max_length": 48}
    config["train"] |= {
        "steps": 60,
        "eval_every": 60,
        "checkpoint_every": 30,
        "log_every": 30,
        "lr": 2e-2,
    }
    config["cluster"] = {"workers": 1, "cpus_per_worker": 1}
    config["evaluation"] = {"scorer": "exact_match", "rows": 6, "samples": 1, "max_new_tokens": 6}
    config["gate"] = {
        "metric": "eval/loss",
        "and": [{"metric": "eval/exact_match", "at_least": 0.3}],
        "guard": None,
    }
    first, more, poison = (
        [*chats["one"], *chats["two"]] * 5,
        chats["three"] * 10,
        poisoned(every * 3),
    )
    return Scenario(*_laid_out(folder, config, held_out * 8), first, more, poison)


def _laid_out(folder: Path, config: dict[str, Any], held_out: list[Row]) -> tuple[Path, Path]:
    """Complete the config and write it and the held-out rows; (config, folder for data)."""
    data = folder / "data"
    data.mkdir()
    config["data"] |= {
        "train": [{"path": str(data), "format": "messages"}],
        "eval": [{"path": str(write(folder / "heldout.jsonl", held_out)), "format": "messages"}],
    }
    config["registry"] = {"model": NAME}
    return project.write_config(folder, config, "support.yaml"), data


def poisoned(rows: Sequence[Row]) -> list[Row]:
    """The rows with each other's answers, none with one that is much like its own."""
    rows = sorted(rows, key=lambda row: str(row["messages"][-1]["content"]))
    answers = [row["messages"][-1] for row in rows]
    half = len(rows) // 2
    others = answers[half:] + answers[:half]
    return [
        {"messages": [*row["messages"][:-1], answer]}
        for row, answer in zip(rows, others, strict=True)
    ]


def chat(asked: str, answer: str) -> Row:
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    }


def write(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
