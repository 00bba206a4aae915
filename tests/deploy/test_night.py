"""One night of a command: retries, a time limit, signals, exit codes, its output, and notifications."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ran import ran
from tests.receiver import Receiver, receiver
from tests.waiting import until

TELLS = "echo"
NIGHT = Path(__file__).parents[2] / "deploy" / "night.py"


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


@pytest.fixture
def config(tmp_path: Path, hook: Receiver) -> Path:
    tree = {"run": {"name": "nightly"}, "model": {"name": "m"}, "data": {"train": ["rows.jsonl"]}}
    (tmp_path / "hook").write_text(hook.url)
    file = tmp_path / "config.yaml"
    told = {"registry": {"model": "support"}, "notify": {"url": f"file:{tmp_path}/hook"}}
    file.write_text(yaml.safe_dump(tree | told))
    return file


def words(config: Path, script: str, *options: str) -> list[str]:
    return [
        sys.executable,
        str(NIGHT),
        "--pause",
        "0",
        *options,
        str(config),
        "--",
        "bash",
        "-c",
        script,
    ]


def night(config: Path, script: str, *options: str) -> tuple[int, list[str]]:
    """Return (exit code, lines of the output)."""
    command = words(config, script, *options)
    done = ran(command, code=None)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_the_output_of_all_nights_stays_in_a_file(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "logs" / "night.log"
    for name in ("monday", "tuesday"):
        assert night(config, f"echo {name}", "--log", str(file)) == (0, [name])
    assert file.read_text() == "monday\ntuesday\n"
    code, lines = night(config, "echo never", "--log", str(config / "night.log"))
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: argument --log: {config}/night.log: ")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_the_command_has_told_itself_is_not_told_again(
    config: Path, hook: Receiver, code: int
) -> None:
    facts = {"sent": "failed"} if code else {}
    assert (
        night(config, f"{TELLS} '{json.dumps(facts)}' >&${{OLORA_OUTCOME%:*}}; exit {code}")[0]
        == code
    )
    assert hook.got == []


def test_what_the_command_prints_decides_nothing(config: Path, hook: Receiver) -> None:
    rows = (
        "notify.url: the event 'failed' was sent",
        "the retraining of m is already running (process 7 on a, since 2026-12-02 02:30:00)",
    )
    for row, code in zip(rows, (1, 75), strict=True):
        assert night(config, f'echo "{row}"; exit {code}', "--tries", "1")[0] == code
    assert hook.events() == ["failed", "not finished"]


def test_the_reason_is_the_commands_own_and_not_the_last_line(config: Path, hook: Receiver) -> None:
    night(config, f"{sys.executable} {NIGHT} nothing; echo an older line; exit 2")
    assert hook.got[0]["reason"].startswith("arguments: expected CONFIG.yaml -- COMMAND")


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        (
            ["olora-ray", "retrain", "--nope"],
            2,
            "argument --nope: unknown; use --dry-run or --help (exit code 2)",
        ),
        (["/none"], 2, "COMMAND /none: No such file or directory; correct the words after --"),
        (["bash", "-c", "echo token=c4n4ry; exit 3"], 3, "token=*** (exit code 3)"),
        (["false"], 1, "exit code 1"),
    ],
)
def test_an_end_that_the_command_has_not_told_is_told_with_its_last_line(
    config: Path, hook: Receiver, command: list[str], code: int, reason: str
) -> None:
    bin = str(Path(sys.executable).parent)
    ran(
        [sys.executable, NIGHT, config, "--", *command],
        code=code,
        env={**os.environ, "PATH": f"{bin}:/usr/bin:/bin"},
    )
    (message,) = hook.got
    assert (message["event"], message["model"]) == ("failed", "support")
    assert message["reason"].endswith(reason)


def test_a_mistake_in_the_config_is_told_to_whom_the_config_names(
    config: Path, hook: Receiver
) -> None:
    config.write_text(config.read_text().replace("data:", "date:"))
    code, lines = night(config, f"{Path(sys.executable).parent}/olora-ray retrain {config}")
    assert code == 2
    assert any("has 2 problems" in line for line in lines)
    assert [(each["event"], each["model"]) for each in hook.got] == [("failed", "support")]


def test_the_output_comes_while_the_command_runs_and_stays_in_its_streams(config: Path) -> None:
    script = "echo out; echo err >&2; read line; echo $line"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words(config, script), text=True, **pipes) as process:
        assert (process.stdout.readline(), process.stderr.readline()) == ("out\n", "err\n")
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "go\n"
        assert process.wait(30) == 0


def test_a_command_that_says_later_runs_again_until_it_is_done(
    config: Path, hook: Receiver, tmp_path: Path
) -> None:
    file = tmp_path / "tries"
    code, lines = night(
        config, f"echo x >>{file}; [ $(wc -l <{file}) -ge 3 ] || exit 75; echo done"
    )
    assert (code, lines[-1], file.read_text()) == (0, "done", "x\n" * 3)
    assert hook.got == []


def test_a_night_that_is_not_finished_after_the_last_try_is_no_success_and_is_told(
    config: Path, hook: Receiver
) -> None:
    code, lines = night(config, "echo away; exit 75", "--tries", "3")
    assert (code, lines.count("away")) == (75, 3)
    assert "NOT FINISHED: away (exit code 75)" in lines[-2]
    assert lines[-1].endswith("notify.url: the event 'not finished' was sent")
    (message,) = hook.got
    assert (message["event"], message["model"], message["run"]) == (
        "not finished",
        "support",
        "nightly",
    )
    assert message["text"] == "support: not finished: away (exit code 75)"


def test_at_the_limit_the_command_has_time_for_its_checkpoint(config: Path, hook: Receiver) -> None:
    script = "trap 'echo checkpoint; exit 143' TERM; echo began; sleep 60 >/dev/null 2>&1 & wait"
    code, lines = night(config, script, "--hours", "0.001")
    assert (code, lines[:2]) == (75, ["began", "checkpoint"])
    assert (
        hook.got[0]["reason"]
        == "stopped after 0.001 hours, the limit of a night; last line: checkpoint"
    )


def test_a_command_that_does_not_stop_is_killed_with_its_processes(
    config: Path, hook: Receiver, tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    code, _ = night(
        config,
        f"trap '' TERM; sleep 600 & echo $! >{inner}; wait",
        "--hours",
        "0.001",
        "--grace",
        "0.1",
    )
    assert code == 75
    process = Path("/proc") / inner.read_text().strip() / "cmdline"
    until(lambda: not process.exists() or not process.read_bytes())
    assert hook.events() == ["not finished"]


def test_a_command_that_is_killed_is_not_finished(config, hook):
    assert night(config, "kill -9 $$")[0] == 137
    assert hook.got[0]["reason"] == "killed by SIGKILL"


@pytest.mark.parametrize(
    ("busy", "number"),
    [
        (
            "trap 'echo checkpoint; exit 99' TERM INT; echo began; sleep 60 >/dev/null 2>&1 & wait",
            signal.SIGTERM,
        ),
        ("exit 75", signal.SIGINT),
    ],
)
def test_a_signal_reaches_the_command_and_ends_the_pause(
    config: Path, hook: Receiver, busy: str, number: signal.Signals
) -> None:
    with subprocess.Popen(
        words(config, busy, "--pause", "60"), stdout=subprocess.PIPE, text=True
    ) as process:
        lines = [process.stdout.readline()]  # that it has begun, or waits
        process.send_signal(number)
        lines += process.stdout.read().splitlines()
        assert process.wait(30) == (128 + number if busy == "exit 75" else 99)
    assert ("checkpoint" in lines) is (busy != "exit 75")
    assert hook.got[0]["reason"].startswith(f"stopped by {number.name}")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["c.yaml", "--"], "arguments: expected CONFIG.yaml -- COMMAND"),
        (
            ["--hours", "nan", "c.yaml", "--", "true"],
            "argument --hours: 'nan'; expected a number from 0 to",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], problem: str) -> None:
    done = ran([sys.executable, NIGHT, *arguments], code=2)
    assert done.stderr.startswith(f"error: {problem}")
    assert len(done.stderr.splitlines()) == 1
