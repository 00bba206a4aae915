"""Tries the versions that pyproject.toml allows, and writes docs/generated/versions.md (make versions).

    .venv/bin/python tools/try_versions.py                  every cell
    .venv/bin/python tools/try_versions.py ray-2.58 ...     these cells

A cell is an environment of its own, build/versions/CELL. A run is made in it, killed and resumed, a search is made, and
the registered version is loaded back (PROOF). In a cell server-VERSION the environment has MLflow alone, and this
project's own environment uses its server (BESIDE_A_SERVER).
"""

import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from olora_ray.common.tried import TRIED

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "generated" / "versions.md"
RESULTS = PAGE.with_suffix(".json")
CELLS: dict[str, tuple[str, ...]] = {
    "newest": (),
    "ray-2.58": ("ray[default,data,train,tune]==2.58.*",),
    "ray-2.59": ("ray[default,data,train,tune]==2.59.*",),
    "mlflow-3.12": ("mlflow==3.12.*",),
    "mlflow-3.15": ("mlflow==3.15.*",),
    "transformers-5.5": ("transformers==5.5.*",),
    "python-3.12": (),
    "python-3.13": (),
    # With SQLAlchemy 2.1, which is younger, this server does not start.
    "server-3.5": ("mlflow[auth]==3.5.*", "sqlalchemy<2.1"),
    "server-3.12": ("mlflow[auth]==3.12.*",),
}
PROOF = (
    "tests/pipelines/test_finetune.py::test_a_run_leaves_what_the_readme_promises",
    "tests/pipelines/test_finetune.py::test_ray_has_the_runs_result",
    "tests/pipelines/test_finetune.py::test_mlflow_has_one_run_with_an_unbroken_series",
    "tests/pipelines/test_finetune.py::test_the_registered_model_generates",
    "tests/pipelines/test_finetune.py::test_a_run_that_is_killed_ends_as_if_nothing_had_happened_with_fewer_workers_too",
    "tests/pipelines/test_sweep.py::test_a_search_leaves_what_the_docs_promise",
    "tests/pipelines/test_sweep.py::test_mlflow_has_a_parent_with_a_child_per_trial_and_the_best_is_registered",
    "tests/cluster/test_ray_internals.py",
)
BESIDE_A_SERVER = ("tests/pipelines/test_mlflow_away.py", "tests/pipeline/test_logged_model.py")
SHOWN = ("ray", "mlflow", "transformers", "torch", "datasets", "peft")
INTRO = """\
# Versions

<!-- Written by `make versions`: change the words in tools/try_versions.py. -->

Each row is an environment with what pip chose for pyproject.toml and the cell's own version. In it a run with two
workers ends with a registered version, which is loaded back; a run is killed and resumed to the same bytes; a search
finds and registers its best trial. In a row `server` the newest environment uses an MLflow server of that version.

The log names a version that was not tried; tried were {tried}. A stand-in took SGLang's place.

"""


def main(words: list[str]) -> None:
    cells = words or [*CELLS]
    if unknown := set(cells) - CELLS.keys():
        sys.exit(f"no cell {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    for cell in cells:
        found = {**json.loads(RESULTS.read_text() if RESULTS.exists() else "{}"), cell: tried(cell)}
        RESULTS.write_text(
            json.dumps({name: found[name] for name in CELLS if name in found}, indent=1) + "\n"
        )
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results))
    sys.exit(any(results[cell]["result"] != "passed" for cell in cells))


def tried(cell: str) -> dict[str, str]:
    began, python = time.monotonic(), ROOT / "build" / "versions" / cell / "bin" / "python"
    server = cell.startswith("server-")
    if not python.exists():
        print(f"{cell}: installing", flush=True)
        base = cell.removeprefix("python-") if cell.startswith("python-") else "3.11"
        subprocess.run([f"python{base}", "-m", "venv", str(python.parents[1])], check=True)
        what = CELLS[cell] if server else ("-e", ".[gguf,dev]", *CELLS[cell])
        subprocess.run([str(python), "-m", "pip", "install", "-q", *what], cwd=ROOT, check=True)
    print(f"{cell}: testing", flush=True)
    tests, runner = (BESIDE_A_SERVER, sys.executable) if server else (PROOF, str(python))
    variables = {**os.environ, **({"OLORA_TEST_MLFLOW": str(python)} if server else {})}
    done = subprocess.run(
        [runner, "-m", "pytest", "-q", *tests],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    (python.parents[1] / "tests.txt").write_text(done.stdout + done.stderr)
    last = next(
        (line for line in reversed(done.stdout.splitlines()) if " in " in line), "no result"
    )
    print(f"{cell}: {last} ({time.monotonic() - began:.0f} s with the installation)", flush=True)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?(\w+)(?:\[| - |$)", done.stdout, re.MULTILINE)
    return {
        "versions": versions(python),
        "result": "passed" if done.returncode == 0 else f"failed: {', '.join(failed) or last}",
        "tests": re.sub(r"(, \d+ warnings?)?( in .*)?$", "", last.strip("= ")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def versions(python: Path) -> str:
    code = f"""if True:
        import platform
        from importlib.metadata import distributions
        have = {{each.name.lower(): each.version for each in distributions()}}
        print("Python", platform.python_version(), *(f", {{name}} {{have[name]}}" for name in {SHOWN} if name in have))
        """
    shown = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    return shown.replace(" ,", ",")


def page(results: dict[str, dict[str, str]]) -> str:
    rows = [
        f"| {cell} | {each['versions']} | {each['result']} | {each['tests']}, {each['date']} |"
        for cell, each in results.items()
    ]
    shown = [f"{program} {oldest} to {newest}" for program, (oldest, newest) in TRIED.items()]
    return (
        INTRO.format(tried=", ".join(shown))
        + "\n".join(["| cell | versions | result | tests |", "|---|---|---|---|", *rows])
        + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
