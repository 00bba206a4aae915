"""The functions of the package itself, as a program or a notebook calls them; their docstrings are what runs here."""

import doctest
import json
import os
import re
import sys
from pathlib import Path

import pytest

import olora_ray
from tests.pipelines import project
from tests.ran import ran


@pytest.mark.ray
def test_the_examples_of_the_functions_are_true(tiny_model: Path, tmp_path: Path) -> None:
    project.make_rows(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model)
    lines = []
    for function in (olora_ray.init, olora_ray.finetune, olora_ray.load, olora_ray.evaluate):
        for example in doctest.DocTestParser().get_examples(function.__doc__ or ""):
            source, wanted = example.source.strip(), example.want.strip()
            lines.append(f"assert repr(got := {source}) == {wanted!r}, got" if wanted else source)
    assert len(lines) >= 10
    program = tmp_path / "program.py"
    program.write_text("\n".join(["import olora_ray", *lines]))
    done = ran([sys.executable, program], cwd=tmp_path, env=os.environ)
    assert "held-out loss: " in done.stdout
    # Without the marks of the chat template, as on the page.
    assert re.search(r"^\S+ prompt: +after \d+\?$", done.stdout, re.M)


@pytest.mark.ray
@pytest.mark.slow  # in make test, the same functions: test_the_examples_of_the_functions_are_true
def test_the_cells_of_the_notebook_run(tiny_model: Path, tmp_path: Path) -> None:
    cells = json.loads((project.ROOT / "docs" / "first_steps.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (model,) = re.findall(r'MODEL = "(.*)"', program)
    (tmp_path / "notebook.py").write_text(
        program.replace(model, str(tiny_model)).replace("range(240)", "range(40)")
    )
    done = ran([sys.executable, "notebook.py"], cwd=tmp_path, env=os.environ)
    assert re.search(
        r"^held-out loss: [\d.]+ before, [\d.]+ after\n(.*\n)*\{'eval/loss'(.*\n)*base: ",
        done.stdout,
        re.M,
    )


def test_a_mapping_is_a_config_too_and_a_mistake_names_its_field() -> None:
    with pytest.raises(ValueError, match="config: model: required, but not set"):
        olora_ray.finetune({"data": {"train": [{"path": "rows.jsonl"}]}})
    with pytest.raises(ValueError, match=r"nowhere\.yaml: No such file"):
        olora_ray.finetune("nowhere.yaml", {"train.steps": 2})


def test_importing_the_package_imports_nothing_heavy() -> None:
    told = (
        "import sys, olora_ray; "
        "print([name for name in ('torch', 'ray', 'mlflow', 'pydantic') if name in sys.modules])"
    )
    done = ran([sys.executable, "-c", told])
    assert done.stdout == "[]\n"
