"""A worker without Ray: it resumes where it was, with the best adapter, and measures the base model once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from olora_ray.cluster import ray_internals, worker
from olora_ray.cluster.channel import Started
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.worker import train_at
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.common.storage import digest_json
from olora_ray.config.load import override
from olora_ray.model.source import BaseModel
from olora_ray.sweep import shared_work
from olora_ray.tokens.plan import CHOSEN, REJECTED
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.loss import SupervisedLoss
from tests import example_objective, tiny
from tests.families import zoo
from tests.families.variants import ALL
from tests.said import said
from tests.train.test_pairs import packs

SETTINGS: dict[str, Any] = {
    "train__steps": 6,
    "train__checkpoint_every": 3,
    "train__eval_every": 2,
    "train__keep": 9,
    "evaluation__samples": 1,
    "evaluation__max_new_tokens": 2,
    "adapter__dropout": 0.1,
}


class Channel:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.send = SimpleNamespace(remote=self.messages.append)
        self.wait_for_stop = SimpleNamespace(remote=lambda: None)

    def metrics(self, name: str) -> dict[int, float]:
        rows = [
            message for message in self.messages if isinstance(message, dict) and name in message
        ]
        assert len({row["step"] for row in rows}) == len(rows)
        return {int(row["step"]): row[name] for row in rows}


def train(
    folder: Path,
    measured_on: Any = None,
    model: Any = None,
    trained_on: Any = None,
    **changes: Any,
) -> tuple[TrainResult, Channel]:
    store = trained_on or tiny.store(8)
    held_out = measured_on or tiny.store(3, seed=9)
    settings = tiny.decided(**(SETTINGS | changes))
    base = BaseModel("m", "/m", type(model).__name__)  # the node keeps what passes of a base
    spec = TrainSpec(settings, base, "tokenizer", (1,), store, held_out)
    channel = Channel()
    shared = SharedBase(
        SupervisedLoss(model or tiny.llama(attention="segments")), torch.device("cpu")
    )
    return train_at(SharedBaseContext(shared), spec, str(folder), channel), channel


def test_a_model_that_cannot_answer_is_trained_without_answers(tmp_path: Path) -> None:
    def fails(**_: Any) -> Any:
        raise ValueError("no cache of this shape")

    model = tiny.llama(attention="segments")
    model.generate = fails
    with said() as lines:
        result, channel = train(tmp_path / "one", model=model)
    assert (result.problem, result.answers) == (None, ())
    assert list(channel.metrics("train/loss")) == [1, 2, 3, 4, 5, 6]
    [line] = [line for line in lines if "cannot" in line]
    assert line.startswith("warning: evaluation.samples: LlamaForCausalLM cannot generate")
    result, _ = train(tmp_path / "two", model=model, evaluation__scorer="exact_match")
    assert result.problem.startswith("evaluation.scorer: LlamaForCausalLM cannot generate")


@pytest.mark.parametrize(
    ("micro", "settings"),
    [
        (4, "train.micro_batch=2 or data.max_length=8"),
        (1, "train.activation_checkpointing=true or data.max_length=8"),
    ],
)
def test_a_step_without_memory_names_the_settings_that_need_less(
    tmp_path: Path, micro: int, settings: str
) -> None:
    model = tiny.llama(attention="segments")
    steps = []

    def gathers(*_: Any) -> None:
        steps.append(torch.is_grad_enabled())
        if sum(steps) > 8:
            torch.empty(2**50)  # more than any machine has

    model.model.register_forward_pre_hook(gathers)
    result, channel = train(tmp_path, model=model, train__micro_batch=micro, data__max_length=16)
    assert Started(1) in channel.messages
    begin = f"a worker has too little memory for train.micro_batch={micro} and data.max_length=16: set {settings} ("
    assert result.problem.startswith(begin)
    assert not result.passes


def resumptions(channel: Channel) -> list[Started]:
    return [
        each
        for each in channel.messages
        if isinstance(each, Started) and each.resumed_from is not None
    ]


def adapter(folder: Path, step: int, best: bool = False) -> dict[str, torch.Tensor]:
    """The adapter after a step, or the best until then, which may be that of the start: zero."""
    found = checkpoints.read(str(folder / checkpoints.name_of(step)))
    return {
        name: torch.cat([weights.da.flatten(), weights.db.flatten()])
        for name, weights in (found.best_adapter() if best else found.adapter).items()
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


Whole = tuple[Path, TrainResult, Channel]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder)


def test_a_run_is_told_step_by_step(whole: Whole) -> None:
    folder, result, channel = whole
    assert channel.messages.count(Started(1)) == 1
    assert list(channel.metrics("train/loss")) == [1, 2, 3, 4, 5, 6]
    assert list(channel.metrics("eval/loss")) == [0, 2, 4, 6]
    assert checkpoints.names(str(folder)) == [checkpoints.name_of(step) for step in (0, 3, 6)]
    assert (result.problem, result.interrupted, result.stopped_early) == (None, None, False)
    assert [list(pair.before) for pair in result.answers] == result.state.before


def test_a_part_of_another_run_s_change_is_measured_once_and_never_trained(
    whole: Whole, tmp_path: Path
) -> None:
    """That run could have stopped early, before its last step."""
    full = checkpoints.read(str(whole[0] / checkpoints.name_of(3)))
    part = {name: each.shrunk(None, 0.5) for name, each in full.adapter.items()}
    state = replace(
        full.state, best_loss=None, best_step=None, history=full.state.history[:1], shrunk=0.5
    )
    place = tmp_path / checkpoints.name_of(3)
    checkpoint.save(place, part, None, full.optimizer, state, full.identity, "")
    result, channel = train(tmp_path)
    assert channel.metrics("train/loss") == {}
    [loss] = channel.metrics("eval/loss").values()
    assert loss not in whole[2].metrics("eval/loss").values()
    found = checkpoints.read(str(place))
    assert (found.state.step, found.state.best_step, found.state.best_loss) == (3, 3, loss)
    assert same(adapter(tmp_path, 3, best=True), adapter(tmp_path, 3))
    assert len(result.answers) == 1
    again, channel = train(tmp_path)
    assert (again.state, channel.metrics("eval/loss")) == (result.state, {})


def test_an_installed_objective_is_trained_and_measured_to_the_end(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with example_objective.installed(monkeypatch, tmp_path):
        result, channel = train(tmp_path / "run", train__objective="examples")
    assert result.problem is None
    assert list(channel.metrics("train/hard")) == [1, 2, 3, 4, 5, 6]
    assert list(channel.metrics("eval/hard")) == [0, 2, 4, 6]
    assert channel.metrics("eval/perplexity") == {}
    losses = channel.metrics("eval/loss")
    assert list(losses) == [0, 2, 4, 6]
    assert losses[6] < losses[0]
    assert losses != whole[2].metrics("eval/loss")
    assert list(whole[2].metrics("eval/perplexity")) == [0, 2, 4, 6]


@pytest.mark.parametrize("lost", [(6,), (6, 3)])
def test_a_resumed_run_ends_with_the_same_bytes(
    whole: Whole,
    tmp_path: Path,
    lost: tuple[int, ...],
    without_new_factors: Callable[[], None],
) -> None:
    train(tmp_path)
    for step in lost:
        (tmp_path / checkpoints.name_of(step) / "manifest.json").unlink()
    if 3 not in lost:  # the initialisation is in the checkpoint
        without_new_factors()
    result, channel = train(tmp_path)
    at = 0 if 3 in lost else 3
    resumed = resumptions(channel)
    rows = (
        4 if at else 0
    )  # the base model's, and one per step; the first checkpoint comes before all
    assert [(each.resumed_from, each.workers, len(each.history)) for each in resumed] == [
        (at, 1, rows)
    ]
    assert same(adapter(tmp_path, 6), adapter(whole[0], 6))
    assert result.answers == whole[1].answers
    assert channel.metrics("eval/loss").items() <= whole[2].metrics("eval/loss").items()


class Pairs(tiny.ListStore):
    """A token store of pairs and rows; the file of its reference lies in a folder."""

    reference: Any = ()

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        roles = (0, CHOSEN, REJECTED)
        packs = [replace(tiny.pack(5, 9, 7, seed=seed), roles=roles) for seed in range(8)]
        super().__init__(packs)
        self.uri = str(folder)

    def __getitem__(self, index: int) -> Any:
        pack = super().__getitem__(index)
        return replace(pack, reference=self.reference[index]) if self.reference else pack


def test_a_resumed_run_with_pairs_measures_a_lost_reference_again_and_takes_no_other(
    tmp_path: Path,
) -> None:
    """The present adapter has other losses than the first one."""
    changes = {"train__objective": "pairs", "adapter__dropout": 0.0, "evaluation__samples": 0}

    def trained(name: str) -> tuple[TrainResult, Path]:
        store = Pairs(tmp_path / f"store-{name}")
        result, _ = train(tmp_path / name, store, trained_on=store, **changes)
        [file] = Path(store.uri).iterdir()
        return result, file

    _, whole = trained("whole")
    _, lost = trained("resumed")
    lost.unlink()
    (tmp_path / "resumed" / checkpoints.name_of(6) / "manifest.json").unlink()
    _, again = trained("resumed")
    assert again.read_bytes() == whole.read_bytes()
    assert same(adapter(tmp_path / "resumed", 6), adapter(tmp_path / "whole", 6))

    content = json.loads(again.read_text())
    content["losses"][0][0] += 1.0
    content["sha256"] = digest_json(content["losses"])
    again.write_text(json.dumps(content))
    (tmp_path / "resumed" / checkpoints.name_of(6) / "manifest.json").unlink()
    result, _ = trained("resumed")
    assert result.problem.startswith("reference: token store")


def test_trials_with_pairs_read_the_reference_of_their_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base(*_: Any) -> SharedBase:
        return SharedBase(SupervisedLoss(tiny.llama(attention="segments")), torch.device("cpu"))

    monkeypatch.setattr(SharedBase, "of", base)
    store = Pairs(tmp_path / "store")
    changes = {"adapter__dropout": 0.0, "evaluation__samples": 0, "train__steps": 2}
    config = tiny.decided(train__objective="pairs", **changes)
    made: Any = store
    spec = TrainSpec(config, BaseModel("m", "/m", "base"), "tokenizer", (1,), made, made)
    folder = str(tmp_path / "shared")
    with said() as lines:
        shared_work.make(spec, folder, [])
        assert len([*Path(store.uri).iterdir()]) == 1  # before trials run side by side
        for method in ("lora", "olora", "pissa"):
            trial = replace(
                spec, config=override(config, {"adapter.method": method}), shared=folder
            )
            context = SharedBaseContext(base())
            result = train_at(context, trial, str(tmp_path / method), Channel())
            assert result.problem is None
            assert result.state.reference.keys() == {store.digest}
    assert sum("measuring the losses before the first step" in line for line in lines) == 1


def test_a_run_that_is_made_longer_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its data and random numbers are those of a run of that length, and its rates from there on."""
    flat: dict[str, Any] = {"train__schedule": "constant", "train__warmup": 0.0}
    for schedule in (flat, {}):
        short, long = tmp_path / f"short{len(schedule)}", tmp_path / f"long{len(schedule)}"
        train(short, **schedule)
        _, whole = train(long, train__steps=10, **schedule)
        result, channel = train(short, train__steps=10, **schedule)
        assert [each.resumed_from for each in resumptions(channel)] == [6]
        later = {step: rate for step, rate in whole.metrics("train/lr").items() if step > 6}
        assert channel.metrics("train/lr") == later
        assert [row["step"] for row in result.state.history if "train/loss" in row] == list(
            range(1, 11)
        )
        assert same(adapter(short, 10), adapter(long, 10)) == bool(schedule)
    moments = [
        (tmp_path / name / checkpoints.name_of(10) / checkpoint.OPTIMIZER)
        for name in ("short2", "long2")
    ]
    assert moments[0].read_bytes() == moments[1].read_bytes()


def test_a_run_of_some_steps_goes_on_in_epochs_unless_these_are_fewer(tmp_path: Path) -> None:
    train(tmp_path)
    result, _ = train(tmp_path, train__steps=None, train__epochs=1)  # 8 sequences are 2 steps
    assert result.problem.startswith(
        "train.epochs: the run has already done 6 steps, and train.epochs=1 gives 2"
    )
    result, _ = train(tmp_path, train__steps=None, train__epochs=4)
    assert result.state.step == 8


RESUMED: dict[str, dict[str, Any]] = {
    "two rates and another optimizer": {
        "adapter__method": "pissa",
        "train__lr_ratio": 4.0,
        "train__optimizer": "preconditioned",
    },
    "spectral": {"train__optimizer": "spectral"},
    "an automatic rate": {"train__lr": "auto", "train__lr_factor": 0.5},
    # By a clear margin, since on other processors sums round differently.
    "a best adapter of before": {"train__lr": 0.2, "train__schedule": "constant"},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_what_a_run_has_decided_is_kept_through_a_resume(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    first, whole = train(tmp_path / "whole", **settings)
    train(tmp_path / "cut", **settings)
    (tmp_path / "cut" / checkpoints.name_of(6) / "manifest.json").unlink()
    again, resumed = train(tmp_path / "cut", **settings)
    assert [each.resumed_from for each in resumptions(resumed)] == [3]
    assert resumed.metrics("train/lr").items() < whole.metrics("train/lr").items()
    assert same(adapter(tmp_path / "cut", 6), adapter(tmp_path / "whole", 6))
    assert again.state.best_step == first.state.best_step
    assert again.answers == first.answers
    if settings.get("train__lr") == 0.2:
        assert first.state.best_step < 4
    if settings.get("train__lr") == "auto":
        assert max(whole.metrics("train/lr").values()) == pytest.approx(first.state.lr / 2)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_kept_through_a_resume(tmp_path: Path, family: str) -> None:
    train(tmp_path / "whole", model=zoo.make(ALL[family]))
    train(tmp_path / "cut", model=zoo.make(ALL[family]))
    (tmp_path / "cut" / checkpoints.name_of(6) / "manifest.json").unlink()
    _, resumed = train(tmp_path / "cut", model=zoo.make(ALL[family]))
    assert [each.resumed_from for each in resumptions(resumed)] == [3]
    assert any("experts" in name for name in adapter(tmp_path / "cut", 6))
    assert same(adapter(tmp_path / "cut", 6), adapter(tmp_path / "whole", 6))


def test_a_run_that_is_trained_longer_follows_the_law_of_its_rate(tmp_path: Path) -> None:
    first, _ = train(tmp_path, train__lr="auto")
    with said() as lines:
        longer, channel = train(tmp_path, train__lr="auto", train__steps=96)
    assert longer.state.lr == pytest.approx(first.state.lr / 2, rel=0.05)
    assert channel.metrics("train/lr")[7] == pytest.approx(longer.state.lr, rel=0.05)
    assert len([line for line in lines if "96 steps; it was" in line]) == 1


def test_a_rate_that_is_far_too_high_is_told(tmp_path: Path) -> None:
    result, channel = train(tmp_path / "fits", train__lr="auto")
    told = [str(message) for message in channel.messages if "train.lr=auto" in str(message)]
    assert len(told) == 1
    for factor, lines in ((3.0, 0), (8.0, 1), (0.1, 0)):
        _, channel = train(
            tmp_path / f"{factor}", train__lr=result.state.lr * factor, train__steps=1
        )
        assert (
            sum("times the rate that fits" in str(message) for message in channel.messages) == lines
        )


def test_the_base_is_measured_once_in_a_run(tmp_path: Path) -> None:
    train(tmp_path)
    for step in (0, 3, 6):
        (tmp_path / checkpoints.name_of(step) / "manifest.json").unlink()
    kept = json.loads((tmp_path / "baseline.json").read_text())
    (tmp_path / "baseline.json").write_text(json.dumps(kept | {"means": {"loss": 99.0}}))
    _, channel = train(tmp_path)
    assert channel.metrics("eval/loss")[0] == 99.0


@pytest.mark.parametrize(("share", "more"), [(1e9, True), (1e-9, False)])
def test_a_checkpoint_is_due_after_some_seconds_unless_it_costs_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, more: bool
) -> None:
    monkeypatch.setattr(worker, "MOST_LOST", 0.0)
    monkeypatch.setattr(worker, "SHARE", share)
    train(tmp_path)
    saved = set(checkpoints.steps_of(str(tmp_path)))
    assert saved > {0, 3, 6} if more else saved == {0, 3, 6}


def test_another_base_is_a_problem_in_the_result(tmp_path: Path) -> None:
    train(tmp_path)
    result, _ = train(tmp_path, adapter__alpha=4)
    assert "alpha was 8.0, is now 4.0" in result.problem
    started, _ = train(
        tmp_path / "other", adapter__alpha=4, train__start=str(tmp_path / checkpoints.name_of(6))
    )
    assert started.problem.startswith("train.start: ")
    assert "was trained with another adapter; " in started.problem


def test_a_run_may_start_with_the_adapter_of_another(tmp_path: Path) -> None:
    train(tmp_path / "first", measured_on=tiny.store(8))  # on what it trains on it gets better
    place = str(tmp_path / "first" / checkpoints.name_of(6))
    result, channel = train(tmp_path / "second", measured_on=tiny.store(8), train__start=place)
    assert result.problem is None
    best = adapter(tmp_path / "first", 6, best=True)
    assert any(part.any() for part in best.values())
    assert same(adapter(tmp_path / "second", 0), best)
    assert channel.metrics("eval/loss")[0] == pytest.approx(
        min(whole_losses(tmp_path / "first").values())
    )


def whole_losses(folder: Path) -> dict[int, float]:
    rows = checkpoints.read(str(folder / checkpoints.name_of(6))).state.history
    return {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}


def test_a_problem_that_one_worker_meets_alone_is_given_to_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others wait for it in an exchange, over NCCL for half an hour, and the driver waits for them."""
    given: list[TrainResult] = []
    channel = SimpleNamespace(finish=SimpleNamespace(remote=given.append))
    around: dict[tuple[Any, str], Any] = {
        (ray, "get"): lambda call: call,
        (ray_internals, "quiet_train_worker"): lambda: None,
        (worker, "RayTrainContext"): lambda config: SimpleNamespace(rank=0),
        (worker, "give_signs_of_life"): lambda *_: None,
        (worker, "train_at"): lambda *_: TrainResult(problem="model.name: not on every node"),
    }
    for (module, name), instead in around.items():
        monkeypatch.setattr(module, name, instead)
    spec = SimpleNamespace(config=tiny.decided())
    assert given == [worker.train_worker(spec, "", channel)]


def test_a_run_whose_reference_is_of_another_model_ends_before_its_first_step(
    tmp_path: Path,
) -> None:
    settings = {"train__objective": "pairs", "train__steps": 1, "evaluation__samples": 0}
    config = tiny.decided(**settings)

    def problem(folder: str) -> str | None:
        data = tiny.ListStore(packs())
        data.uri = str(tmp_path)
        spec = TrainSpec(config, BaseModel("m", "/m", ""), "tokenizer", (1,), data, None)
        shared = SharedBase(SupervisedLoss(tiny.llama(attention="segments")), tiny.CPU)
        return train_at(SharedBaseContext(shared), spec, str(tmp_path / folder), Channel()).problem

    assert problem("one") is None
    [file] = tmp_path.glob("reference-*.json")
    kept = json.loads(file.read_text())
    kept["losses"][0][0] += 2.0
    kept["sha256"] = digest_json(kept["losses"])
    file.write_text(json.dumps(kept))
    assert "before the first step a pair has a margin of 2 nats" in str(problem("two"))
