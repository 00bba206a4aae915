"""A base whose workers read only their rows gives the same bits as one that every worker loads whole."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from olora_ray.adapter.initialise import at_scale
from olora_ray.adapter.inject import find_targets, install, wrap
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Config
from olora_ray.train.data_driven import new_factors
from olora_ray.train.held_out import evaluate
from olora_ray.train.loop import Trainer
from olora_ray.train.loss import SupervisedLoss
from olora_ray.train.parallel import load_base, own_rows, place_model
from olora_ray.train.parts import LightRMSNorm
from tests import tiny
from tests.crew import Crews
from tests.families import zoo
from tests.families.variants import ALL
from tests.said import said

CPU = torch.device("cpu")
FAMILIES = [
    "llama",
    "llama tied",
    "qwen2",  # biases
    "qwen3",
    "gemma3_text",  # scaled embeddings, two kinds of frequencies
    "gpt2",  # transposed, tied, stored with another prefix
    "phi3",  # fused
    "mixtral",  # experts stored one by one
    "granitemoe",  # stacks of experts, stored as they are
    "deepseek_v3",  # a stored buffer
    "gemma3",  # a tower for images, names that differ
]

UNEVEN = ["llama tied", "gemma3_text", "gpt2", "mixtral", "deepseek_v3"]
QUICK = {("llama", 2), ("gpt2", 2), ("mixtral", 3)}
"""The others are long proofs."""


@dataclass(frozen=True)
class Outcome:
    """The state and results of a worker."""

    by_rows: bool
    digest: str
    """Of the factors."""
    targets: list[tuple[Any, ...]]
    losses: list[float]
    gradients: list[Tensor]
    adapter: Tensor
    held_out: float
    examples: list[float]
    base: dict[str, Tensor]
    """Weights and buffers, put together again."""
    light: int
    """Norms with a backward pass of our own."""
    lines: list[str]
    """Of the log."""


def config(folder: Path, strategy: str, dtype: str = "float32", **changes: Any) -> Config:
    settings = {
        "model__name": str(folder),
        "model__dtype": dtype,
        "cluster__workers": dist.get_world_size(),
        "cluster__strategy": strategy,
        "adapter__rank": 2,
        "train__micro_batch": 1,
        "train__clip": None,
        "train__steps": 3,
    }
    return tiny.decided(**(settings | changes))


def trained(
    folder: Path, strategy: str, dtype: str = "float32", changes: dict[str, Any] | None = None
) -> Outcome:
    """Load a base, make factors, and train three steps, like a worker without its self-test."""
    settings = config(folder, strategy, dtype, **(changes or {}))
    with said() as lines:
        loss = load_base(str(folder), settings, CPU)
    model = loss.model
    by_rows, adapter, store = loss.read_rows is not None, settings.adapter, tiny.store()
    targets = find_targets(model, adapter.targets, adapter.rank)
    factors, report, _ = new_factors(loss, targets, settings, store, CPU)
    adapted = wrap(model, at_scale(factors, adapter), adapter.scale(), adapter.dropout)
    install(model, adapted)
    place_model(loss, strategy, CPU)
    trainer = Trainer(loss, adapted, settings, CPU)
    gradients = tiny.gradients(trainer)
    attention = tiny.attention_of(model)
    losses = [result.loss for result in tiny.steps(trainer, store, attention=attention)]
    held_out = tiny.store(5, seed=9)
    return Outcome(
        by_rows,
        report.digest,
        [
            (name, target.shape, target.stored_transposed, target.experts)
            for name, target in targets.items()
        ],
        losses,
        gradients,
        trainer.flat.vector.clone(),
        evaluate(trainer, held_out, attention).loss,
        evaluate(trainer, held_out, attention, each=True).losses(),
        _base(loss),
        sum(isinstance(module, LightRMSNorm) for module in model.modules()),
        lines,
    )


@torch.no_grad()
def _base(loss: SupervisedLoss) -> dict[str, Tensor]:
    found = {}
    for name, part in (*loss.model.named_parameters(), *loss.model.named_buffers()):
        if not name.endswith((".da", ".db", ".a0", ".b0")):
            whole = part.data.full_tensor() if isinstance(part.data, DTensor) else part.data
            found[name] = whole.clone()
    return found


def assert_same(one: Outcome, two: Outcome) -> None:
    assert (one.digest, one.targets, one.light) == (two.digest, two.targets, two.light)
    assert one.base.keys() == two.base.keys()
    for name in one.base:
        assert one.base[name].dtype == two.base[name].dtype, name
        assert torch.equal(one.base[name], two.base[name]), name
    assert (one.losses, one.held_out, one.examples) == (two.losses, two.held_out, two.examples)
    assert all(torch.equal(a, b) for a, b in zip(one.gradients, two.gradients, strict=True))
    assert torch.equal(one.adapter, two.adapter)


@pytest.mark.parametrize(
    ("family", "workers", "dtype"),
    [
        pytest.param(
            family, workers, dtype, marks=() if (family, workers) in QUICK else pytest.mark.slow
        )
        for families, workers, dtype in ((FAMILIES, 2, "float32"), (UNEVEN, 3, "bfloat16"))
        for family in families
    ],
)
def test_bytes_are_those_of_ddp(
    crew: Crews, tmp_path: Path, family: str, workers: int, dtype: str
) -> None:
    zoo.build(
        ALL[family], tmp_path, torch.float32
    )  # in bfloat16 it is rounded on the way, slice by slice
    for whole, sharded in zip(
        crew(workers).run(trained, tmp_path, "ddp", dtype),
        crew(workers).run(trained, tmp_path, "fsdp", dtype),
        strict=True,
    ):
        assert (whole.by_rows, sharded.by_rows) == (False, True)
        assert_same(sharded, whole)


def _parts(
    folder: Path, changes: dict[str, Any] | None = None
) -> tuple[int, int, int, dict[str, tuple[int, int, int]]]:
    """Return per block the bytes that this worker has read, its memory and the total, and the rows of each weight."""
    before = _read_so_far()
    loss = load_base(str(folder), config(folder, "fsdp", **(changes or {})), CPU)
    read = _read_so_far() - before
    parameters = {
        name: parameter.data
        for name, parameter in loss.model.named_parameters()
        if ".layers." in name
    }
    local = sum(part.to_local().nbytes for part in parameters.values() if isinstance(part, DTensor))
    rows = {
        name: (*own_rows(part), part.to_local().shape[0])
        for name, part in parameters.items()
        if isinstance(part, DTensor)
    }
    assert len(rows) == len(parameters)
    model = loss.model
    embeddings = model.get_input_embeddings().weight.data
    assert not isinstance(embeddings, DTensor)
    assert str(folder / "model") in _file_of(embeddings)
    return read, local, sum(part.nbytes for part in parameters.values()), rows


def _file_of(part: Tensor) -> str:
    """Return the file whose pages a tensor uses."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= part.data_ptr() < last:
            return line.split(maxsplit=5)[-1]
    raise AssertionError("no memory")


def _read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not count what a process reads"
)
def test_a_worker_reads_and_keeps_its_part_alone(crew: Crews, tmp_path: Path) -> None:
    model = tiny.llama(vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    model.save_pretrained(tmp_path, max_shard_size="10MB")
    for workers in (2, 3):
        crew(workers).run(_parts, tmp_path)  # imports are files as well
        found = crew(workers).run(_parts, tmp_path)
        for read, local, whole, _ in found:
            assert local == pytest.approx(whole / workers, rel=0.02)
            assert local < read < local + 0.05 * whole
        for name, (*_, rows) in found[0][3].items():
            assert rows == found[0][3][name][1] - found[0][3][name][0]
            ranges = [each[3][name][:2] for each in found]
            assert ranges[0][0] == 0
            assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))


def test_copies_of_a_sharded_base(crew: Crews, tmp_path: Path) -> None:
    zoo.build(ALL["mixtral"], tmp_path)
    wide = {"train__global_batch": 8, "cluster__fsdp_replicas": 2}
    whole = crew(4).run(trained, tmp_path, "ddp", "float32", {"train__global_batch": 8})
    for one, other in zip(
        whole, crew(4).run(trained, tmp_path, "fsdp", "float32", wide), strict=True
    ):
        assert other.by_rows
        assert_same(other, one)
    found = crew(4).run(_parts, tmp_path, wide)
    for read, _, size, _ in found:
        assert read > size / 2
    assert found[0][3] == found[2][3]
    assert found[1][3] == found[3][3]
    assert found[0][3] != found[1][3]
    assert found[0][1] + found[1][1] == pytest.approx(found[0][2], rel=0.01)


@pytest.mark.parametrize("other", [0, 1])
def test_a_base_that_cannot_be_read_by_rows_is_loaded_whole(
    crew: Crews, tmp_path: Path, other: int
) -> None:
    """A tied model stores its head, too, with the same or with other numbers."""
    zoo.build(ALL["llama tied"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + other
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (whole, _), (sharded, second) = (
        crew(2).run(trained, tmp_path, strategy) for strategy in ("ddp", "fsdp")
    )
    why = "the model shares model.embed_tokens.weight and lm_head.weight, but both are stored"
    assert (
        f"fsdp: each worker loads the complete base model before sharding it, because {why}"
        in sharded.lines
    )
    assert not sharded.by_rows
    for one in (sharded, second):
        assert_same(one, whole)


def _loaded_from_places(places: list[Path]) -> Any:
    return load_base(str(places[dist.get_rank()]), config(places[0], "fsdp"), CPU)


def test_what_one_worker_cannot_read_all_workers_say(crew: Crews, tmp_path: Path) -> None:
    good, cut = tmp_path / "good", tmp_path / "cut"
    for folder in (good, cut):
        zoo.build(ALL["llama"], folder)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    answers = crew(2).run(_loaded_from_places, [good, cut])
    assert all(isinstance(answer, UserError) for answer in answers)
    assert str(answers[0]) == str(answers[1])
    assert "is cut off" in str(answers[0])
