"""Further exports: found by name, checked before step 0, written after the training, named in the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config.load import override
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import export
from olora_ray.pipeline.exporter import exporter_named
from olora_ray.pipeline.run_folder import RunFolder
from tests import plugins, tiny
from tests.pipeline.test_export_losses import spec_of
from tests.pipeline.test_export_shares import STEP, Run

CODE = """
from olora_ray.pipeline.exporter import Exporter

def problem(base, model, config, option):
    if config.run.name == "refused":
        return "this name is taken; set another run.name"

def write(work, source, folder, option):
    (folder / "about.txt").write_text(f"{option} of {sorted(file.name for file in source.iterdir())}")

EXPORTER = Exporter("Notes", "adapter", ("short", "long"), problem, write)
"""


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Install a package with an exporter `notes`."""
    entries = "[olora_ray.exporters]\nnotes = notes_of_export:EXPORTER\n"
    plugins.install(
        monkeypatch, tmp_path / "site", "notes-of-export", "notes_of_export", CODE, entries
    )
    exporter_named.cache_clear()


@pytest.mark.usefixtures("notes")
def test_an_installed_package_adds_an_export(tmp_path: Path) -> None:
    run = Run(tmp_path)
    export.export_run(spec_of(run, export__also={"notes": "long"}), run.folder, STEP)
    folder = Path(run.folder.export("notes"))
    text = (folder / "about.txt").read_text()
    assert text.startswith("long of [")
    assert "adapter_model.safetensors" in text
    export.export_run(spec_of(run), run.folder, STEP)
    assert not folder.exists(), "it was of an earlier export"


@pytest.mark.usefixtures("notes")
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"export__also": {"notes": "medium"}},
            "export.also.notes: 'medium' is none of short, long",
        ),
        (
            {"export__also": {"notes": "short"}, "run__name": "refused"},
            "export.also.notes: this name is taken; set another run.name",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_training(
    tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    tiny.llama().save_pretrained(tmp_path)
    config = tiny.config(model__name=str(tmp_path), data__max_length=64, **changes)
    base = BaseModel(str(tmp_path), str(tmp_path), str(tmp_path))
    tiny.plan(override(config, {"export.also": {"notes": "short"}, "run.name": "fine"}), base)
    with pytest.raises(UserError) as error:
        tiny.plan(config, base)
    assert str(error.value) == line


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError) as error:
        tiny.config(export__also={"ggfu": "f16"})
    assert "export.also" in str(error.value)
    assert "did you mean 'gguf'" in str(error.value)


def test_the_field_gguf_of_earlier_releases_is_one_of_these(tmp_path: Path) -> None:
    config = tiny.config(export__gguf="q8_0", run__storage=str(tmp_path))
    assert config.export.also == {"gguf": "q8_0"}
    assert tiny.config(export__gguf=None).export.also == {}
    assert override(tiny.config(), {"export.gguf": "f16"}).export.also == {"gguf": "f16"}
    folder = RunFolder(config.folder())
    folder.write_parity(config, {"ok": True, "step": 6})
    file = Path(folder.parity)
    report = json.loads(file.read_text())
    report["export"] = {"merged": True, "rank": None, "gguf": "q8_0"}
    file.write_text(json.dumps(report))
    assert folder.exported(config, 6) is not None
    assert folder.exported(tiny.config(run__storage=str(tmp_path)), 6) is None
