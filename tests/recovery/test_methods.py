"""Methods whose factors come of the training data, and other families: interrupted, they end as an untouched run."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.families import zoo
from tests.families.variants import ALL
from tests.pipelines import project
from tests.recovery import processes, runs, table
from tests.recovery.runs import Fault, Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CASES: dict[str, tuple[str, dict[str, Any], Fault]] = {
    "eva, middle step": ("llama", {"method": "eva", "init_tokens": 120}, Fault("step", step=5, rank=1)),
    "eva, initialisation": ("llama", {"method": "eva", "init_tokens": 120}, Fault("initialise", rank=1)),
    "lora_ga on Gemma 3, middle step": (
        "gemma3_text",
        {"method": "lora_ga", "init_tokens": 120},
        Fault("step", step=5, rank=1),
    ),
    "milora on Qwen 3, checkpoint": ("qwen3", {"method": "milora"}, Fault("checkpoint", step=6)),
}
"""Family, adapter, and where everything is killed at once."""


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_that_is_killed_ends_as_an_untouched_one(case: str, tmp_path: Path, rows: list[table.Row]) -> None:
    family, adapter, fault = CASES[case]
    corpus = project_of(family, tmp_path / "project")
    changes: dict[str, Any] = {"adapter": {"rank": 4, "alpha": 8, **adapter}}
    for name in ("clean", "killed"):
        (tmp_path / name).mkdir()
    clean = runs.run_clean(corpus, tmp_path / "clean", **changes)
    row = table.Row(f"kill everything, {case}")
    rows.append(row)
    with processes.scratch() as scratch:
        run = Run(runs.written(corpus, tmp_path / "killed", **changes), scratch, fault)
        run.start()
        run.wait_for_fault()
        run.kill_everything()
        assert run.wait() == -9, run.tail()
        assert run.attempt() == 0, run.tail()
        row.again, row.lost = run.again(), run.seconds - clean.seconds
        end = runs.end_state(tmp_path / "killed")
        row.same_bytes = end.adapter == clean.end.adapter
        assert runs.differences(end, clean.end) == [], run.tail()
    row.recovered = True


def project_of(family: str, folder: Path) -> Path:
    """The tiny project, with a model of another family."""
    project.make_tiny(folder)
    if family != "llama":
        shutil.rmtree(folder / "model")
        zoo.build(ALL[family], folder / "model")
    return folder
