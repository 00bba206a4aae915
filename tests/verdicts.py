"""Exports that are right, and exports with one error in them, for the verdict to tell apart."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from olora_ray.adapter.initialise import initialise
from olora_ray.adapter.inject import find_targets, inject
from olora_ray.adapter.layer import AdapterWeights
from olora_ray.config.schema import Adapter
from olora_ray.model import stored
from olora_ray.pipeline import merge
from olora_ray.pipeline.parity import Folders, MergedFolder, Parity, check_adapter, measure_logits
from tests import tiny
from tests.export_parts import Case, random_adapter, skeleton_of
from tests.families import zoo
from tests.families.variants import ALL

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "mixtral": lambda: zoo.make(ALL["mixtral"]),
}
RATES = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2)
MERGED, PLAIN = "model.safetensors", "adapter_model.safetensors"


class Draw:
    """One export: family, precision, settings, steps and learning rate follow from its number."""

    def __init__(self, number: int, folder: Path, gross: bool = False) -> None:
        self.random = random.Random(number)
        self.number, self.folder = number, folder
        self.family = list(FAMILIES)[number % 3]
        self.dtype = (torch.float32, torch.bfloat16)[number // 3 % 2]
        self.steps, self.rate = self.random.randint(1, 20), self.random.choice(RATES)
        if gross:  # an error in a change that is rounded away whole leaves the right files
            self.steps, self.rate = self.random.randint(5, 20), self.random.choice(RATES[2:])
        settings = Adapter(
            method=self.random.choice(("olora", "olora", "lora")),
            rank=self.random.randint(2, 6),
            alpha=self.random.choice((2.0, 8.0, 32.0)),
            rank_stabilized=self.random.random() < 0.3,
        )
        base = _base(self.family, self.dtype, folder.parent)
        self.case = Case(base, settings, self._trained(base, settings), torch.empty(0))
        self.case.model = _skeleton(base)

    def __str__(self) -> str:
        settings = self.case.settings
        return (
            f"{self.number} ({self.family}, {self.dtype}, {settings.method}, r {settings.rank}, alpha"
            f" {settings.alpha:g}, {self.steps} steps at {self.rate:g})"
        )

    def _trained(self, base: Path, settings: Adapter) -> dict[str, AdapterWeights]:
        """An adapter after some steps of AdamW: of a real loss where layers can be trained, else at random."""
        from transformers import AutoModelForCausalLM

        if self.family == "mixtral":
            return self._walked(settings)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        targets = find_targets(model, "all-linear", settings.rank)
        factors, _ = initialise(
            targets, settings.method, settings.rank, self.number, torch.device("cpu")
        )
        adapted = inject(model, factors, settings.scale())
        optimizer = torch.optim.AdamW(
            [part for layer in adapted.values() for part in (layer.da, layer.db)], self.rate
        )
        generator = torch.Generator().manual_seed(self.number)
        for _ in range(self.steps):
            ids = torch.randint(2, tiny.VOCABULARY, (2, 12), generator=generator)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        return {name: layer.weights() for name, layer in adapted.items()}

    def _walked(self, settings: Adapter) -> dict[str, AdapterWeights]:
        model = _skeleton(_base(self.family, self.dtype, self.folder.parent))
        stacks = [name for name, part in model.named_parameters() if part.ndim == 3]
        names = [*find_targets(model, "all-linear", settings.rank), *stacks]
        found = {}
        for seed, name in enumerate(names):
            start = random_adapter(model, name, settings.rank, seed)
            generator = torch.Generator().manual_seed(self.number)
            da, db = torch.zeros_like(start.da), torch.zeros_like(start.db)
            for _ in range(self.steps):
                for part in (da, db):
                    part += self.rate * torch.randn(part.shape, generator=generator).sign()
            found[name] = AdapterWeights(start.factors, da, db)
        return found

    def prompts(self) -> list[torch.Tensor]:
        """Tiny ones or long ones."""
        generator = torch.Generator().manual_seed(self.number)
        sizes = (
            [self.random.randint(1, 3) for _ in range(5)]
            if self.random.random() < 0.5
            else [120, 60]
        )
        return [torch.randint(2, tiny.VOCABULARY, (1, size), generator=generator) for size in sizes]

    def export(self) -> None:
        """Write both folders as a run does."""
        self.case.write_merged(self.folder / "merged")
        self.case.write_adapter(self.folder / "adapter")

    def verdict(self, logits: bool = False) -> Parity:
        """As a run comes to it; the weights alone decide unless logits are asked for too."""
        case, merged, plain = self.case, self.folder / "merged", self.folder / "adapter"
        found = stored.groups(case.base, case.model, case.adapter)
        worst = merge.check_weights(case.base, merged, found, case.adapter, case.scale)
        changed = tuple(merge.changed(case.base, merged, found))
        peft = check_adapter(plain, case.model, case.adapter, case.scale)
        if not logits:
            return Parity(MergedFolder(worst, changed), peft, "not asked for")
        folders = Folders(case.base, merged, plain, False)
        cpu = torch.device("cpu")
        measured = measure_logits(
            folders, case.model, found, case.adapter, case.scale, self.prompts(), cpu
        )
        return Parity(MergedFolder(worst, changed), peft, measured)

    def layer(self, stack: bool = False) -> str:
        """One of the adapted layers."""
        names = [name for name, item in self.case.adapter.items() if not stack or item.da.ndim == 3]
        return self.random.choice(names)


_bases: dict[tuple[str, torch.dtype, Path], Path] = {}


def _base(family: str, dtype: torch.dtype, place: Path) -> Path:
    key = (family, dtype, place)
    if key not in _bases:
        _bases[key] = place / f"{family}-{dtype}"
        FAMILIES[family]().to(dtype).save_pretrained(_bases[key])
    return _bases[key]


@cache
def _skeleton(base: Path) -> Any:
    return skeleton_of(base)


def _edit(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(
        {name: part.contiguous() for name, part in tensors.items()}, file, metadata={"format": "pt"}
    )


def _with(draw: Draw, **changes: Any) -> Case:
    return Case(
        draw.case.base,
        draw.case.settings,
        changes.get("adapter", draw.case.adapter),
        torch.empty(0),
    )


def left_out_of_the_merge(draw: Draw) -> None:
    """A layer of the merged folder keeps the base's weight."""
    gone = draw.layer()
    fewer = {name: item for name, item in draw.case.adapter.items() if name != gone}
    _with(draw, adapter=fewer).write_merged(draw.folder / "merged")


def left_out_of_the_adapter(draw: Draw) -> None:
    """A layer is not in the adapter folder."""
    gone = draw.layer()
    fewer = {name: item for name, item in draw.case.adapter.items() if name != gone}
    _with(draw, adapter=fewer).write_adapter(draw.folder / "adapter")


def wrong_scale(draw: Draw) -> None:
    """The merge used another scale."""
    case = draw.case
    factor = draw.random.choice((0.5, 0.95, 1.05, 2.0))
    case.settings = case.settings.model_copy(update={"alpha": case.settings.alpha * factor})
    case.write_merged(draw.folder / "merged")
    case.settings = case.settings.model_copy(update={"alpha": case.settings.alpha / factor})


def wrong_alpha(draw: Draw) -> None:
    """adapter_config.json has the run's alpha, or another flag of its scale."""
    file = draw.folder / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    change = draw.random.choice(
        ({"lora_alpha": fields["lora_alpha"] * 1.5}, {"use_rslora": not fields["use_rslora"]})
    )
    file.write_text(json.dumps(fields | change))


def transposed_factor(draw: Draw) -> None:
    """A matrix is written row for column, in its own shape."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = draw.random.choice(list(tensors))
        tensors[name] = tensors[name].T.reshape(tensors[name].shape)

    _edit(draw.folder / "adapter" / PLAIN, change)


def swapped_factor(draw: Draw) -> None:
    """Two layers have each other's matrix, or a layer's directions are in another order in one of its two."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = draw.random.choice(list(tensors))
        same = [
            other
            for other in tensors
            if other != name and tensors[other].shape == tensors[name].shape
        ]
        if same and draw.random.random() < 0.5:
            other = draw.random.choice(same)
            tensors[name], tensors[other] = tensors[other], tensors[name]
        else:
            tensors[name] = tensors[name].flip(0 if "lora_A" in name else 1)

    _edit(draw.folder / "adapter" / PLAIN, change)


def stale_file(draw: Draw) -> None:
    """A file of an earlier step lies in the place of the new one."""
    older = {
        name: replace(item, da=item.da * 0.9, db=item.db * 0.9)
        for name, item in draw.case.adapter.items()
    }
    if draw.random.random() < 0.5:
        _with(draw, adapter=older).write_merged(draw.folder / "merged")
    else:
        _with(draw, adapter=older).write_adapter(draw.folder / "adapter")


def one_experts_slice(draw: Draw) -> None:
    """One expert of a stack has another's change; of a family without experts, a row another's."""
    name = draw.layer(stack=draw.family == "mixtral")
    item = draw.case.adapter[name]
    order = torch.arange(len(item.db))
    order[:2] = torch.tensor([1, 0])
    changed = replace(item, db=item.db[order], da=item.da[order] if item.da.ndim == 3 else item.da)
    case = _with(draw, adapter={**draw.case.adapter, name: changed})
    if draw.random.random() < 0.5:
        case.write_merged(draw.folder / "merged")
    else:
        case.write_adapter(draw.folder / "adapter")


def one_byte_elsewhere(draw: Draw) -> None:
    """A bit of a tensor that no adapter changes."""
    adapted = {entry.name for group in _groups(draw.case) for entry in group.stored}
    others = [
        entry
        for name, entry in stored.tensors(draw.folder / "merged").items()
        if name not in adapted
    ]
    entry = draw.random.choice(others)
    place = draw.random.randrange(entry.start, entry.end)
    with (draw.folder / "merged" / entry.file).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << draw.random.randrange(8))]))


def _groups(case: Case) -> list[Any]:
    return stored.groups(case.base, case.model, case.adapter)


PLANTED: tuple[Callable[[Draw], None], ...] = (
    left_out_of_the_merge,
    left_out_of_the_adapter,
    wrong_scale,
    wrong_alpha,
    transposed_factor,
    swapped_factor,
    stale_file,
    one_experts_slice,
    one_byte_elsewhere,
)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an export, to see whether an error has changed any."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
