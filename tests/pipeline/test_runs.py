"""The table of runs says what a storage has, also where something in it is damaged."""

import contextlib
from pathlib import Path

import pytest

from olora_ray.common import storage
from olora_ray.config.decided import Decision
from olora_ray.pipeline import runs
from olora_ray.pipeline.run import only_driver
from olora_ray.pipeline.run_folder import RunFolder
from tests import tiny
from tests.refused import refused
from tests.terminal import Terminal

RESULT = {
    "steps": 6,
    "metrics": {"eval/loss": 0.5},
    "eval_loss_before": 1.25,
    "registered": {"model": "m", "version": 3},
}

SCORES = {"before": {"strict": 0.0}, "after": {"easy": 0.75, "strict": 0.25}}


def made(root: str, name: str, step: int = 4, **changes: object) -> RunFolder:
    """A run that has trained for a while."""
    folder = tiny.claimed(
        tiny.config(run__name=name, run__storage=root, **{"train__steps": 6, **changes})
    )
    storage.write_text(storage.join(folder.checkpoints, f"step-{step:07d}", "manifest.json"), "{}")
    return folder


@pytest.mark.parametrize("place", ["tmp_path", "bucket"])
def test_every_folder_of_ours_has_a_line(place: str, request: pytest.FixtureRequest) -> None:
    root = str(request.getfixturevalue(place))
    for other in (
        "tokens/ab/manifest.json",
        "locks/runs/x.json",
        ".hidden/config.yaml",
        "own/notes.txt",
        "mlflow.db",
    ):
        storage.write_text(storage.join(root, other), "{}")
    storage.write_text(storage.join(root, "found/search.json"), "{}")
    storage.write_text(storage.join(root, "found/best.yaml"), "")
    storage.write_text(storage.join(root, "x-compare/compare.json"), "{}")
    made(
        root, "done", 6, data__train=["/rows/a.jsonl", "b.jsonl"], model__name="org/base"
    ).write_result({**RESULT, "scores": SCORES})
    made(root, "early", train__steps=None).write_result(
        {
            **RESULT,
            "stopped_early": True,
            "registered": None,
            "metrics": {"eval/loss": 0.5, "eval/pairs/preferred": 0.8},
        }
    )
    made(root, "longer", 6).write_result(RESULT)
    made(root, "longer", 8, train__steps=12)
    made(root, "night-1", registry__alias="challenger", registry__model="m")
    for file, text in (("config.yaml", "run: {"), ("result.json", "{"), ("result.json", "[1]")):
        folder = made(root, f"bad-{len(text)}")
        storage.write_text(storage.join(folder.root, file), text)
    storage.remove(made(root, "bad").settings)
    with only_driver(made(root, "now").state().config):
        rows = runs.listed(root)
    when = runs.HEAD.index("changed")
    cells = {row[0]: " | ".join(row[1:when] + row[when + 1 :]) for row in rows}
    losses = "1.2500 > 0.5000"
    assert cells == {
        "done": f"finished | {losses} | 0.250 strict | m/3 | 6/6 | a.jsonl +1 | org/base",
        "early": f"finished early | {losses} | 0.80 preferred | - | 6 (1 epochs) | unused.jsonl | unused",
        "longer": f"interrupted | {losses} | - | m/3 | 8/12 | unused.jsonl | unused",
        "found": "search, finished | - | - | - | - | - | -",
        "x-compare": "comparison, interrupted | - | - | - | - | - | -",
        "night-1": "retraining, interrupted | - > - | - | - | 4/6 | unused.jsonl | unused",
        "now": "running | - > - | - | - | 4/6 | unused.jsonl | unused",
        "bad": "damaged: config.yaml | - | - | - | - | - | -",
        "bad-6": "damaged: config.yaml | - | - | - | - | - | -",
        "bad-1": "damaged: result.json | - | - | - | - | - | -",
        "bad-3": "damaged: result.json | - | - | - | - | - | -",
    }
    assert [row[when] for row in rows] == sorted(row[when] for row in rows)


def test_a_folder_without_runs_is_an_error_if_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("/nothere"):
        runs.main(["nothere"])
    runs.main([])
    assert capsys.readouterr().out == f"no runs in {tmp_path}/runs\n"


def test_what_a_run_decided_and_was_given_is_shown_with_its_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(str(tmp_path / "runs"), "mine")
    why = "3 would need about 81.2 GiB on each GPU"
    folder.write_config(
        tiny.config(train__steps=6, train__lr="auto"),
        {"train.micro_batch": Decision(2, why)},
        folder.state(),
    )
    folder.write_result({**RESULT, "scores": SCORES, "automatic_lr": 0.002})
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "runs/mine", folder.root):
        runs.main(["show", name])
        loss, score, decision, *others = capsys.readouterr().out.splitlines()
        assert loss.startswith("eval/loss = 1.2500 > 0.5000: ")
        assert score.startswith("score = 0.250 strict: ")
        assert decision == f"train.micro_batch = 2: {why}"
        values = dict(line.partition(": ")[0].split(" = ") for line in others)
        assert values["train.steps"] == "6"
        assert values["train.lr"] == "0.002"
        assert "train.epochs" not in values
    with refused("run another: no such run folder"):
        runs.main(["show", "another"])


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_lines_that_fit(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a-run-whose-name-says-all-about-its-rows-and-rates-7f3a91bc"
    made(str(tmp_path), long, 6, model__name=f"org/{'base' * 30}").write_result(
        {**RESULT, "scores": SCORES}
    )
    runs.main([str(tmp_path)])
    piped = capsys.readouterr().out
    assert long in piped
    assert f"org/{'base' * 30}" in piped
    monkeypatch.setenv("COLUMNS", str(width))
    for words in ([str(tmp_path)], ["show", f"{tmp_path}/{long}"]):
        with contextlib.redirect_stdout(Terminal()) as screen:
            runs.main(words)
        out = screen.getvalue()
        assert "1.2500 > 0.5000" in out
        # A value that is longer than the window stays whole: it may be copied.
        assert all(len(line) <= width or "base" * 30 in line for line in out.splitlines())
