"""One model through a complete run without Ray, compared with the model's own results (oracle.py).

The checks call the product's own functions in the order of a run. The base is opened and its size is estimated. A
worker creates its starting point, trains, evaluates and answers. The export writes, merges and compares. The
measurements in between know nothing of a family. Each call into the product that may change is in one function of
this file.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from olora_ray.adapter.inject import find_targets
from olora_ray.cluster.decide import decide
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.cluster.spec import TrainSpec
from olora_ray.cluster.start import starting_point
from olora_ray.cluster.worker import StopRequests, Worker
from olora_ray.cluster.worker_context import SharedBase, SharedBaseContext
from olora_ray.common.errors import UserError, first_line
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.decided import DecidedConfig, with_values
from olora_ray.pipeline import prepare
from olora_ray.pipeline.base import Base, open_base
from olora_ray.pipeline.export import export_run
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.collate import collate
from tests import tiny
from tests.families import oracle, zoo
from tests.families.row import BEFORE, PRECISIONS, Row
from tests.families.variants import LONGEST, Variant

CPU = torch.device("cpu")
STEPS = 4
PACKS = [tiny.pack(26, 21, 15, seed=1), tiny.pack(12, 30, seed=2), tiny.pack(19, 9, 18, 14, seed=3)]
# Rows that are trained on: random rows teach nothing about others, so the first adapter would be the best.
HELD_OUT = PACKS[:2]


@dataclass(frozen=True)
class Reference:
    """The model's own results for PACKS, in float32."""

    losses: Tensor
    # Gradients of the mean loss by the weights that are adapted.
    slopes: dict[str, Tensor]


@dataclass
class State:
    """The data that the stages of one check pass on."""

    folder: Path
    config: DecidedConfig
    row: Row
    base: Base = field(init=False)
    spec: TrainSpec = field(init=False)
    context: SharedBaseContext = field(init=False)
    worker: Worker = field(init=False)
    # Losses with the adapter that is exported: the best one.
    trained: Tensor = field(init=False)
    step: int = 0

    @property
    def packs(self) -> list[Any]:
        # The training data in the layout of the run.
        return PACKS if self.row.packs else tiny.unpacked(PACKS)


def check(
    variant: Variant, precision: str, folder: Path, build: Callable[..., None] = zoo.build
) -> Row:
    """Check everything about one variant; `folder` is empty and may be deleted afterwards."""
    quiet_transformers()
    build(variant, folder / "model", PRECISIONS[precision])
    row = Row(variant.name, precision)
    state = State(folder, _config(folder, precision), row)
    if _ends_well(state, _open, _start):
        reference = _ask_model(state)
        if _ends_well(state, partial(_measure, reference), _train, _export):
            row.stage = "end"
    return row


def _ends_well(state: State, *stages: Callable[[State], None]) -> bool:
    """Run stages of the product; return False, with the reason noted, if one ends in an error."""
    row = state.row
    for stage in stages:
        row.stage = getattr(stage, "func", stage).__name__.strip("_")
        try:
            stage(state)
        except UserError as error:
            late = (
                ""
                if row.stage in BEFORE
                else f" after step {state.step}"
                if state.step
                else " after the start"
            )
            row.end = f"refused{late}: {_shown(error, state)}"
            return False
        except Exception as error:
            row.end = f"traceback at {row.stage}: {type(error).__name__}: {_shown(first_line(error), state)}"
            return False
    return True


def _config(folder: Path, precision: str) -> DecidedConfig:
    return tiny.decided(
        run__storage=str(folder / "runs"),
        model__name=str(folder / "model"),
        model__dtype=str(PRECISIONS[precision]).removeprefix("torch."),
        data__train=[{"path": "unused.jsonl", "format": "messages"}],
        data__max_length=LONGEST,
        data__eval_fraction=0.1,
        train__steps=STEPS,
        train__global_batch=3,
        train__checkpoint_every=STEPS,
        train__eval_every=2,
        train__schedule="constant",
        evaluation__samples=2,
        evaluation__max_new_tokens=3,
    )


def _shown(error: object, state: State) -> str:
    """A message without the paths of this machine."""
    return (
        str(error)
        .replace(str(state.folder / "model"), "MODEL")
        .replace(str(state.folder), "FOLDER")
    )


def _open(state: State) -> None:
    """Do what the driver does with a model before it starts anything."""
    state.base = open_base(state.config)
    state.config = with_values(
        state.config, DecidedConfig, {"data.packing": state.base.spec.apart is None}
    )
    here = ClusterFacts.here(state.config.cluster)
    data = prepare.read_data(state.config, state.base)
    prepare.plan(decide(state.config, data, state.base.model, here), state.base.model)


def _start(state: State) -> None:
    """Run a worker up to the first step."""
    row, config, base = state.row, state.config, state.base
    row.packs = config.data.packing
    train: Any = tiny.ListStore(state.packs)
    held_out: Any = tiny.ListStore(HELD_OUT if row.packs else tiny.unpacked(HELD_OUT))
    state.spec = TrainSpec(
        tiny.decided(config), base.model, base.spec.digest, base.eos, train, held_out
    )
    state.context = SharedBaseContext(SharedBase.of(state.spec, CPU))
    checkpoints = RunFolder(config.folder()).checkpoints
    start = starting_point(state.context, state.spec, checkpoints)
    state.worker = Worker(state.context, state.spec, checkpoints, _Channel(state), start)
    row.attention, row.adapters = state.worker.attention, len(state.worker.trainer.adapted)


def _ask_model(state: State) -> Reference:
    """Measure the model itself, without the product."""
    row, folder, shapes = state.row, state.folder / "model", _shapes(state)
    model = oracle.load(folder)
    meant = find_targets(model, "all-linear", state.config.adapter.rank)
    # A layer inside an output head does not count as missed, because it cannot be trained.
    left_out = {
        name: item.whole_shape
        for name, item in meant.items()
        if name not in shapes and "head" not in name
    }
    slopes = oracle.gradients(model, PACKS, shapes | left_out)
    found = Reference(oracle.losses(model, PACKS), {name: slopes[name] for name in shapes})
    if row.precision == "bf16":
        rough = oracle.load(folder, torch.bfloat16)
        row.noise = oracle.difference(oracle.losses(rough, PACKS), found.losses)
        row.gradient_noise = oracle.distance(oracle.gradients(rough, PACKS, shapes), found.slopes)
    row.missed = tuple(name for name in left_out if slopes[name].any())
    row.leaks = oracle.leaks(model, PACKS)
    row.covered, row.experts = _covered(model, shapes), _experts(model, shapes)
    return found


def _measure(reference: Reference, state: State) -> None:
    """Measure start, losses and gradients beside the model's own; nothing of the run is changed."""
    row = state.row
    with state.context.activate({}):
        untouched = _losses(state, state.packs)
    with state.context.activate(state.worker.trainer.adapted):
        found = _losses(state, state.packs)
        single = torch.cat([_losses(state, [example]) for example in tiny.unpacked(PACKS)])
        gradients = _gradients(state)
    row.start = torch.equal(found, untouched)
    row.loss, row.packed = (
        oracle.difference(single, reference.losses),
        oracle.difference(found, single),
    )
    row.gradients = oracle.distance(gradients, _expected(state, reference.slopes))
    layers = state.worker.trainer.adapted
    row.still = tuple(
        name
        for name in layers
        if not any(gradients[f"{name}.{part}"].any() for part in ("da", "db"))
    )
    row.judge_start()


def _train(state: State) -> None:
    """Run the rest of the worker: evaluations, answers, steps and a checkpoint."""
    before = state.trained = _of_trainer(state)
    with _nobody_asks_to_stop():
        result = state.worker.run()
    if result.problem is not None:
        raise UserError(result.problem)
    state.row.learnt = oracle.difference(_of_trainer(state), before)
    if (best := state.worker.evaluator.best) is not None:  # it is what is exported
        state.worker.trainer.flat.vector.copy_(best)
    state.trained = _of_trainer(state)
    state.row.judge_training()


def _export(state: State) -> None:
    """Export, then load the results with transformers and PEFT."""
    folder = RunFolder(state.config.folder())
    parity = export_run(state.spec, folder, state.step)
    state.row.parity = "ok" if parity["ok"] else "; ".join(parity["problems"])
    differences = []
    if Path(folder.merged).exists():
        merged = oracle.load(Path(folder.merged))
        differences.append(oracle.difference(oracle.losses(merged, PACKS), state.trained))
    differences.append(
        oracle.difference(oracle.losses(_with_peft(state, folder), PACKS), state.trained)
    )
    state.row.export = max(differences)
    state.row.judge_export()


def _with_peft(state: State, folder: RunFolder) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(oracle.load(state.folder / "model"), folder.adapter).eval()


def _of_trainer(state: State) -> Tensor:
    with state.context.activate(state.worker.trainer.adapted):
        return _losses(state, state.packs)


def _losses(state: State, packs: list[Any]) -> Tensor:
    """The training loss of each supervised token, with the packs as one micro-batch."""
    return state.worker.trainer.loss.each(collate(packs, state.worker.attention))


def _gradients(state: State) -> dict[str, Tensor]:
    """The gradients of one step over all packs; they are cleared again."""
    trainer = state.worker.trainer
    batch = collate(state.packs, state.worker.attention)
    (trainer.loss(batch) / len(batch.labels)).backward()
    found = {name: part.clone() for name, part in trainer.flat.named(trainer.flat.grad).items()}
    trainer.flat.grad.zero_()
    return found


def _expected(state: State, slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients for dA and dB from the gradients G of the weights: at the start s B0^T G and s G A0^T."""
    expected = {}
    for name, layer in state.worker.trainer.adapted.items():
        start, scale = layer.weights().factors, state.config.adapter.scale()
        assert start.b0 is not None
        expected[f"{name}.da"] = scale * start.b0.mT @ slopes[name]
        expected[f"{name}.db"] = scale * slopes[name] @ start.a0.mT
    return expected


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    """(m, n) of each adapted layer, (experts, m, n) of many experts."""
    shapes = {}
    for name, layer in state.worker.trainer.adapted.items():
        weights = layer.weights()
        shapes[name] = (*weights.db.shape[:-1], weights.da.shape[-1])
    return shapes


def _covered(model: Any, names: Collection[str]) -> float:
    """Share of the parameters with an adapter; embeddings and head, which nobody adapts, do not count."""
    ends = {
        id(part.weight)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part
    }
    inner: dict[str, int] = {
        name: part.numel() for name, part in model.named_parameters() if id(part) not in ends
    }
    return sum(inner.get(f"{name}.weight", inner.get(name, 0)) for name in names) / sum(
        inner.values()
    )


def _experts(model: Any, names: Collection[str]) -> str:
    """True if the parameters of experts are adapted; a parameter with all experts of a layer has three dimensions."""
    stacks = [
        name for name, part in model.named_parameters() if "experts" in name and part.dim() == 3
    ]
    adapted = sum(name in names for name in stacks)
    return (
        "none" if not stacks else "yes" if adapted == len(stacks) else "some" if adapted else "no"
    )


class _Channel:
    """A stand-in for the driver's channel; it records how many steps were done."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.send = SimpleNamespace(remote=self._note)
        self.wait_for_stop = SimpleNamespace(remote=lambda: None)

    def _note(self, message: Any) -> None:
        if isinstance(message, dict):
            self.state.step = max(self.state.step, int(message["step"]))


@contextmanager
def _nobody_asks_to_stop() -> Iterator[None]:
    with patch.object(StopRequests, "_listen", lambda self: None):
        yield
