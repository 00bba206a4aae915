"""The GPU kit runs whole on a CPU; on a GPU the same code runs with other sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines import project


def test_the_whole_kit_runs_on_a_cpu(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    code = benchmark("gpu").main(["--size", "tiny", "--device", "cpu", "--lengths", "64", "--json", str(file)])
    found = json.loads(file.read_text())
    checks = found["checks"]
    assert [name for name, check in checks.items() if not check["ok"]] == []
    assert code == 0
    assert checks["start equals the base, bfloat16"]["difference"] == 0.0
    assert "refused" in checks["attention flash_attention_2, float32"]
    assert checks["gradients equal PEFT's, float32"]["difference"] < 1e-4
    assert found["init"]["layers"] == 14
    assert found["init"]["difference"] < 1e-2
    (contest,) = found["training"]
    assert [each["recomputed"] for each in contest["peft"]] == [False, True]
    for each in (*contest["ours"], *contest["peft"]):
        assert each["tokens a second"] > 0
        assert 0 < each["share of the peak"] < 1
    printed = capsys.readouterr().out
    for part in (
        "CPU: peak",
        "attention segments, bfloat16",
        "initialisation: 14 layers",
        "64: PEFT + Trainer, batch 4, recomputed",
    ):
        assert part in printed


def test_a_job_in_a_process_of_its_own_prints_what_it_gives(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = benchmark("gpu")
    assert module.main(["--job", json.dumps({"kind": "card", "device": "cpu", "dtype": "float32"})]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["name"] == "CPU"
    assert found["peak"] > 0
    assert module.card_line(found).splitlines()[1].startswith("CPU: peak ")


def test_the_kit_needs_neither_ray_nor_mlflow_nor_datasets() -> None:
    code = "import sys\nfor name in ('ray', 'mlflow', 'datasets', 'trl'): sys.modules[name] = None\nimport gpu"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
