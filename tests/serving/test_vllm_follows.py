"""vLLM answers with the version to which an alias points, by this project's plug-in or follower: a real MLflow, load.

`make serve-test` installs vLLM; elsewhere this is skipped.
"""

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from olora_ray.serving.engine import Engine
from olora_ray.serving.watch import Watch
from tests.serving.test_serving import Server, vllm
from tests.serving.versions import FOLLOWED, NAME, Versions, registered
from tests.waiting import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
GOOD, SPOILT, TOO_LARGE = ("1", "2", "3", "4"), "5", "6"


def tokens(number: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(3, 96, (number,), generator=draw)]


# A shared beginning, as of a system message: vLLM keeps its blocks, and must not use them for another version.
PREFIX = tokens(300, 100)
PROMPTS = [PREFIX + tokens(12, seed) for seed in range(8)]
MOVES, ROLLBACKS, REQUESTS, LENGTH = 20, 5, 1000, 12
LATE = 5.0
"""Seconds after a move until which the old version may answer."""


def answer(server: Server, model: str, prompt: list[int]) -> tuple[int, ...]:
    found = server.ask(
        "/v1/completions",
        model=model,
        prompt=prompt,
        max_tokens=LENGTH,
        ignore_eos=True,
        return_token_ids=True,
    )
    return tuple(found["token_ids"])


@torch.inference_mode()
def by_peft(versions: Versions, number: str, prompt: list[int]) -> tuple[int, ...]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(versions.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, versions.adapter(number))
    ids = list(prompt)
    for _ in range(LENGTH):  # not `generate`, which would end at, or never give, the end token
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    with registered(tmp_path_factory.mktemp("vllm"), len((*GOOD, SPOILT))) as found:
        found.spoil(SPOILT)
        assert found.add(rank=16) == TOO_LARGE
        yield found


class Load:
    """Threads that ask all servers for the champion until they are told to stop."""

    def __init__(self, servers: list[Server]) -> None:
        self.answers: list[tuple[float, float, int, tuple[int, ...]]] = []
        """Beginning, end, prompt, tokens."""
        self.failures: list[str] = []
        self._servers, self._stop = servers, threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=[i]) for i in range(4)]

    def _ask(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._stop.is_set():
            server, prompt, begun = (
                draw.randrange(len(self._servers)),
                draw.randrange(len(PROMPTS)),
                time.monotonic(),
            )
            try:
                tokens = answer(self._servers[server], FOLLOWED, PROMPTS[prompt])
                self.answers.append((begun, time.monotonic(), prompt, tokens))
            except Exception as error:
                self.failures.append(repr(error))

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self.threads:
            thread.join()


def prepared(versions: Versions, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Set vLLM's environment, and return its command."""
    for name, value in (
        ("MLFLOW_TRACKING_URI", versions.server.uri),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"),
        ("VLLM_PLUGINS", "olora_ray"),
        ("HOME", str(folder)),
    ):
        monkeypatch.setenv(name, value)
    words = f"vllm serve {versions.base} --tokenizer {versions.base} --enable-lora"
    return f"{words} --max-lora-rank 8 --max-loras 2".split()


def test_two_servers_follow_the_champion_under_load(
    versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = prepared(versions, tmp_path, monkeypatch)
    versions.point("1")
    logs = [tmp_path / "first", tmp_path / "second"]
    with contextlib.ExitStack() as running:
        servers = [running.enter_context(vllm(command, FOLLOWED, log)) for log in logs]

        # What each version answers: by its number, which no alias moves.
        wanted = {
            number: [answer(servers[0], f"{NAME}@{number}", prompt) for prompt in PROMPTS]
            for number in GOOD
        }
        assert all(one != other for one, other in itertools.combinations(wanted.values(), 2))
        for number in GOOD:
            assert wanted[number][0] == by_peft(versions, number, PROMPTS[0])

        def both_answer(number: str) -> bool:
            return all(
                answer(server, FOLLOWED, PROMPTS[0]) == wanted[number][0] for server in servers
            )

        def names(server: Server) -> list[str]:
            listed = requests.get(f"{server.address}/v1/models", timeout=30).json()["data"]
            return [each["id"] for each in listed[1:]]

        def told(text: str) -> bool:
            return all(text in log.read_text() for log in logs)

        until(lambda: both_answer("1"), 60)
        assert set(names(servers[0])) == {FOLLOWED, *(f"{NAME}@{number}" for number in GOOD)}
        body = {"model": FOLLOWED, "prompt": PROMPTS[0], "max_tokens": 1}
        completion = requests.post(
            f"{servers[0].address}/v1/completions", json=body, timeout=60
        ).json()
        assert completion["model"] == FOLLOWED
        moves = [(0.0, time.monotonic(), "1")]
        """When the command that made it the champion began, and ended; and the version."""

        def move(act: Callable[[], str]) -> None:
            begun, number = time.monotonic(), act()
            moves.append((begun, time.monotonic(), number))
            until(lambda: both_answer(number), 60)

        def promote_another() -> str:
            number = draw.choice([each for each in GOOD if each != moves[-1][2]])
            versions.aliases.promote(number, "by test")
            return number

        draw = random.Random(1)
        with Load(servers) as load:
            for i in range(MOVES + ROLLBACKS):
                move(
                    promote_another
                    if i % 5 < 4
                    else lambda: versions.aliases.rollback("by test")[1]
                )
            until(lambda: len(load.answers) >= REQUESTS or load.failures, 600)
        assert not load.failures
        late = [_late(moves, wanted, *each) for each in load.answers]
        print(
            f"{len(late)} answers, {len(moves) - 1} moves; a replaced version answered for at most {max(late):.2f} s"
        )
        assert max(late) < LATE

        # The same by its HTTP interface, without the plug-in: `olora-ray follow --engine`.
        for number in GOOD[:2]:
            adapter = Watch(f"{NAME}@{number}", versions.server.uri, tmp_path).look()
            assert adapter
            Engine(servers[0].address, None, None, behind=True).serve("by-http", adapter)
            found = [answer(servers[0], adapter.engine_name, prompt) for prompt in PROMPTS]
            assert found == wanted[number]

        # Versions that must not be loaded: the one before answers, and the log says why.
        for number, why in (
            (
                SPOILT,
                f"{NAME} version {SPOILT}: peft/adapter_model.safetensors was changed after the registration",
            ),
            (TOO_LARGE, "LoRA rank 32 is greater than max_lora_rank 8"),
        ):
            versions.point(number)
            until(lambda text=why: told(text), 60)
            assert both_answer(moves[-1][2])

        # MLflow goes, and comes back.
        versions.server.kill()
        until(lambda: told("MLflow does not answer"), 60)
        assert both_answer(moves[-1][2])
        versions.server.start()
        versions.server.wait()
        move(promote_another)


def _late(
    moves: list[tuple[float, float, str]],
    wanted: dict[str, list[tuple[int, ...]]],
    begun: float,
    ended: float,
    prompt: int,
    tokens: tuple[int, ...],
) -> float:
    """Seconds between the end of the command that replaced the version of an answer, and the answer's beginning."""
    (number,) = [each for each, answers in wanted.items() if answers[prompt] == tokens]
    ends = [*(done for _, done, _ in moves[1:]), float("inf")]
    terms = [
        end
        for (since, _, each), end in zip(moves, ends, strict=True)
        if each == number and since <= ended
    ]
    assert terms, f"version {number} answered before it was the champion"
    return max(0.0, begun - terms[-1])
