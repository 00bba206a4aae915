"""One night of a command: retries, a time limit, signals, exit codes, and notifications."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.receiver import Receiver, receiver
from tests.waiting import until

NIGHT = Path(__file__).parents[2] / "deploy" / "night.py"


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


@pytest.fixture
def config(tmp_path: Path, hook: Receiver) -> Path:
    tree = {"run": {"name": "nightly"}, "model": {"name": "m"}, "data": {"train": ["rows.jsonl"]}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree | {"registry": {"model": "support"}, "notify": {"url": hook.url}}))
    return file


def words(config: Path, script: str, *options: str) -> list[str]:
    return [sys.executable, str(NIGHT), "--pause", "0", *options, str(config), "--", "bash", "-c", script]


def night(config: Path, script: str, *options: str) -> tuple[int, list[str]]:
    """Return (exit code, lines of the output)."""
    command = words(config, script, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_code_of_which_the_command_tells_itself_ends_the_night(config: Path, hook: Receiver, code: int) -> None:
    assert night(config, f"echo once; exit {code}") == (code, ["once"])
    assert hook.got == []


def test_a_command_that_says_later_runs_again_until_it_is_done(config: Path, hook: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "tries"
    code, lines = night(config, f"echo x >>{file}; [ $(wc -l <{file}) -ge 3 ] || exit 75; echo done")
    assert (code, lines[-1], file.read_text()) == (0, "done", "x\n" * 3)
    assert hook.got == []


def test_a_night_that_is_not_finished_after_the_last_try_is_no_success_and_is_told(
    config: Path, hook: Receiver
) -> None:
    code, lines = night(config, "echo again; exit 75", "--tries", "3")
    assert (code, lines.count("again")) == (75, 3)
    assert "NOT FINISHED: exit code 75" in lines[-1]
    (message,) = hook.got
    assert (message["event"], message["model"], message["run"]) == ("not finished", "support", "nightly")
    assert message["text"] == "support: not finished: exit code 75"


def test_the_pause_does_not_outlast_the_night(config: Path, hook: Receiver) -> None:
    assert night(config, "exit 75", "--pause", "4000", "--hours", "1")[0] == 75
    assert hook.events() == ["not finished"]


def test_at_the_limit_the_command_has_time_for_its_checkpoint(config: Path, hook: Receiver) -> None:
    script = "trap 'echo checkpoint; exit 143' TERM; echo began; sleep 60 >/dev/null 2>&1 & wait"
    code, lines = night(config, script, "--hours", "0.001")
    assert (code, lines[:2]) == (75, ["began", "checkpoint"])
    assert hook.got[0]["reason"] == "stopped after 0.001 hours, the limit of a night"


def test_a_command_that_does_not_stop_is_killed_with_its_processes(
    config: Path, hook: Receiver, tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    code, _ = night(config, f"trap '' TERM; sleep 600 & echo $! >{inner}; wait", "--hours", "0.001", "--grace", "0.1")
    assert code == 75
    process = Path("/proc") / inner.read_text().strip() / "cmdline"
    until(lambda: not process.exists() or not process.read_bytes())
    assert hook.events() == ["not finished"]


def test_a_command_that_is_killed_is_not_finished(config: Path, hook: Receiver) -> None:
    assert night(config, "kill -9 $$")[0] == 137
    assert hook.got[0]["reason"] == "killed by SIGKILL"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "busy", ["trap 'echo checkpoint; exit 99' TERM INT; echo began; sleep 60 >/dev/null 2>&1 & wait", "exit 75"]
)
def test_a_signal_reaches_the_command_and_ends_the_pause(
    config: Path, hook: Receiver, busy: str, number: signal.Signals
) -> None:
    with subprocess.Popen(words(config, busy, "--pause", "60"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = [process.stdout.readline()]  # that it has begun, or waits
        process.send_signal(number)
        lines += process.stdout.read().splitlines()
        assert process.wait(30) == (128 + number if busy == "exit 75" else 99)
    assert ("checkpoint" in lines) is (busy != "exit 75")
    assert hook.got[0]["reason"] == f"stopped by {number.name}"


def test_without_a_config_that_can_be_loaded_the_command_runs_and_its_code_counts(tmp_path: Path) -> None:
    code, lines = night(tmp_path / "none.yaml", "echo ran; exit 75", "--tries", "1")
    assert (code, lines[1]) == (75, "ran")
    assert lines[0].endswith(f"config file {tmp_path}/none.yaml: No such file or directory")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["c.yaml"], "arguments: expected CONFIG.yaml -- COMMAND"),
        (["--", "true"], "arguments: expected CONFIG.yaml -- COMMAND"),
        (["c.yaml", "--"], "arguments: expected CONFIG.yaml -- COMMAND"),
        (["--hours", "all", "c.yaml", "--", "true"], "argument --hours: could not convert string to float: 'all'"),
        (["--hour", "1", "c.yaml", "--", "true"], "argument --hour: unknown; did you mean --hours?"),
        (["c.yaml", "--", "/none"], "COMMAND /none: No such file or directory; correct the words after --"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], problem: str) -> None:
    done = subprocess.run([sys.executable, NIGHT, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {problem}")
    assert len(done.stderr.splitlines()) == 1
