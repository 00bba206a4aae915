"""The lifecycle demo, played with a tiny model; and that it would notice what is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest

from olora_ray.config.load import load_config
from tests import browser
from tests.demos import lifecycle, scenario
from tests.demos.scenario import Scenario


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_plays_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "registry.png" if browser.program() else None
    folders = []

    def make(folder: Path) -> Scenario:
        folders.append(folder)
        return scenario.quick(folder)

    lifecycle.run(make, picture)
    assert "version 1 is the champion again" in capsys.readouterr().out
    assert [folder.exists() for folder in folders] == [False], "it leaves nothing behind"


@pytest.mark.parametrize("make", [scenario.quick, scenario.real])
def test_its_configs_register_and_have_a_gate_with_a_condition(
    tmp_path: Path, make: Callable[[Path], Scenario]
) -> None:
    played = make(tmp_path)
    config = load_config(played.config)
    assert config.registry.model == scenario.NAME
    assert config.gate.conditions
    assert not {str(row) for row in played.first} & {str(row) for row in played.more}
