"""`olora-ray follow` loads the version to which an alias points: a real MLflow, and stand-ins for the engines."""

import asyncio
import gzip
import json
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from olora_ray.serving import follow
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

    def chat(self, **body: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "Hello"}], "model": FOLLOWED, **body}

    def ask(self, **body: Any) -> requests.Response:
        url = f"{self.url}/v1/chat/completions"
        return requests.post(url, json=self.chat(**body), timeout=30)

    async def ask_at_once(self, number: int, **body: Any) -> Counter[str]:
        """Ask so often at the same time; return how often which code came, or which error."""
        url = f"{self.url}/v1/chat/completions"
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask() -> str:
                try:
                    async with session.post(url, json=self.chat(**body)) as answer:
                        text = await answer.text()
                        whole = not body.get("stream") or text.endswith("[DONE]\n\n")
                        return f"{answer.status} {'whole' if whole else 'broken'}"
                except aiohttp.ClientError as error:
                    return type(error).__name__

            return Counter(await asyncio.gather(*(ask() for _ in range(number))))

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
        versions.point("1")
        versions.aliases.client.delete_registered_model_alias(NAME, "challenger")
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
        assert answer["got"] == content.hex()
        assert answer["headers"]["authorization"] == "Bearer key"
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
        engine.stop()
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


def test_many_streams_at_the_usual_limit_of_files(versions: Versions, tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of the clients and the engine
    engine = Engine("vllm", versions.base)
    at = Listening(engine)
    versions.point("1")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(at.healthy)
        engine.pace = 1.0  # all of them are open at once
        for _ in range(2):
            found = asyncio.run(at.ask_at_once(600, stream=True, max_tokens=3))
            assert found == {"200 whole": 600}
        engine.pace = 0
        before = engine.connections
        at.answered(20)
        assert engine.connections - before < 3  # they are kept
        engine.drops = 1
        at.answered(20)
        assert engine.drops == 0  # and one that is closed costs no answer
        engine.pace = 1.0
        with pytest.raises(requests.Timeout):
            requests.post(f"{at.url}/v1/chat/completions", json=at.chat(), timeout=0.3)
        until(lambda: engine.left == 1)
    assert not printed("Traceback")


def test_a_large_or_compressed_body_stops_nobody(versions: Versions, tmp_path: Path) -> None:
    engine = Engine("vllm", versions.base)
    at = Listening(engine)
    versions.point("1")
    bomb = gzip.compress(bytes(400 * 2**20), 1)
    large = json.dumps(at.chat(padding="x" * (30 * 2**20))).encode()
    waited = []

    def send(content: bytes, **headers: str) -> requests.Response:
        return requests.post(f"{at.url}/v1/audio", data=content, headers=headers, timeout=60)

    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(at.healthy)
        at.answered(5)
        before = printed.memory
        senders = [
            threading.Thread(target=send, args=[content], kwargs={"Content-Encoding": "gzip"})
            for content in [bomb] * 4 + [large] * 16
        ]
        for sender in senders:
            sender.start()
        while any(sender.is_alive() for sender in senders):
            begun = time.monotonic()
            at.answered(1)
            waited.append(time.monotonic() - begun)
        assert max(waited) < 2  # clients and engine share this process; alone it is milliseconds
        assert printed.memory - before < 100 * 2**20
        found = send(bomb, **{"Content-Encoding": "gzip"}).json()
        assert (found["bytes"], found["headers"]["content-encoding"]) == (len(bomb), "gzip")
        assert send(bytes(33 * 2**20)).status_code == 413
        answer = requests.post(f"{at.url}/v1/chat/completions", data=large, timeout=60)
        assert answer.headers["x-olora-version"] == f"{NAME}@1"
        # What vLLM takes in a head.
        long = {"x-long": "x" * 50_000, "Content-Encoding": "zstd"}
        answer = requests.post(f"{at.url}/v1/audio?q={'q' * 50_000}", headers=long, timeout=60)
        assert len(answer.headers["x-long"]) == 50_000
        assert answer.json()["headers"]["content-encoding"] == "zstd"
    assert not printed("Traceback")


def test_what_clients_see_while_the_engine_has_names_of_versions(
    versions: Versions, tmp_path: Path
) -> None:
    engine = Engine("vllm", versions.base, version="0.30.0")  # it caches by names
    at = Listening(engine)
    versions.point("1")
    versions.point("2", "challenger")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(lambda: printed("answers at") == 2)
        listed = requests.get(f"{at.url}/v1/models", timeout=30).json()["data"]
        assert {each["id"] for each in listed} == {"base", FOLLOWED, CHALLENGER}
        assert at.ask().json()["model"] == FOLLOWED
        lines = at.ask(stream=True).text.split("\n\n")[:-2]
        assert {json.loads(line[6:])["model"] for line in lines} == {FOLLOWED}
        for number in "21212":
            versions.point(number)
            until(lambda number=number: f"{NAME}@{number}" in at.answered(1))
            at.answered(5)  # compares the version with what has answered
        until(lambda: len(engine.served) == 1)
    assert printed("0.32 were tried") == 0


def test_health_is_never_better_than_a_chat(versions: Versions, tmp_path: Path) -> None:
    engine = Engine("vllm", versions.base)
    at = Listening(engine)
    versions.point("1")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words):
        until(at.healthy)
        for _ in range(5):
            engine.stop()
            assert not at.healthy()
            engine.start()
            until(at.healthy)
            assert at.ask().status_code == 200
        engine.served.clear()  # the chat hears of it first
        assert at.ask().status_code == 503
        until(at.healthy)


def test_a_start_without_mlflow_takes_the_last_version(versions: Versions, tmp_path: Path) -> None:
    engine = Engine("vllm", versions.base)
    at = Listening(engine)
    recalled = f'olora_follow_from_cache{{model="{FOLLOWED}"}}'
    versions.point("2")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words):
        until(at.healthy)
    engine.stop()
    engine.start()
    versions.server.kill()
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(at.healthy, 60)
        assert at.answered(5) == {f"{NAME}@2": 5}
        assert at.metric(recalled) == 1
        assert printed("version 2 is what it named last")
        versions.server.start()
        versions.server.wait()
        until(lambda: at.metric(recalled) == 0, 60)
        versions.point("1")
        until(lambda: f"{NAME}@1" in at.answered(1), 60)
    assert not printed("Traceback")


def test_the_challenger_is_asked_by_eight_at_once(versions: Versions, tmp_path: Path) -> None:
    engine, rows = Engine("vllm", versions.base), tmp_path / "rows.jsonl"
    at = Listening(engine, "--share", "1", "--rows", str(rows))
    versions.point("1")
    versions.point("2", "challenger")
    with following(FOLLOWED, versions.server.uri, tmp_path, *at.words) as printed:
        until(lambda: printed("answers at") == 2)
        engine.pace = 2.0
        assert asyncio.run(at.ask_at_once(30)) == {"200 whole": 30}
        until(lambda: rows.exists() and len(rows.read_text().splitlines()) == 8)
        assert at.metric("olora_follow_rows_left_out_total") == 22
    (most,) = (most for folder, most in engine.busiest.items() if f"/{NAME}-2-" in folder)
    assert most <= 8
    assert rows.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("kind", "version", "said"),
    [
        ("vllm", "0.28.1", "is vLLM 0.28.1; 0.29 to 0.32 were tried: install a newer one"),
        ("vllm", "0.30.0", "would answer with cached blocks of the version before: use --listen"),
        ("vllm", "0.99.0", "vLLM 0.99.0: 0.29 to 0.32 were tried with this project"),
        ("sglang", "0.4.9", "is SGLang 0.4.9; 0.5.10 was tried: install a newer one"),
    ],
)
def test_engines_that_were_not_tried(
    versions: Versions, tmp_path: Path, kind: str, version: str, said: str
) -> None:
    engine = Engine(kind, versions.base, version=version)
    versions.point("1")
    with following(FOLLOWED, versions.server.uri, tmp_path, "--engine", engine.url) as printed:
        until(lambda: printed(said))
        if "99" in version:
            until(lambda: engine.served)
    assert printed(said) == 1
    assert len(engine.served) == ("99" in version)


def test_a_key_is_not_shown_in_the_list_of_processes() -> None:
    with refused("argument --key: expected env:VARIABLE or file:/PATH"):
        words = [FOLLOWED, "--engine", "http://127.0.0.1:1", "--tracking-uri", "http://127.0.0.1:1"]
        follow.main([*words, "--key", "sk-123"])
