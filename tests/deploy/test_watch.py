"""What an operator sees: each panel and alert, in a real Prometheus with a scrape of 60 s, and each slow part named."""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
import torch.distributed as dist
from ray._private.telemetry import open_telemetry_metric_recorder as ray_agent
from ray.util import metrics as ray_metrics

from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.worker import StopRequests, train_at
from olora_ray.common import collectives
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.prometheus import Telemetry
from olora_ray.train.loader import StepLoader
from olora_ray.train.tree import TreeSum
from tests import tiny
from tests.cluster.test_sharded_worker import Context
from tests.cluster.test_worker import SETTINGS, Channel
from tests.crew import Crew
from tests.families import zoo
from tests.families.variants import ALL
from tests.prometheus import MINUTE, about, alerts, prometheus

USUAL = 0.1
"""Seconds that each micro-batch takes longer on every worker, so that a busy machine is no slow worker."""
PLANTS: dict[str, dict[str, float]] = {
    "even": {},
    "uneven": {"train__global_batch": 3},
    "worker": {"worker": 2 * USUAL},
    "exchange": {"exchange": 4 * USUAL, "train__steps": 15},
    "store": {"store": 4 * USUAL, "train__steps": 15},
}
"""Name of a run -> the seconds by which a part of it is slow, and changed settings."""
FIRING = {
    "SlowWorker": {"worker"},
    "SlowExchange": {"exchange"},
    "SlowStore": {"store"},
    "FollowSilent": {"engine"},
    "FollowFails": {"chats@champion"},
}
MINUTES = 30
PAIRS = {"eval/pairs/preferred": 0.9, "eval/pairs/margin": 7.0, "eval/pairs/chosen": -0.5}
"""What an evaluation has beside the loss in a run on pairs."""


def slow(patch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
    function = getattr(owner, name)

    def slowly(*words: Any) -> Any:
        time.sleep(seconds)
        return function(*words)

    patch.setattr(owner, name, slowly)


def run(model: Path, storage: Path, plant: dict[str, float]) -> list[Any]:
    """Train with a part that is slow, and return what this worker tells the driver."""
    own = plant if dist.get_rank() == 1 else {}
    settings: dict[str, Any] = {**SETTINGS, "evaluation__samples": 0, "model__name": str(model)}
    settings |= {"cluster__workers": 2, "train__global_batch": 2, "train__micro_batch": 1}
    settings |= {"train__steps": 23, "train__eval_every": 23, "train__checkpoint_every": 23}
    settings |= {name: value for name, value in plant.items() if "__" in name}

    base = BaseModel("m", str(model), str(model))
    spec = TrainSpec(
        tiny.decided(**settings), base, "tokenizer", (1,), tiny.store(8), tiny.store(3, seed=9)
    )
    channel = Channel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequests, "_listen", lambda self: None)
        slow(patch, TreeSum, "leaf", USUAL + own.get("worker", 0.0))
        slow(patch, StepLoader, "read", own.get("store", 0.0))
        slow(patch, collectives, "sum_in_place", plant.get("exchange", 0.0))
        result = train_at(Context(), spec, str(storage), channel)
    assert result.problem is None
    return [message for message in channel.messages if isinstance(message, (dict, str))]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the two workers of each run told: those of rank 0, then those of rank 1."""
    folder = tmp_path_factory.mktemp("watch")
    zoo.build(ALL["llama"], folder / "model")
    crew = Crew(2)
    try:
        return {
            name: crew.run(run, folder / "model", folder / name, plant)
            for name, plant in PLANTS.items()
        }
    finally:
        crew.close()


def test_the_slow_worker_is_named_once_and_no_other_one(told: dict[str, list[Any]]) -> None:
    said = {
        (name, rank): [line for line in lines if isinstance(line, str) and "is slow" in line]
        for name, workers in told.items()
        for rank, lines in enumerate(workers)
    }
    (line,) = said.pop(("worker", 1))
    assert line.startswith("worker 1 on ")
    assert not any(said.values())


class Agent(ray_agent.OpenTelemetryMetricRecorder):
    """Ray's agent of a node, at a time that the test sets; it gets every metric that this process sets."""

    now = 0

    def monotonic(self) -> float:
        return self.now

    def metric(self, kind: str, name: str, text: str, *words: Any) -> Any:
        buckets = words[:1] if kind == "histogram" else ()
        getattr(self, f"register_{kind}_metric")(name, text, *buckets)
        tags: dict[str, str] = {}

        def record(value: float = 1.0) -> None:
            self.set_metric_value(name, tags, value)

        return SimpleNamespace(set_default_tags=tags.update, set=record, inc=record, observe=record)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    agent = Agent(gauge_metric_ttl_seconds=20)
    monkeypatch.setattr(ray_agent, "time", agent)
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, partial(agent.metric, kind.lower()))
    return agent


def scraped(at: int, minute: int) -> Iterator[str]:
    """Yield what an agent, a night of an hour ago and `olora-ray follow` export; its engine is away for ten minutes."""
    lines = prometheus_client.generate_latest().decode().splitlines()
    lines += f"""
olora_night_last_success_timestamp_seconds{{model="chats"}} {at - 3600}
olora_night_last_decision_timestamp_seconds{{model="chats"}} {at - 3600}
olora_champion_since_timestamp_seconds{{model="chats"}} {at - 3600}
olora_held_out_uses{{model="chats"}} 3
olora_follow_requests_total{{model="chats@champion",version="7",code="200"}} {100 * minute}
olora_follow_requests_total{{model="chats@champion",version="7",code="502"}} {10 * minute}
olora_follow_version{{model="chats@champion"}} 7
olora_follow_from_cache{{model="chats@champion"}} 0
olora_follow_rows_left_out_total {minute}
olora_follow_answers_kept_total {minute}
olora_follow_answers_left_out_total{{reason="not_whole"}} {minute}
olora_follow_last_answer_timestamp_seconds{{of="mlflow"}} {at}
olora_follow_last_answer_timestamp_seconds{{of="engine"}} {at - 600}
""".splitlines()
    for line in lines:
        if "olora_" in line and not line.startswith("#"):
            yield f"{line} {at}\n"


def test_each_panel_and_alert_has_a_number_in_each_minute_and_names_what_is_slow(
    told: dict[str, list[Any]], agent: Agent, tmp_path: Path
) -> None:
    """Half an hour of the runs beside each other: a driver gets a row in 30 s, and refreshes its gauges each second."""
    begin = int(time.time()) - 2 * MINUTES * MINUTE
    last = begin + MINUTES * MINUTE
    runs = []
    for name, (lines, _) in told.items():
        rows = [line for line in lines if isinstance(line, dict)]
        runs.append((Telemetry(name), itertools.cycle(rows[-10:-1])))
        runs[-1][0].started(2, again=False)
        runs[-1][0].row(rows[-1] | PAIRS)
    samples = ""
    for now in range(begin, last + 1):
        agent.now = now
        for telemetry, rows_of_run in runs:
            if (now - begin) % 30 == 0:
                telemetry.row(next(rows_of_run))
                telemetry.saved(0.5)
            telemetry.refresh()
        if (now - begin) % MINUTE == 0:
            samples += "".join(scraped(now, (now - begin) // MINUTE))
    with prometheus(tmp_path, samples=samples) as server:
        assert server.blank(about(""), begin + MINUTE, last) == []
        assert set(server.ask("label/run/values")) == told.keys()
        firing = {
            name: {who for who, values in server.numbers(text, last, last).items() if values == [1]}
            for name, text in alerts().items()
        }
    assert {name: found for name, found in firing.items() if found} == FIRING
