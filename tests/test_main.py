"""`olora-ray`: the commands that an installed wheel gives."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def olora_ray(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "olora_ray", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment
    )


COMMANDS = [
    "quickstart",
    "init",
    "finetune",
    "chat",
    "look",
    "runs",
    "evaluate",
    "sweep",
    "compare",
    "registry",
    "retrain",
]
COMMANDS += ["nights", "export", "push", "prune", "follow", "feedback"]


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_one_screen_says_what_each_command_is_for(words: tuple[str, ...]) -> None:
    done = olora_ray(*words)
    assert (done.returncode, done.stderr) == (0, "")
    listed = [
        line.split()[0]
        for line in done.stdout.splitlines()
        if line.startswith("  ") and line[2] != " "
    ]
    assert listed == COMMANDS
    assert "\n    olora-ray COMMAND [ARGUMENTS ...]\n" in done.stdout
    assert len(done.stdout.splitlines()) <= 24
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--version"], 0, r"olora-ray \d+\.\d+\.\d+"),
        (["finetun"], 2, r"error: argument finetun: unknown command; did you mean finetune\?"),
        (["merge"], 2, "error: argument merge: .*olora-ray export .*"),
        (["x"], 2, f"error: argument x: unknown command; use one of {', '.join(COMMANDS)}"),
        (
            ["finetune", "nowhere.yaml"],
            2,
            "error: config file nowhere.yaml: No such file or directory",
        ),
        (
            ["finetune"],
            2,
            r"error: argument CONFIG\.yaml: missing; `olora-ray init DATA` writes one .*",
        ),
        (
            ["init", "nothing.jsonl"],
            2,
            r"error: data\.train\.0\.path: /.*nothing\.jsonl: no such file .*",
        ),
        (["evaluate", "--help"], 0, "Evaluate a model, .*"),
        (["chat", "nothing"], 2, "error: run nothing: no such run folder; .*"),
        (
            ["registry", "promote", "m"],
            2,
            r"error: usage: olora-ray registry promote NAME VERSION .*",
        ),
    ],
)
def test_help_and_mistakes_come_before_anything_heavy_is_imported(
    words: list[str], code: int, said: str
) -> None:
    program = (
        "import sys; from olora_ray.__main__ import main\n"
        "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT
    )
    *lines, imported = (done.stdout + done.stderr).splitlines()
    assert done.returncode == code
    assert re.fullmatch(said, lines[0])
    assert len(lines) == 1 or code == 0
    assert not {"torch", "ray", "mlflow", "transformers"} & set(imported.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_help(command: str, tmp_path: Path) -> None:
    done = olora_ray(command, "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"    olora-ray {command} " in done.stdout
    usage = done.stdout.partition("\nFields")[0]
    assert max(map(len, usage.splitlines())) <= 80
    assert "python pipelines" not in done.stdout


def test_the_help_of_retrain_has_the_sections_that_set_its_conditions() -> None:
    shown = olora_ray("retrain", "--help").stdout
    assert all(f"\n{section}:\n" in shown for section in ("registry", "retrain", "gate", "notify"))
    assert "\ntrain:\n" not in shown
