"""The files of a finished run or of a version, in the form that others need, and compared with the trained model.

Adapter and merged model are copies, or the merged model is made of the adapter and its base; further forms are made of
these by an exporter (exporter.py).
"""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from olora_ray.adapter.peft_folder import read_adapter, replacing
from olora_ray.common.errors import UserError, of_problems
from olora_ray.config.schema import AnyConfig
from olora_ray.config.tables import FORMS
from olora_ray.model.load import skeleton
from olora_ray.model.source import BaseModel
from olora_ray.model.stored import groups
from olora_ray.pipeline import merge, model_files
from olora_ray.pipeline.base import with_tokenizer
from olora_ray.pipeline.exporter import Trained, exporter_named, system_message
from olora_ray.pipeline.parity import MergedFolder, Parity, check_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """The kept files of a run or a version, on this machine."""

    name: str
    about: str
    config: AnyConfig
    """With the base model as `model`."""
    adapter: Path | None
    base: BaseModel | None
    """The base model of `adapter`."""
    merged: Path | None
    compressed: bool = False
    """True if `adapter` is an approximation of what was trained (export.rank)."""
    system: str | None = None
    """The system message of all training rows, if the version has kept it."""

    @property
    def form(self) -> str:
        """The form that was registered."""
        return "merged" if self.merged else "adapter"


def write(found: Given, form: str, precision: str, target: Path) -> str:
    """Write one form into `target`, and return the result of the comparison; raise UserError if it differs."""

    if form == "adapter" and found.adapter is None:
        raise UserError(
            f"argument --form: {found.about} is a merged model without its adapter; use --form merged"
        )
    if form not in FORMS:
        # Before the merge, which takes minutes for a large model.
        base = found.base or _model_in(found.merged)
        shape = skeleton(base, found.config.model)
        why = exporter_named(form).problem(base, shape, found.config, precision)
        if why:
            raise UserError(f"argument --form: {form}: {why}")
    with replacing(target) as out:
        if form == "adapter":
            return _write_adapter(found, out)
        if form == "merged":
            return _write_merged(found, out)
        return _write_further(found, form, precision, out)


def _model_in(folder: Path | None) -> BaseModel:
    return BaseModel(str(folder), str(folder), "")


def _write_adapter(found: Given, out: Path) -> str:
    assert found.adapter
    assert found.base
    shutil.copytree(found.adapter, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    shape = skeleton(found.base, found.config.model)
    adapter, scale = read_adapter(found.adapter, shape)
    parity = Parity(None, check_adapter(out, shape, adapter, scale), "not compared")
    if not parity.ok:
        raise of_problems(f"{found.about} as adapter differs", parity.problems())
    return parity.in_words()


def _write_merged(found: Given, out: Path) -> str:
    if found.merged:
        shutil.copytree(found.merged, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    if found.adapter is None or found.base is None:
        return "each file has the checksum with which the version was registered"
    base = Path(found.base.folder)
    shape = skeleton(found.base, found.config.model)
    adapter, scale = read_adapter(found.adapter, shape)
    share = groups(base, shape, adapter)
    if not found.merged:
        logger.info(f"merging {found.about} into its base model")
        merge.copy_files(base, out)
        merge.merge(base, out, share, adapter, scale)
        model_files.copy_tokenizer(found.adapter, out)
        model_files.end_with(out, with_tokenizer(_model_in(out), found.config).eos)
    changed = tuple(merge.changed(base, out, share))
    if found.compressed:
        weights = merge.Worst(
            0.0, "", "float32"
        )  # the run merged the adapter before it was compressed
    else:
        weights = merge.check_weights(base, out, share, adapter, scale)
    problems = MergedFolder(weights, changed).problems()
    if problems:
        raise of_problems(f"{found.about} as merged differs", problems)
    if found.compressed:
        return "the weights that have no adapter are the base model's"
    return f"each merged weight is base + change, rounded to {weights.stored}"


def _write_further(found: Given, form: str, precision: str, out: Path) -> str:
    """Write the form of an exporter, from files in a temporary folder beside `out`."""

    exporter = exporter_named(form)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent) as given:
        source = Path(given)
        if exporter.needs == "adapter":
            checked = _write_adapter(found, source)
            model = found.base
        else:
            checked = _write_merged(found, source)
            model = _model_in(source)
        assert model
        shape = skeleton(model, found.config.model)
        eos = with_tokenizer(model, found.config).eos
        system = found.system or system_message(found.config.data.train)
        trained = Trained(found.name, shape, found.config, eos, system)
        exporter.write(trained, source, out, precision)
    return checked
