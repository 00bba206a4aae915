import sys
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.config import tables
from olora_ray.config.command_line import help_text
from olora_ray.config.schema import Config
from olora_ray.config.tables import Table
from tests import plugins
from tests.refused import refused

TABLE = Table("olora_ray.test_members", {"own": "fractions:Fraction"})
ENTRIES = "[olora_ray.test_members]\nother = other_member:MEMBER\n"


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    plugins.install(
        monkeypatch, tmp_path, "other-member", "other_member", "MEMBER = 'a text'\n", ENTRIES
    )
    monkeypatch.delitem(sys.modules, "other_member", raising=False)
    return tmp_path


@pytest.mark.usefixtures("other")
def test_names_of_installed_packages_come_last_and_nothing_is_imported() -> None:
    assert TABLE.names() == ("own", "other")
    assert TABLE.knows("other")
    assert not TABLE.knows("third")
    assert TABLE.plugin("other") is not None
    assert "other_member" not in sys.modules


@pytest.mark.usefixtures("other")
def test_the_identity_of_an_installed_member_has_its_package_and_code() -> None:
    assert TABLE.identity("own") == "own"
    plugin = TABLE.plugin("other")
    assert plugin is not None
    assert TABLE.identity("other") == f"other of other-member 1.0 {plugin.digest[:16]}"


@pytest.mark.usefixtures("other")
def test_a_member_of_another_type_is_refused_with_its_package() -> None:
    with refused("other-member 1.0"):
        TABLE.load("other", int)


def test_a_package_that_cannot_be_imported_is_named(other: Path) -> None:
    (other / "other_member.py").write_text("import no_such_module\n")
    with refused("other-member 1.0"):
        TABLE.load("other", str)
    (other / "other_member.py").unlink()
    with refused("other-member 1.0"):
        TABLE.plugin("other")


def test_two_packages_with_one_name_are_refused(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.install(
        monkeypatch, other / "second", "second", "second_member", "MEMBER = 1\n", ENTRIES
    )
    with pytest.raises(UserError):
        TABLE.load("other", str)


def test_a_package_never_replaces_an_own_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[olora_ray.test_members]\nown = other_member:MEMBER\n"
    plugins.install(
        monkeypatch, tmp_path, "other-member", "other_member", "MEMBER = type\n", entries
    )
    assert TABLE.names() == ("own",)
    assert TABLE.load("own", type).__name__ == "Fraction"
    assert TABLE.plugin("own") is None


def test_the_digest_of_a_plugin_follows_its_source_and_version(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TABLE.plugin("other")
    assert first is not None
    assert (first.name, first.package, first.version) == ("other", "other-member", "1.0")
    assert TABLE.plugin("other") == first
    (other / "other_member.py").write_text("MEMBER = 'another text'\n")
    changed = TABLE.plugin("other")
    assert changed is not None
    assert changed.digest != first.digest


def test_the_digest_of_a_package_has_all_of_its_python_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "[olora_ray.test_members]\nother = shared_names.rows.deep:MEMBER\n"
    plugins.install(monkeypatch, tmp_path, "other-member", "unused", "", entries)
    inner = tmp_path / "shared_names" / "rows"
    inner.mkdir(parents=True)
    (inner / "__init__.py").touch()
    (inner / "deep.py").write_text("from shared_names.rows.helper import MEMBER\n")
    (inner / "helper.py").write_text("MEMBER = 1\n")
    first = TABLE.plugin("other")
    assert TABLE.load("other", int) == 1
    (inner / "helper.py").write_text("MEMBER = 2\n")
    assert TABLE.plugin("other") != first


def test_a_config_accepts_the_names_of_the_tables_and_of_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(format: str) -> Config:
        source = {"path": "a.jsonl", "format": format}
        return Config.model_validate({"model": {"name": "m"}, "data": {"train": [source]}})

    for name in ("auto", *tables.FORMATS.own):
        assert config(name).data.train[0].format == name
    with pytest.raises(ValueError):
        config("alpacca")
    with pytest.raises(ValueError):
        config(3)  # type: ignore[arg-type]
    entries = "[olora_ray.formats]\ndialogs = my_rows:FORMAT\n"
    plugins.install(monkeypatch, tmp_path, "my-rows", "my_rows", "raise SystemError\n", entries)
    assert config("dialogs").data.train[0].format == "dialogs"
    assert "tokens, dialogs" in " ".join(help_text().split())
