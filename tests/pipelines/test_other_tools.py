"""A config for one of another tool: each of its fields is named, and what maps is what it was."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from olora_ray.config.load import flatten, load_config, parse_yaml
from pipelines import init
from tests.pipelines import project
from tests.refused import refused

THEIRS = Path(__file__).parent / "other_tools"
"""Files in the dialects of other tools; ours/ has the config for each."""
FILES = sorted(file.name for file in THEIRS.iterdir() if file.is_file())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(project.ROOT / "pipelines")  # as the commands do
    shutil.copytree(THEIRS, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("file", FILES)
def test_each_field_is_named_and_each_value_that_is_said_is_in_the_config(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    init.main(["--from", file])
    text = Path("my_run.yaml").read_text(encoding="utf-8")
    assert text == (THEIRS / "ours" / f"{file}.yaml").read_text(encoding="utf-8")
    said, found = re.sub("^# ", "", text, flags=re.MULTILINE), flatten(load_config("my_run.yaml"))
    assert said.partition("\nrun:")[0] in capsys.readouterr().out
    assert "hf_wDk" not in text
    source = Path(file).read_text(encoding="utf-8")
    fields = (
        re.findall(r"--(\w+)", source) if file.endswith(".sh") else list(yaml.safe_load(source))
    )
    assert [
        field for field in fields if not re.search(rf"^  {field}(:|$)", said, re.MULTILINE)
    ] == []
    values = re.findall(r"(?:-> |, )([a-z]+\.[a-z_]+): ([\w.-]+)(?=,| \||$)", said, re.MULTILINE)
    last = {
        field: parse_yaml(value, "") for field, value in values if f"replaces {value}" not in said
    }
    assert {field: found[field] for field in last} == last


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base_model: a\nrl: ipo\nadapter: lora", 'rl: "ipo": only adapters are trained'),
        (
            "model_name_or_path: a\nstage: dpo\ndo_train: true\npref_loss: orpo",
            'pref_loss: "orpo": only',
        ),
        ("base_model: a", "adapter: null (default of Axolotl): only adapters are trained"),
        (
            "model_name_or_path: a\nstage: sft\ndo_train: true\nfinetuning_type: full",
            'finetuning_type: "full": only',
        ),
        ("trl kto --model_name_or_path a", "kto is not sft or dpo: only adapters are trained"),
        ("base_model: a\nadapter: lora", "its rows are not known here"),
        (
            "model_name_or_path: a\ndo_train: true\ndataset: b\ndataset_dir: none",
            "none/dataset_info.json",
        ),
        ("lr: 1", "has no base_model (Axolotl)"),
        ("trl sft --a 'b", "No closing quotation"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(text: str, told: str) -> None:
    Path("x").write_text(text, encoding="utf-8")
    with refused(told) as error:
        init.main(["--from", "x"])
    assert str(error.value).startswith("--from x: ")
    assert not Path("my_run.yaml").exists()


def test_rows_and_a_model_beside_a_file_of_another_tool_are_refused() -> None:
    with refused("argument --from"):
        init.main(["rows.jsonl", "--from", "trl_defaults.yaml"])
