"""Runs, stores, searches and registries of the release before this one are read and continued as that release would.

project.tar.xz holds a project with its runs, made by tests/old_runs/make.py with the commands of that release:
    steady       a training of 2 workers, stopped by SIGTERM at step 3 of 6; every field that matters is a number
    automatic    the same where every field that can be `auto` is, with an initialisation from the data (eva)
    finished     a finished run with its exports, registered as finished@candidate
    nightly      two nights of retrain.py: two versions with aliases and the gate's tags
    trial-whole  a finished search, whose best model is registered
    trial-part   a search that was stopped by SIGTERM in the third of its 4 trials
wanted.json holds what the same release makes of `steady`, `automatic` and `trial-part` in the end.

older.tar.xz (`make.py --older`) holds the same of the release before that one (3bb4f29), with a smaller model: `steady`
stopped at step 4, `finished`, and one night.

The project lies in another folder than the one where it was made, as after a move. Nothing in it is rewritten, since
that release continues it so, too: the command's config says where model and data are, and `registry moved`
corrects MLflow's paths. Only `chat` and `evaluate RUN` find the base model by the path that the export holds, in that
release too: their tests correct it (`with_base`).

**Which bytes are compared.** The bytes of a training depend on the processor and on the versions of a few packages.
Where these versions, and the gradients that transformers alone computes of the project's model (ends.CANARY), are those
of the machine that made the runs, exports have the same bytes and all numbers are equal. Elsewhere numbers differ by
TOLERANCE at most, and the digests of exports are not compared.

All runs have dropout: without it that release computed layers with the same input together, and this one computes each
by itself, so that the last bits of gradients differ.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import changed, load_config, parse_yaml
from olora_ray.tracking.moved_storage import relocate_artifacts
from tests.old_runs import ends
from tests.pipelines import project
from tests.recovery import processes
from tests.said import said

HERE = Path(__file__).parent
WANTED = json.loads((HERE / "wanted.json").read_text())
TOLERANCE = {"steady": 1e-3, "automatic": 3e-2, "trial-part": 1e-3}
"""Largest relative difference on another machine; `automatic` computes in bfloat16, the others in float32."""
ARCHIVES = {"project": WANTED["place"], "older": "/tmp/old-dbvggdcv/project"}
"""Name of an archive -> where its project was made."""
COMMANDS = {
    "older": ("finetune.py", "steady.yaml"),
    "steady": ("finetune.py", "steady.yaml"),
    "automatic": ("finetune.py", "automatic.yaml"),
    "trial-part": ("sweep.py", "trial.yaml", "part.yaml"),
    "evaluated": (
        "evaluate.py",
        "runs/finished",
        "models:/finished@candidate",
        *("--config", "finished.yaml", "--out", "out"),
    ),
}
"""What continues a run or a search, and what reads a run and a registered model with Ray."""


RAY = """
import sys, ray
ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def unpacked(folder: Path, name: str = "project") -> Path:
    """An old project in a folder, where it has never been before."""
    folder.mkdir()
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    runs = folder / "runs"
    relocate_artifacts(f"{ARCHIVES[name]}/runs", str(runs), f"sqlite:///{runs}/mlflow.db")
    return folder


def with_base(place: Path) -> Path:
    """An old project, in which the export of `finished` names the base model where it lies now."""
    for file in ("config.yaml", "export/adapter/adapter_config.json"):
        path = place / "runs" / "finished" / file
        text = path.read_text()
        for before in ARCHIVES.values():
            text = text.replace(before, str(place))
        path.write_text(text)
    return place


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old project, for tests that only read."""
    return unpacked(tmp_path_factory.mktemp("old") / "project")


@pytest.fixture(params=ARCHIVES)
def own(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An old project of this test alone, as the current folder."""
    folder = unpacked(tmp_path / "project", request.param)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


of_this_release = pytest.mark.parametrize("own", ["project"], indirect=True)

# With Ray: the commands that continue what was interrupted.


@pytest.fixture(scope="module")
def continued() -> Iterator[dict[str, Path]]:
    """The projects in which each of COMMANDS was given, two at a time, with one Ray."""
    with processes.scratch() as scratch:
        places = {name: unpacked(scratch / name) for name in COMMANDS if name != "older"}
        places["older"] = unpacked(scratch / "older", "older")
        with_base(places["evaluated"])
        environment = {"HOME": str(scratch / "home"), "TMPDIR": str(scratch / "t")}  # no caches
        for folder in environment.values():
            Path(folder).mkdir()
        environment |= {"RAY_TMPDIR": environment["TMPDIR"], "RAY_AUTH_MODE": "disabled"}
        environment["OMP_NUM_THREADS"] = "1"
        with ray_for(environment) as address, ThreadPoolExecutor(2) as pool:
            environment["RAY_ADDRESS"] = address
            given = [pool.submit(give, name, place, environment) for name, place in places.items()]
            problems = [text for each in given if (text := each.result())]
        assert not problems, "\n".join(problems)
        yield places


@contextlib.contextmanager
def ray_for(environment: Mapping[str, str]) -> Iterator[str]:
    """A Ray in a process of its own; its address."""
    command = [sys.executable, "-c", RAY]
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


def give(name: str, place: Path, environment: Mapping[str, str]) -> str:
    """Give a command in its project; returns its output if it fails."""
    script, *arguments = COMMANDS[name]
    done = project.run_script(script, *arguments, cwd=place, env=environment)
    if done.returncode == 0:
        return ""
    return f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def tolerance(continued: dict[str, Path]) -> dict[str, float]:
    """0 where the bytes are comparable, see above; else TOLERANCE."""
    here = ends.machine(continued["steady"] / "model")
    if here != WANTED["machine"]:
        return TOLERANCE
    return dict.fromkeys(TOLERANCE, 0.0)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["steady", "automatic"])
def test_an_old_run_that_was_stopped_ends_with_the_same_bytes(
    continued: dict[str, Path], tolerance: dict[str, float], name: str
) -> None:
    found = ends.of_run(continued[name] / "runs", name)
    assert [*ends.differences(found, WANTED[name], tolerance[name])] == []


@pytest.mark.ray
def test_a_run_of_an_older_release_that_was_stopped_ends(continued: dict[str, Path]) -> None:
    result = json.loads((continued["older"] / "runs/steady/result.json").read_text())
    assert result["steps"] == 6
    assert result["registered"]["version"] == 1
    assert [
        step for step, _ in ends.series(continued["older"] / "runs", "steady")["train/loss"]
    ] == [*range(1, 7)]


@pytest.mark.ray
def test_an_old_search_that_was_stopped_ends_with_the_same_trials(
    continued: dict[str, Path], tolerance: dict[str, float]
) -> None:
    found = ends.of_search(continued["trial-part"] / "runs", "trial-part")
    assert [*ends.differences(found, WANTED["trial-part"], tolerance["trial-part"])] == []


@pytest.mark.ray
def test_an_old_run_and_its_registered_model_are_evaluated(continued: dict[str, Path]) -> None:
    place = continued["evaluated"]
    run, registered = json.loads((place / "out" / "evaluation.json").read_text())["models"]
    kept = json.loads((place / "runs" / "finished" / "result.json").read_text())
    for model in (run, registered):
        assert model["metrics"]["eval/loss"] == pytest.approx(kept["metrics"]["eval/loss"], 1e-4)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["steady", "automatic", "trial-part", "evaluated"])
def test_what_continues_reads_the_old_tokens(
    old: Path, continued: dict[str, Path], name: str
) -> None:
    def stores(place: Path) -> dict[str, bytes]:
        files = (place / "runs" / "tokens").glob("*/shard-*")
        return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}

    found = stores(continued[name])
    wanted = stores(old)
    assert {file: found[file] for file in wanted} == wanted
    more = {file.partition("/")[0] for file in found.keys() - wanted.keys()}
    # A run has one store more than an old one: the texts of evaluation.guard.
    assert len(more) == (name in ("steady", "automatic"))


def test_a_file_or_a_number_that_differs_is_named() -> None:
    found = copy.deepcopy(WANTED["steady"])
    found["result"]["more"] = "of a later release"
    assert [*ends.differences(found, WANTED["steady"], 0.0)] == []
    found["files"]["export/merged/model.safetensors"] = "another digest"
    found["series"]["train/loss"][5][1] *= 1 + 1e-9
    exact = [*ends.differences(found, WANTED["steady"], 0.0)]
    assert [line.partition(":")[0] for line in exact] == [
        "/files/export/merged/model.safetensors",
        "/series/train/loss/5/1",
    ]
    assert [*ends.differences(found, WANTED["steady"], 1e-3)] == []
    del found["files"]["export/merged/model.safetensors"]
    found["series"]["train/loss"][5][1] *= 1 + 2e-3
    assert len([*ends.differences(found, WANTED["steady"], 1e-3)]) == 2


# Without Ray: what reads them.


def test_old_runs_and_searches_are_listed(old: Path) -> None:
    from olora_ray.pipeline import runs

    rows = [dict(zip(runs.HEAD, row, strict=True)) for row in runs.listed(f"{old}/runs")]
    shown = {row["name"]: (row["state"], row["steps"]) for row in rows}
    assert shown["steady"] == shown["automatic"] == ("interrupted", "3/6")
    assert shown["finished"] == ("finished", "6/6")
    assert "finished/1" in [row["version"] for row in rows if row["name"] == "finished"]
    assert shown["trial-whole"] == ("search, finished", "-")
    assert shown["trial-part"] == ("search, interrupted", "-")


def test_an_old_finished_run_is_finished(own: Path) -> None:
    import olora_ray

    file = own / "runs" / "finished" / "result.json"
    before = file.read_bytes()
    kept = json.loads(before)
    result = olora_ray.finetune("finished.yaml")
    assert result.loss_before == kept["eval_loss_before"]
    assert result.loss == kept["metrics"]["eval/loss"]
    assert result.model == "models:/finished/1"
    assert file.read_bytes() == before


def test_the_page_of_an_old_run_is_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from olora_ray.pipeline import look

    page = own / "runs" / "finished" / "report.html"
    with pytest.raises(UserError):
        look.main(["finished"])
    page.write_text(
        "<h1>finished</h1>"
    )  # the archive has no pages; those of that release had no verdict
    for name in ("finished", "finished@candidate"):
        look.main([name])
        assert capsys.readouterr().out.splitlines()[-1] == str(page)


def test_an_old_finished_run_answers_as_it_did(own: Path) -> None:
    import olora_ray

    with_base(own)
    result = json.loads((own / "runs" / "finished" / "result.json").read_text())
    logged = own / "runs" / "mlartifacts" / result["mlflow"]["run_id"] / "artifacts"
    _, _, before, after = json.loads((logged / "samples.json").read_text())["data"][0]
    model = olora_ray.load("finished")
    assert model("after 200?", adapted=False) == before
    assert model("after 200?") == after


@of_this_release
def test_old_versions_keep_their_aliases_verdicts_and_files(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines import registry

    registry.main(["list", "nightly"])
    _, second, first = capsys.readouterr().out.splitlines()
    assert second.split()[:2] == ["2", "champion"]
    assert "passed: eval/loss" in second
    assert first.split()[:2] == ["1", "previous"]
    for name, alias in (("nightly", "champion"), ("finished", "candidate"), ("trial", "candidate")):
        registry.main(["show", name, alias])
        assert "files have their checksums" in capsys.readouterr().out


def test_an_old_champion_is_not_trained_again(own: Path) -> None:
    """Base, data and settings have the fingerprint that they had, or that an earlier release gave them."""
    from pipelines import retrain

    with said() as lines:
        retrain.main(["nightly.yaml"])
    assert any("nothing changed since version" in line for line in lines), lines


@of_this_release
@pytest.mark.parametrize(("space", "ended"), [("whole", 4), ("part", 2)])
def test_an_old_search_is_the_same_search(own: Path, space: str, ended: int) -> None:
    from olora_ray.sweep import search_folder
    from olora_ray.sweep.record import read_all
    from olora_ray.sweep.space_file import load_space

    config = load_config("trial.yaml")
    found = load_space(f"{space}.yaml", config)
    search = search_folder.search_config(config, found, f"{space}.yaml", registers=True)
    search_folder.check_search(search, found)
    assert search_folder.progress(search.folder()).complete is (space == "whole")
    trials = read_all(search.folder()).values()
    assert sum(trial.status == "finished" for trial in trials) == ended


# Configs with fields and values that have been removed since.


@pytest.mark.parametrize(
    ("field", "default"),
    [
        ("adapter.gamma", 16.0),
        ("adapter.method", "olora"),
        ("cluster.fsdp_offload", False),
        ("cluster.price", None),
        ("export.gguf", None),
        ("gate.confirm", 0.0),
        ("model.allow_pickle", False),
    ],
)
def test_an_old_config_with_the_default_of_a_removed_field_is_read(
    old: Path, tmp_path: Path, field: str, default: Any
) -> None:
    """Each config.yaml of an old run has all fields of its release."""
    assert load_config(written(old, tmp_path, {field: default})) == load_config(
        old / "runs" / "finished" / "config.yaml"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter.gamma", 4.0),
        ("adapter.method", "lora_ga"),
        ("cluster.fsdp_offload", True),
        ("cluster.price", 2.5),
        ("gate.confirm", 0.3),
        ("model.allow_pickle", True),
    ],
)
def test_another_value_of_a_removed_field_is_refused_by_name(
    old: Path, tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(written(old, tmp_path, {field: value}))
    assert f"{field}: " in str(caught.value)


def test_a_gguf_file_is_one_of_the_further_exports(old: Path, tmp_path: Path) -> None:
    config = load_config(written(old, tmp_path, {"export.gguf": "q8_0"}))
    assert config.export.also == {"gguf": "q8_0"}


def written(old: Path, folder: Path, changes: Mapping[str, Any]) -> str:
    """The config.yaml of an old run, with changes, as a file in a folder."""
    text = (old / "runs" / "finished" / "config.yaml").read_text()
    tree = changed(parse_yaml(text, "config.yaml"), changes)
    return str(project.write_config(folder, tree))
