"""`make serving-demo`: what the port of `olora-ray follow` costs and survives, beside the engine without it. As root.

An engine's stand-in, the port and MLflow are processes; this one is the clients. Prints a table of goals, and fails if
one is missed. For forged versions and for the dashboards it runs their tests.
"""

import asyncio
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests

from tests.ray_head import free_port
from tests.serving.engine import Printed, following
from tests.serving.versions import FOLLOWED, Versions, registered
from tests.waiting import until

MIB = 2**20
DISK = "1m"
"""Of the kept answers: room for those of `cost`, not for all that come after them."""


@dataclass
class Row:
    goal: str
    found: str
    kept: bool


@dataclass
class Port:
    """The engine, started as often as asked, and the port."""

    base: Path
    engine: str
    url: str
    process: subprocess.Popen[bytes] | None = None

    def start(self, pace: float = 0.0) -> None:
        """Start the engine, anew if it runs; `pace`: seconds before each part of its answers."""
        self.stop()
        words = [sys.executable, "-m", "tests.serving.engine", str(self.base)]
        port = self.engine.rpartition(":")[2]
        environment = {**os.environ, "ENGINE_PACE": str(pace)}
        self.process = subprocess.Popen([*words, port], env=environment)
        until(lambda: code(f"{self.engine}/health") == 200)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def engine_name(self) -> str:
        """The name by which the engine knows the champion's version."""
        (found,) = requests.get(f"{self.engine}/v1/models", timeout=30).json()["data"][1:]
        return str(found["id"])

    def restarted(self, pace: float = 0.0) -> str:
        self.start(pace)
        until(lambda: code(f"{self.url}/health") == 200)
        return self.engine_name()


def code(url: str, **body: Any) -> int:
    try:
        if body:
            return requests.post(url, json=body, timeout=30).status_code
        return requests.get(url, timeout=30).status_code
    except requests.RequestException:
        return 0


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "model": model, **more}


async def load(
    url: str, model: str, number: int, at_once: int, **more: Any
) -> tuple[Counter[str], list[float]]:
    """Ask so often; return how often which code came, and the seconds to each first byte."""
    seconds: list[float] = []
    free = asyncio.Semaphore(at_once)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask() -> str:
            async with free:
                begun = time.perf_counter()
                try:
                    async with session.post(
                        f"{url}/v1/chat/completions", json=chat(model, **more)
                    ) as answer:
                        first = await answer.content.readany()
                        seconds.append(time.perf_counter() - begun)
                        text = first + await answer.read()
                        whole = not more.get("stream") or text.endswith(b"[DONE]\n\n")
                        return f"{answer.status}" if whole else "broken"
                except aiohttp.ClientError as error:
                    return type(error).__name__

        found = Counter(await asyncio.gather(*(ask() for _ in range(number))))
    return found, seconds


def many(port: Port) -> Row:
    name = port.restarted(pace=0.05)
    alone, _ = asyncio.run(load(port.engine, name, 2000, 1000, stream=True))
    found, _ = asyncio.run(load(port.url, FOLLOWED, 10_000, 1000, stream=True))
    shown = f"engine {dict(alone)} of 2,000, port {dict(found)}"
    return Row("10,000 streams of 1,000 clients: all whole", shown, found == {"200": 10_000})


def health(port: Port) -> Row:
    """Restart the engine; a chat right after each good /health must not be a 404."""
    found = Counter[tuple[int, int]]()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            good = code(f"{port.url}/health")
            if good == 200:
                found[good, code(f"{port.url}/v1/chat/completions", **chat(FOLLOWED))] += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        port.start()
        time.sleep(3)
    over.set()
    watcher.join()
    wrong = sum(number for (_, chatted), number in found.items() if chatted == 404)
    shown = f"{found.total()} good ones in 5 restarts, {wrong} before a 404"
    return Row("/health is never 200 when a chat would get 404", shown, wrong == 0)


def cost(port: Port, how: str = "") -> list[Row]:
    name = port.restarted()
    one: dict[str, list[float]] = {port.engine: [], port.url: []}
    for _ in range(4):  # by turns, because the machine may be busy
        for url, model in ((port.engine, name), (port.url, FOLLOWED)):
            one[url] += asyncio.run(load(url, model, 250, 1))[1]
    alone, through = (1000 * statistics.median(each) for each in one.values())
    name = port.restarted(pace=0.5)
    many: dict[str, list[float]] = {port.engine: [], port.url: []}
    for _ in range(3):
        for url, model in ((port.engine, name), (port.url, FOLLOWED)):
            many[url] += asyncio.run(load(url, model, 200, 200, stream=True))[1]
    first, second = (1000 * statistics.median(each) for each in many.values())
    return [
        Row(
            f"added median of one client below 3 ms{how}",
            f"{alone:.2f} ms, with port {through:.2f} ms",
            through - alone < 3,
        ),
        Row(
            f"200 streams: at most 1.2 times to the first byte{how}",
            f"{first:.0f} ms, with port {second:.0f} ms: {second / first:.2f}",
            second < 1.2 * first,
        ),
    ]


def bombs(port: Port, printed: Printed, folder: Path) -> list[Row]:
    name = port.restarted()
    asyncio.run(load(port.url, FOLLOWED, 100, 1))
    before = printed.memory
    large = json.dumps(chat(FOLLOWED, padding="x" * (30 * MIB))).encode()
    contents = {
        "bomb": gzip.compress(bytes(400 * MIB), 1),
        "large": large,
        "zeros": bytes(64 * MIB),
    }
    senders = []
    for each, content in contents.items():
        (folder / each).write_bytes(content)
        words = ["curl", "-s", "-o", "/dev/null", "-H", "Content-Encoding: gzip", "-T"]
        words += [str(folder / each), "-X", "POST", f"{port.url}/v1/chat/completions"]
        senders += [subprocess.Popen(words) for _ in range(8)]
    waited: dict[str, list[float]] = {port.engine: [], port.url: []}
    while any(sender.poll() is None for sender in senders):
        for url, model in ((port.engine, name), (port.url, FOLLOWED)):
            waited[url] += asyncio.run(load(url, model, 20, 1))[1]
    more = (printed.memory - before) / MIB
    alone, through = (max(each) for each in waited.values())
    return [
        Row("memory at most 100 MB above the start", f"{more:.0f} MB", more < 100),
        Row(
            "a bomb costs nobody else 0.1 s",
            f"at most {through:.3f} s in {len(waited[port.url])} chats, {alone:.3f} s by the engine",
            through < alone + 0.1,
        ),
    ]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "olora-serving", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def without_room(port: Port, printed: Printed, kept: Path) -> list[Row]:
    """Ask until the disk is full, and more; then remove the folder, and ask again."""
    rows = []
    port.restarted()
    for goal in ("a full disk loses no answer, and is told once", "a removed folder, too"):
        before = printed("--keep: ")
        found, _ = asyncio.run(load(port.url, FOLLOWED, 3000, 200))
        until(lambda before=before: printed("--keep: ") > before, 60)
        told = printed("--keep: ") - before
        rows.append(
            Row(goal, f"{dict(found)}, told {told} time", found == {"200": 3000} and told == 1)
        )
        shutil.rmtree(kept, ignore_errors=True)
    return rows


def without_mlflow(versions: Versions, port: Port, words: list[str], folder: Path) -> Row:
    versions.server.kill()
    port.start()
    with following(FOLLOWED, versions.server.uri, folder, *words):
        begun = time.monotonic()
        until(lambda: code(f"{port.url}/health") == 200, 60)
        waited = time.monotonic() - begun
        found, _ = asyncio.run(load(port.url, FOLLOWED, 137, 10))
    versions.server.start()
    versions.server.wait()
    shown = f"{dict(found)} of 137, {waited:.1f} s after the start"
    return Row("a restart without MLflow serves the last version", shown, found == {"200": 137})


def measure(versions: Versions, folder: Path) -> list[Row]:
    port = Port(versions.base, f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}")
    words = ["--engine", port.engine, "--listen", port.url.removeprefix("http://")]
    port.start()
    try:
        with following(FOLLOWED, versions.server.uri, folder, *words) as printed:
            rows = [*cost(port), *bombs(port, printed, folder), many(port), health(port)]
        with small_disk(folder / "small") as disk:
            keep = ["--keep", str(disk / "kept"), "--keep-share", "1"]
            with following(FOLLOWED, versions.server.uri, folder, *words, *keep) as printed:
                rows += [*cost(port, ", keeping all"), *without_room(port, printed, disk / "kept")]
        rows.append(without_mlflow(versions, port, words, folder))
    finally:
        port.stop()
    return rows


def by_test(goal: str, file: str) -> Row:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "600"]
    done = subprocess.run([*words, file], check=False, capture_output=True, text=True)
    return Row(goal, f"{file}: {done.stdout.strip().splitlines()[-1]}", done.returncode == 0)


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as name, registered(Path(name) / "mlflow", 2) as versions:
        rows = measure(versions, Path(name))
    forged = "no forged version is served, loaded or promoted"
    rows.append(by_test(forged, "tests/tracking/test_forgeries.py"))
    seen = "each query of panels and alerts has a number in each minute; slow parts are named"
    rows.append(by_test(seen, "tests/deploy/test_watch.py"))
    print("| goal | found | |\n|---|---|---|")
    for row in rows:
        print(f"| {row.goal} | {row.found} | {'kept' if row.kept else 'MISSED'} |")
    sys.exit(not all(row.kept for row in rows))


if __name__ == "__main__":
    main()
