"""`olora-ray export` and `push`: from a finished run or a version to files for others."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from olora_ray.common.errors import UserError
from olora_ray.evaluation import export, push
from tests import finished_run, hub_stand_in
from tests.finished_run import FinishedRun
from tests.hub_stand_in import Hub


@pytest.fixture(scope="module", params=[True, False], ids=["merged", "adapter alone"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run.make(tmp_path_factory.mktemp("run"), export={"merged": request.param})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_stand_in.running() as found:
        yield found


def files(folder: str | Path) -> dict[str, bytes]:
    found = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_form_has_the_trained_weights_and_the_run_stays_as_it_is(
    run: FinishedRun, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run.folder.root)
    out = tmp_path / "new" / "out"
    export.main([run.folder.root, "--to", str(out), "--form", form])
    assert str(out) in capsys.readouterr().out
    assert files(run.folder.root) == before
    assert [entry.name for entry in out.parent.iterdir()] == ["out"], "no temporary folder is left"
    if form == "adapter":
        assert files(out) == files(run.folder.adapter)
    else:
        exact = load_file(run.case.write_merged(tmp_path / "exact") / "model.safetensors")
        for name, weight in load_file(out / "model.safetensors").items():
            assert (weight - exact[name]).abs().max() < 1e-5
        assert (out / "tokenizer.json").is_file()


def test_the_registered_form_is_the_default_and_versions_are_verified(
    run: FinishedRun, tmp_path: Path
) -> None:
    version = run.registered()
    name = f"{run.config.registry.model}@{run.config.registry.alias}"
    changes = [
        f"run.storage={run.config.run.storage}",
        f"tracking.uri={run.aliases.uri}",
    ]
    export.main([name, "--to", str(tmp_path / "out"), *changes])
    kind = "config.json" if run.config.export.merged else "adapter_config.json"
    assert (tmp_path / "out" / kind).is_file()
    number = f"{run.config.registry.model}@{version}"
    export.main([number, "--to", str(tmp_path / "same"), *changes])
    weights = {file for file in files(tmp_path / "out") if file.endswith(".safetensors")}
    assert {file: files(tmp_path / "same")[file] for file in weights} == {
        file: files(tmp_path / "out")[file] for file in weights
    }


def test_a_damaged_run_leaves_no_folder(run: FinishedRun, tmp_path: Path) -> None:
    if not run.config.export.merged:
        pytest.skip("the merged model is made of the adapter then")
    file = Path(run.folder.merged) / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    save_file({**tensors, name: tensors[name] + 0.1}, file, {"format": "pt"})
    try:
        with pytest.raises(UserError):
            export.main([run.folder.root, "--to", str(tmp_path / "out"), "--form", "merged"])
    finally:
        file.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "."],
        ["--to", "out", "--form", "ggfu"],
        ["--to", "out", "--form", "gguf", "--quantize", "q3"],
        ["--to", "out", "--quantize", "f16"],
        [],
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    run: FinishedRun, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("keep")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        export.main([run.folder.root, *words])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_push_sends_the_registered_form_and_a_dry_run_nothing(
    run: FinishedRun, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.folder.merged if run.config.export.merged else run.folder.adapter
    push.main([run.folder.root, "acme/small", "--dry-run"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in files(folder))
    assert hub.requests == []
    push.main([run.folder.root, "acme/small"])
    assert set(files(folder)) <= set(hub.repos["acme/small"])
    assert hub.created[0]["visibility"] == "private"
    push.main([run.folder.root, "acme/open", "--public", "--form", "adapter"])
    assert hub.created[1]["visibility"] == "public"
    assert "adapter_model.safetensors" in hub.repos["acme/open"]
    assert "pushed" not in json.loads(Path(run.folder.result).read_text())
