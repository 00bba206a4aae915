"""`olora-ray follow` loads the version to which an alias points: a real MLflow, and stand-ins for the engines."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from olora_ray.common.errors import UserError
from olora_ray.serving.watch import Watch
from olora_ray.tracking.models import Contents
from tests.said import said
from tests.serving.engine import Engine, following
from tests.serving.versions import FOLLOWED, NAME, Versions
from tests.waiting import until


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        found = Versions(tmp_path_factory.mktemp("follow"))
        for _ in range(4):
            found.add()
        found.spoil("3")
        yield found
        found.server.kill()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_engine_follows_the_champion(versions: Versions, tmp_path: Path, kind: str) -> None:
    engine, mirror = Engine(kind, versions.base), tmp_path / "mirror"

    def serves(number: str) -> bool:
        return f"/{NAME}-{number}-" in engine.served.get(FOLLOWED, "")

    versions.point("1")
    with following(FOLLOWED, versions.server.uri, tmp_path, "--engine", engine.url, "--mirror", str(mirror)) as printed:
        until(lambda: serves("1"))
        versions.aliases.promote("2", "by test")
        until(lambda: serves("2"))
        until(lambda: printed(f"version 2 lies in {mirror}/{NAME}@2"))
        assert (mirror / FOLLOWED).read_text() == f"{NAME}@2\n"
        for place in (Path(engine.served[FOLLOWED]), mirror / f"{NAME}@2"):
            files = {file.name: file.read_bytes() for file in place.iterdir()}
            assert files == {file.name: file.read_bytes() for file in versions.adapter("2").iterdir()}
        versions.point("3")
        until(lambda: printed(f"{NAME} version 3: peft/adapter_model.safetensors was changed after the registration"))
        assert serves("2")
        versions.point("4")
        until(lambda: printed("no room for it"))
        until(lambda: serves("2"))
        engine.served.clear()  # it was restarted
        versions.point("2")
        until(lambda: serves("2"))
        if kind == "vllm":
            versions.server.kill()
            until(lambda: printed("MLflow does not answer"))
            versions.server.start()
            until(lambda: printed("MLflow answers again"), 120)
        versions.aliases.promote("1", "by test")
        until(lambda: serves("1"))
    assert not printed("Traceback")


def test_versions_that_no_engine_of_this_base_can_serve(versions: Versions, tmp_path: Path) -> None:
    merged, other = versions.register(Contents(versions.base)), versions.add(digest="0123+4567")
    with said() as lines:
        assert Watch(f"{NAME}@{merged}", versions.server.uri, tmp_path).look() is None
    assert "is not an adapter that this project registered" in "".join(lines)
    found = Watch(f"{NAME}@{other}", versions.server.uri, tmp_path).look()
    assert found
    with pytest.raises(UserError, match="has other weights than its own"):
        found.check_base(str(versions.base))


def test_a_damaged_copy_is_fetched_again(versions: Versions, tmp_path: Path) -> None:
    for _ in range(2):
        found = Watch(f"{NAME}@1", versions.server.uri, tmp_path).look()
        assert found
        file = found.folder / "adapter_model.safetensors"
        assert file.read_bytes() == (versions.adapter("1") / file.name).read_bytes()
        file.write_bytes(b"damaged")
