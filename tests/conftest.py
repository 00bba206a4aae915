"""Fixtures for all tests, and their threads: one a process, since the models are tiny and processes share cores."""

import gc
import json
import logging
import multiprocessing.process
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("MLFLOW_TRACKING_URI", None)  # each test has a database of its own

import hypothesis
import pytest
import torch

from olora_ray.common import logs, node_cache
from olora_ray.data.tokenizer_spec import TokenizerSpec
from tests import tiny
from tests.crew import Crew
from tests.installed import installed, olora_ray, wheel  # noqa: F401  # fixtures
from tests.s3_server import bucket, s3_server  # noqa: F401  # fixtures
from tests.tokens import helpers

DURATIONS = Path(__file__).with_name("durations.json")
LENGTHY = 0.3  # seconds of a test, of which make quick leaves out those that take longer

torch.set_num_threads(1)
gc.disable()  # until all tests are imported, which takes a sixth less

hypothesis.settings.register_profile(
    "olora", deadline=None, derandomize=True, max_examples=40, print_blob=False
)
hypothesis.settings.load_profile("olora")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-processes",
        action="store_true",
        help="skip a test at the moment at which it starts a process",
    )
    parser.addoption(
        "--record-durations", action="store_true", help=f"write {DURATIONS.name}: make durations"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Our own code and tests warn about nothing.
    for module in ("olora_ray", "comparison", "tests"):
        config.addinivalue_line("filterwarnings", f"error:::{module}")
    if config.getoption("--no-processes"):
        config.pluginmanager.register(NoProcesses())
    if config.getoption("--record-durations"):
        config.pluginmanager.register(Durations())


class Durations:
    """Records what all cases of a test take, in seconds of the processor, since others use it at the same time."""

    def __init__(self) -> None:
        self.fixtures: dict[str, float] = {}
        self.tests: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef.argname] = time.process_time() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        start = time.process_time()
        try:
            return (yield)
        finally:
            # Each test pays for the fixtures that it shares, since without the others it would be the first.
            shared = sum(self.fixtures.get(name, 0) for name in item.fixturenames)
            name = _function(item)
            self.tests[name] = max(self.tests.get(name, 0), shared) + time.process_time() - start

    def pytest_sessionfinish(self) -> None:
        lengthy = {
            name: round(spent, 1) for name, spent in sorted(self.tests.items()) if spent > LENGTHY
        }
        DURATIONS.write_text(json.dumps(lengthy, indent=0) + "\n", encoding="utf-8")


class NoProcesses:
    """Skips a test at the moment at which it starts a process."""

    def __init__(self) -> None:
        self.in_a_test = False
        sys.addaudithook(self.look)
        # multiprocessing's own way to start a process has no event.
        start = multiprocessing.process.BaseProcess.start
        multiprocessing.process.BaseProcess.start = lambda process: self.skip() or start(process)  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self.in_a_test = True
        try:
            return (yield)
        finally:
            self.in_a_test = False

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        # The standard library asks a few programs about the machine while modules are imported.
        if event in ("os.posix_spawn", "os.fork") or (
            event == "subprocess.Popen"
            and os.path.basename(arguments[0]) not in ("uname", "ldconfig", "gcc", "ld")
        ):
            self.skip()

    def skip(self) -> None:
        if self.in_a_test:
            pytest.skip("starts a process")


@pytest.hookimpl(tryfirst=True)  # before -m looks at them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lengthy = json.loads(DURATIONS.read_text(encoding="utf-8"))
    for item in items:
        if _function(item) in lengthy:
            item.add_marker("lengthy")
        if "ray_with" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_no_garbage() -> None:
    """A full collection of garbage takes 0.3 s if it looks at all that torch, transformers and MLflow import."""
    gc.collect(1)
    gc.freeze()


@pytest.fixture(autouse=True)
def what_is_told_is_each_tests_own() -> Iterator[None]:
    """A test that lets its process speak as a driver, or be silent as a trial, does so for itself alone."""
    package = logging.getLogger(logs.PACKAGE)
    level, propagate, handlers = package.level, package.propagate, list(package.handlers)
    yield
    package.setLevel(level)
    package.propagate, package.handlers = propagate, handlers


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a node keeps is not the developer's."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(node_cache, "CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's folder for temporary files, of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """A factory of small random Llama models: `tiny_llama(vocab_size=64, ...)`, always the same weights."""
    return tiny.llama


@pytest.fixture(scope="session")
def crew() -> Iterator[Callable[[int], Crew]]:
    """`crew(n).run(function, *arguments)`: n processes with a gloo process group, started once a session."""
    started: dict[int, Crew] = {}

    def get(workers: int) -> Crew:
        if workers not in started or not started[workers].alive():
            started[workers] = Crew(workers)
        return started[workers]

    yield get
    for found in started.values():
        found.close()


@pytest.fixture(scope="session")
def tiny_spec() -> TokenizerSpec:
    return helpers.spec()


@pytest.fixture
def ray_with() -> Iterator[Callable[[int], None]]:
    """`ray_with(cpus)` starts a Ray of its own with so many CPUs, in place of the one before."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }.items():
        os.environ.setdefault(name, value)
    import ray

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path must be short

    def start(cpus: int) -> None:
        ray.shutdown()
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _temp_dir=folder,
        )

    yield start
    time.sleep(1)  # a call from Ray's own threads after the shutdown would end this process
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a node that has kept nothing yet."""
    monkeypatch.setattr(node_cache, "CACHE", str(tmp_path / "node"))
    return tmp_path / "node"
