"""What a person meets at the command line: arguments, one-line errors, exit codes."""

import contextlib
import os
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from olora_ray.common.errors import Problems, UserError
from olora_ray.config import command_line
from olora_ray.config.command_line import parse, read_arguments
from olora_ray.config.schema import Config
from tests.refused import refused
from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]
CONFIG = "run: {name: a, storage: runs}\nmodel: {name: m}\ndata: {train: [{path: a.jsonl}]}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def start(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=environment,
    )


def test_a_glob_of_a_named_format_may_have_no_file_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "rows.jsonl").write_text("{}\n")
    globs = {name: f"{{path: '*/{name}.jsonl', format: messages}}" for name in ("rows", "others")}

    def used(*sources: str) -> list[str]:
        changes = [f"data.train=[{', '.join(sources)}]"]
        (tmp_path / "run.yaml").write_text(CONFIG)
        read, _ = read_arguments(["run.yaml", *changes], "usage")
        return [str(Path(source.path).relative_to(tmp_path)) for source in read.data.train]

    assert used(globs["others"], globs["rows"]) == ["*/rows.jsonl"]
    # What a typing error may be stays, so that the run refuses it.
    assert used(globs["others"]) == ["*/others.jsonl"]
    for typed in ("{path: '*/others.jsonl'}", "{path: others.jsonl, format: messages}"):
        assert len(used(globs["rows"], typed)) == 2


def test_file_assignments_and_flag_come_in_any_order(config: Path) -> None:
    words = ["adapter.rank=3", "--dry-run", str(config), "train.lr=1e-4"]
    for argv in (words, words[::-1]):
        read, flags = read_arguments(argv, "usage")
        assert (read.adapter.rank, read.train.lr, flags) == (3, 1e-4, {"--dry-run"})


def test_relative_paths_are_seen_from_where_the_command_was_given(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    changes = ["data.chat_template=a.jinja", "registry.verify=key.pub"]
    read, _ = read_arguments([str(config), *changes], "usage")
    assert read.data.chat_template == str(tmp_path / "a.jinja")
    assert read.registry.verify == str(tmp_path / "key.pub")
    assert (
        read_arguments([str(config), "data.chat_template=plain"], "usage")[0].data.chat_template
        == "plain"
    )
    assert read.run.storage == str(tmp_path / "runs")
    assert read.data.train[0].path == str(tmp_path / "a.jsonl")
    assert read.model.name == str(tmp_path / "m")
    assert read.folder() == str(tmp_path / "runs" / "a")


def test_the_home_directory_may_be_written_as_a_tilde(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "m").mkdir(parents=True)
    words = ["model.name=~/models/m", "data.train.0.path=~/a.jsonl"]
    read, _ = read_arguments([str(config), *words], "usage")
    assert read.model.name == str(tmp_path / "models" / "m")
    assert read.data.train[0].path == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("field", ["run.storage", "data.train.0.path", "train.start"])
def test_a_home_folder_that_there_is_not_is_one_line(config: Path, field: str) -> None:
    with pytest.raises(UserError) as caught:
        read_arguments([str(config), f"{field}=~nobody-here/x"], "usage")
    assert str(caught.value).startswith(
        f"{field}: ~nobody-here/x: '~nobody-here' has no home folder; "
    )


def test_a_place_at_which_nobody_can_look_is_one_line(config: Path) -> None:
    with pytest.raises(UserError):
        read_arguments([str(config), f"model.name={'x' * 300}"], "usage")


@pytest.mark.parametrize(
    "place", ["s3://bucket/data", "gs://bucket/data", "hf://org/name?split=train"]
)
def test_addresses_stay_as_they_are(config: Path, place: str) -> None:
    storage = place.partition("?")[0]
    read, _ = read_arguments(
        [str(config), f"data.train.0.path={place}", f"run.storage={storage}"], "usage"
    )
    assert read.data.train[0].path == place
    assert read.run.storage == storage


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dryrun"], "argument --dryrun: unknown; did you mean --dry-run?"),
        (["--show-config"], "argument --show-config: works only with --dry-run"),
        (["--dry-run=yes"], "argument --dry-run=yes: --dry-run takes no value"),
        (["adapter.rnk=3"], "did you mean adapter.rank?"),
        (
            ["learning_rate=3"],
            "argument 'learning_rate=3': expected section.field=value; use train.lr",
        ),
        (["--lr", "1e-4"], "argument --lr: set fields without dashes: train.lr=1e-4"),
        (["--warmup_steps=9"], "argument --warmup_steps=9: use train.warmup, a share of the steps"),
        (
            ["tracking.wandb_project=a"],
            "runs are tracked in MLflow: set tracking.uri and tracking.experiment",
        ),
    ],
)
def test_an_argument_that_is_not_understood_is_named(
    config: Path, argv: list[str], expected: str
) -> None:
    with refused(expected):
        read_arguments([str(config), *argv], "usage")


@pytest.mark.parametrize("rest", [(), ("--now",)])
def test_an_option_without_its_value_is_named(rest: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        parse(["--out", *rest], "usage", flags=["--now"], options=["--out"])


def test_no_secret_is_repeated() -> None:
    with pytest.raises(UserError) as caught:
        parse(["--trackinguri=http://me:hidden@host"], "usage", options=["--tracking-uri"])
    assert (
        str(caught.value)
        == "argument --trackinguri=http://me:***@host: unknown; did you mean --tracking-uri?"
    )


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_usage_and_fields_and_ends_well(
    config: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_arguments([str(config), flag, "--nonsense"], "how to use it")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("how to use it\n")
    assert "  rank " in printed
    assert "  rank_stabilized " not in printed
    assert len(printed.splitlines()) < 50


def test_a_terminal_gets_fields_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "34")
    with contextlib.redirect_stdout(Terminal()) as screen, pytest.raises(SystemExit):
        parse(["--help", "all"], "usage", fields=Config)
    fields = screen.getvalue().split("\n\nFields", 1)[1]
    assert max(map(len, fields.splitlines())) <= 34


def script(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(
        f"from olora_ray.config import command_line as command\nfrom olora_ray.common.errors import UserError\n"
        f"def main(argv):\n    print('begun')\n    {body}\ncommand.run(main)\n"
    )
    return start(str(path))


def test_only_the_problems_of_a_list_are_lines(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        r"from olora_ray.common.errors import Problems; raise Problems('x', 'a:\n  b', 'c')",
    )
    assert done.stderr == "error: x:\n  a: b\n  c\n"
    error = pickle.loads(pickle.dumps(Problems("x", "a", "b")))  # as Ray sends it
    assert (str(error), error.lines) == ("x: a; b", ("x:", "a", "b"))


def test_the_error_is_the_last_line_when_both_streams_meet(tmp_path: Path) -> None:
    done = script(tmp_path, "import os; os.dup2(1, 2); raise UserError('broken')")
    assert done.stdout.splitlines() == ["begun", "error: broken"]


def test_characters_that_the_locale_does_not_have_are_written_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer with a sign of its own, or a file whose name is not UTF-8, ended a finished run with a traceback."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    body = r"import logging; print('caf\u00e9'); logging.getLogger('olora_ray').info('%s', '\udce9.jsonl')"
    done = script(tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")
    begun, printed, logged = done.stdout.splitlines()
    assert (begun, printed) == ("begun", r"caf\xe9")
    assert logged.endswith(r" \udce9.jsonl")


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (
            "raise KeyboardInterrupt",
            130,
            "stopped (Ctrl+C); to resume a run or a search, run the same command again\n",
        ),
        (
            "from olora_ray.common.errors import TryAgain; raise TryAgain('away')",
            75,
            "error: away\n",
        ),
        (
            "from olora_ray.common.errors import Stopped; raise Stopped('stopped after 3', 143)",
            143,
            "stopped after 3\n",
        ),
        (r"raise UserError('data.train:\n  broken')", 2, "error: data.train: broken\n"),
        ("pass", 0, ""),
    ],
)
def test_each_way_to_end_has_its_exit_code(body: str, code: int, told: str, tmp_path: Path) -> None:
    done = script(tmp_path, body)
    assert (done.returncode, done.stdout, done.stderr) == (code, "begun\n", told)


def test_a_cluster_with_an_old_ray_is_refused_in_one_line(tmp_path: Path) -> None:
    """Ray jobs bring the project to nodes whose packages nobody has compared with pyproject.toml."""
    (tmp_path / "ray-2.57.1.dist-info").mkdir()
    (tmp_path / "ray-2.57.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ray\nVersion: 2.57.1\n"
    )
    done = subprocess.run(
        [sys.executable, "pipelines/finetune.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: ray 2.57.1 is too old: ray 2.58 or newer is needed, on all nodes\n"
    )


def test_the_oldest_versions_are_those_of_the_project() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, oldest in command_line.OLDEST.items():
        assert any(
            re.match(rf"{package}(\[.*\])?>={'.'.join(map(str, oldest))}(,|$)", line)
            for line in named
        )
