"""`olora-ray follow` loads the version to which an alias points: a real MLflow, and stand-ins for the engines."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from olora_ray.serving.watch import Watch
from olora_ray.tracking.models import Contents
from tests.ray_head import free_port
from tests.refused import refused
from tests.said import said
from tests.serving.engine import Engine, following
from tests.serving.versions import CHALLENGER, FOLLOWED, NAME, Versions, registered
from tests.waiting import until


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    with registered(tmp_path_factory.mktemp("follow"), 4) as found:
        found.spoil("3")
        yield found


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_engine_follows_the_champion(versions: Versions, tmp_path: Path, kind: str) -> None:
    engine, mirror = Engine(kind, versions.base), tmp_path / "mirror"

    def serves(number: str) -> bool:
        return f"/{NAME}-{number}-" in engine.served.get(FOLLOWED, "")

    versions.point("1")
    with following(
        FOLLOWED, versions.server.uri, tmp_path, "--engine", engine.url, "--mirror", str(mirror)
    ) as printed:
        until(lambda: serves("1"))
        versions.aliases.promote("2", "by test")
        until(lambda: serves("2"))
        until(lambda: printed(f"version 2 lies in {mirror}/{NAME}@2"))
        assert (mirror / FOLLOWED).read_text() == f"{NAME}@2\n"
        for place in (Path(engine.served[FOLLOWED]), mirror / f"{NAME}@2"):
            files = {file.name: file.read_bytes() for file in place.iterdir()}
            assert files == {
                file.name: file.read_bytes() for file in versions.adapter("2").iterdir()
            }
        versions.point("3")
        until(
            lambda: printed(
                f"{NAME} version 3: peft/adapter_model.safetensors was changed after the registration"
            )
        )
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
            until(lambda: printed("MLflow names a version again"), 120)
        versions.aliases.promote("1", "by test")
        until(lambda: serves("1"))
    assert not printed("Traceback")


class Listening:
    """The address at which `olora-ray follow` answers, and the options that make it so."""

    def __init__(self, engine: Engine, *words: str) -> None:
        at = f"127.0.0.1:{free_port()}"
        self.url, self.words = f"http://{at}", ["--engine", engine.url, "--listen", at]
        self.words += ["--challenger", CHALLENGER, *words]

    def ask(self, **body: Any) -> requests.Response:
        chat = {"model": FOLLOWED, "messages": [{"role": "user", "content": "Hello"}], **body}
        return requests.post(f"{self.url}/v1/chat/completions", json=chat, timeout=30)

    def answered(self, number: int, **body: Any) -> Counter[str]:
        """Ask so often; return how often each version answered (empty: it was just being replaced)."""
        found = Counter[str]()
        for answer in (self.ask(**body) for _ in range(number)):
            version = answer.headers.get("x-olora-version", "")
            assert answer.ok
            assert version.replace("@", "-") in told(answer)
            found[version] += 1
        return found

    def metric(self, name: str) -> float:
        lines = requests.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=30).ok
        except requests.ConnectionError:
            return False


def told(answer: requests.Response) -> str:
    if answer.text.startswith("data"):
        parts = [
            json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")
        ]
        return "".join(part["choices"][0]["delta"]["content"] for part in parts)
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_share_of_the_requests_goes_to_the_challenger(versions: Versions, tmp_path: Path) -> None:
    engine = Engine("vllm", versions.base)
    at = Listening(engine, "--share", "0.5")
    versions.point("1")
    versions.aliases.client.delete_registered_model_alias(NAME, "challenger")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(at.healthy)
        assert at.answered(20) == {f"{NAME}@1": 20}
        until(lambda: printed("challenger"))
        versions.point("2", "challenger")
        until(lambda: f"{NAME}@2" in at.answered(1))
        found = at.answered(100) + at.answered(100, stream=True)
        assert 60 < found[f"{NAME}@2"] < 140
        engine.fails = "2"
        assert at.answered(20) == {f"{NAME}@1": 20}
        labels = f'code="500",model="{CHALLENGER}",version="{NAME}@2"'
        assert at.metric(f"olora_follow_requests_total{{{labels}}}") > 0
        engine.fails = ""
        versions.point("3", "challenger")  # a file of it was changed
        until(lambda: printed("was changed after the registration"))
        assert at.answered(20) == {f"{NAME}@1": 20}
        versions.point("4")
        until(lambda: printed("no room for it"))
        assert at.answered(20) == {f"{NAME}@1": 20}
        versions.point("2", "challenger")
        until(lambda: f"{NAME}@2" in at.answered(1))
        versions.point("2")  # nothing is left to compare
        until(
            lambda: (
                at.answered(1) == {f"{NAME}@2": 1}
                and at.metric(f'olora_follow_version{{model="{FOLLOWED}"}}') == 2
            )
        )
        assert at.answered(20) == {f"{NAME}@2": 20}
        versions.aliases.client.delete_registered_model_alias(NAME, "challenger")
        versions.point("1")
        until(lambda: f"{NAME}@1" in at.answered(1))
        until(lambda: at.answered(5) == {f"{NAME}@1": 5})
    assert printed("not registered") == 2  # once each time
    assert not printed("Traceback")


def test_what_passes_and_what_fails(versions: Versions, tmp_path: Path) -> None:
    engine = Engine("vllm", versions.base)
    at = Listening(engine)
    versions.point("1")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(at.healthy)
        content, key = bytes(range(256)), {"Authorization": "Bearer key"}
        answer = requests.post(f"{at.url}/v1/audio", data=content, headers=key, timeout=30).json()
        assert answer == {"got": content.hex(), "key": "Bearer key"}
        assert at.ask(model="unknown").status_code == 404
        for path in ("/v1/load_lora_adapter", "/v1/x/../load", "/v1/%6coad_lora_adapter"):
            request = requests.Request(
                "POST", f"{at.url}/v1/x", json={"lora_name": "x", "lora_path": "/"}
            ).prepare()
            request.url = f"{at.url}{path}"
            assert requests.Session().send(request, timeout=30).status_code == 403
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            at.ask(stream=True, messages=[{"role": "user", "content": "break"}])
        for of in ("mlflow", "engine"):
            assert (
                time.time() - at.metric(f'olora_follow_last_answer_timestamp_seconds{{of="{of}"}}')
                < 30
            )
        engine.shutdown()
        engine.server_close()
        answer = at.ask()
        assert answer.status_code == 502
        assert answer.text.startswith(f"the engine {engine.url} does not answer: ")
        assert not at.healthy()
    assert not printed("Traceback")


@pytest.mark.parametrize("stream", [False, True])
def test_rows_have_both_answers(versions: Versions, tmp_path: Path, stream: bool) -> None:
    engine, rows = Engine("vllm", versions.base), tmp_path / "rows.jsonl"
    at = Listening(engine, "--share", "1", "--rows", str(rows))
    versions.point("1")
    versions.point("2", "challenger")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(lambda: printed("answers at") == 2)
        assert at.answered(5, stream=stream) == {f"{NAME}@1": 5}
        until(lambda: rows.exists() and len(rows.read_text().splitlines()) == 5)
        engine.fails = "2"
        assert at.answered(5, stream=stream) == {f"{NAME}@1": 5}
        until(lambda: printed("refuses /v1/chat/completions: 500"))
    for row in map(json.loads, rows.read_text().splitlines()):
        question, answer = row["messages"]
        assert question == {"role": "user", "content": "Hello"}
        assert f"/{NAME}-1-" in answer["content"]
        assert f"/{NAME}-2-" in row["olora_ray"].pop("answer")
        assert row["olora_ray"] == {
            "champion": f"{NAME}@1",
            "challenger": f"{NAME}@2",
            "finish_reason": "stop",
        }
    assert not printed("Traceback")


def test_versions_that_no_engine_of_this_base_can_serve(versions: Versions, tmp_path: Path) -> None:
    merged, other = versions.register(Contents(versions.base)), versions.add(digest="0123+4567")
    with said() as lines:
        assert Watch(f"{NAME}@{merged}", versions.server.uri, tmp_path).look() is None
    assert "is not an adapter that this project registered" in "".join(lines)
    found = Watch(f"{NAME}@{other}", versions.server.uri, tmp_path).look()
    assert found
    with refused("has other weights than its own"):
        found.check_base(str(versions.base))


def test_a_damaged_copy_is_fetched_again(versions: Versions, tmp_path: Path) -> None:
    for _ in range(2):
        found = Watch(f"{NAME}@1", versions.server.uri, tmp_path).look()
        assert found
        file = found.folder / "adapter_model.safetensors"
        assert file.read_bytes() == (versions.adapter("1") / file.name).read_bytes()
        file.write_bytes(b"damaged")
