"""Fixtures for all tests, and their threads: one a process, since the models are tiny and processes share cores."""

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from tests import tiny
from tests.crew import Crew

torch.set_num_threads(1)

hypothesis.settings.register_profile("olora", deadline=None, derandomize=True, max_examples=40, print_blob=False)
hypothesis.settings.load_profile("olora")


def pytest_configure(config: pytest.Config) -> None:
    # Our own code and tests warn about nothing.
    for module in ("olora_ray", "tests"):
        config.addinivalue_line("filterwarnings", f"error:::{module}")


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
