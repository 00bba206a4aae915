"""Export of a finished training: adapter and merged model, written and checked in Ray tasks."""

import contextlib
import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from olora_ray.adapter import merge, portable
from olora_ray.adapter.parity import Folders, Logits, MergedFolder, Parity, check_adapter, measure_logits
from olora_ray.adapter.peft_folder import compress, new_adapter, replacing
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.logs import quiet_transformers
from olora_ray.config.schema import Config
from olora_ray.data import chat_template
from olora_ray.data.tokenizer_spec import adds_begin_token
from olora_ray.model.folder import parameters
from olora_ray.model.load import end_tokens, load_tokenizer, tokenizer_in, too_large
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.pipeline import export_shares
from olora_ray.pipeline.connection import user_errors
from olora_ray.pipeline.export_shares import Compressed, OnOriginal, Spread, Work
from olora_ray.pipeline.export_shares import compressed_loss as measure
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import models
from olora_ray.train import checkpoints
from olora_ray.train.checkpoint import TrainState

logger = logging.getLogger(__name__)

# What an exported folder needs so that others ask and answer as the training did: template, tokenizer, end tokens.


def give_template(config: Config, base: BaseModel, folder: Path) -> None:
    """A base without a chat template was trained with the default one: its users need it too."""
    if _of_chats(config) and not models.has_chat_template(folder):
        template = chat_template.default(adds_begin_token(load_tokenizer(base, config.model)))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)  # a processor's, which was not trained with


def _of_chats(config: Config) -> bool:
    """Whether some of the training data are chats."""
    return any(
        source.format not in ("text", "prompt_completion") or source.chat is True for source in config.data.train
    )


def more_ends(spec: TrainSpec, base: BaseModel) -> str:
    """The tokens that end an answer here and not by the base's own files, with their ids; usually none."""
    tokenizer = load_tokenizer(base, spec.config.model)
    more = sorted(set(spec.eos) - set(end_tokens(base, tokenizer)))
    return ", ".join(f"`{tokenizer.convert_ids_to_tokens(token)}` ({token})" for token in more)


def keep_tokenizer(config: Config, base: BaseModel, folder: Path) -> None:
    """Have the tokenizer of an adapter's folder be the base's.

    By the model's type in config.json, which an adapter has not, transformers may take another class than the one that
    tokenizer_config.json names, and some classes cut text in their own way whatever tokenizer.json says.
    """
    own, settings = load_tokenizer(base, config.model), folder / "tokenizer_config.json"
    before = settings.read_bytes() if settings.is_file() else None
    wanted = _as_text(own)
    for name in ("", "PreTrainedTokenizerFast", type(own).__name__):
        if name:
            portable.name_class(folder, name)
        with contextlib.suppress(Exception):  # of whatever a class has against the files
            if _as_text(tokenizer_in(folder, config.model.trust_remote_code)) == wanted:
                return
    if before is not None:
        settings.write_bytes(before)
    logger.warning(
        f"export: the tokenizer in the adapter's folder does not cut text as that of {base.name} does: load the base's"
    )


def _as_text(tokenizer: Any) -> str:
    """What it makes of text, as tokenizer.json has it."""
    return str(tokenizer.backend_tokenizer.to_str())


PARITY_TOKENS = 256
"""Held-out tokens on which the logits of the exports are compared."""


def run_export(spec: TrainSpec, folder: RunFolder, result: TrainResult) -> dict[str, Any]:
    """Write both exports and check them, in a Ray task with the resources of a worker.

    Returns the content of parity.json, that of an earlier attempt if it is there; raises UserError if
    the exports disagree.
    """
    assert result.state is not None
    step = result.state.step
    if (parity := folder.exported(step)) is not None:
        return parity
    wanted = worker_resources(spec.config)
    logger.info("exporting adapter and merged model, and comparing them")
    with user_errors():
        job = ray.remote(_export).options(
            num_cpus=_export_cpus(spec.config, wanted),
            num_gpus=wanted.get("GPU", 0),
            max_retries=3,
            retry_exceptions=[OSError],
        )
        measured: dict[str, Any] = ray.get(job.remote(spec, folder, step))
    return measured


def _export_cpus(config: Config, wanted: dict[str, float]) -> float:
    """On GPU nodes one worker's CPUs; else those of all workers, as far as one node has them."""
    if "GPU" in wanted:
        return wanted["CPU"]
    largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    return float(min(wanted["CPU"] * config.cluster.max_workers(), largest))


def _export(spec: TrainSpec, folder: RunFolder, step: int) -> dict[str, Any]:
    quiet_transformers()
    return export_run(spec, folder, step, export_shares.over_cluster(spec.config.cluster.cpus_per_worker))


def export_run(
    spec: TrainSpec, folder: RunFolder, step: int, spread: Spread[Any] = export_shares.in_turn
) -> dict[str, Any]:
    """Write export/adapter, export/merged and export/parity.json from the best adapter up to `step`.

    `spread` runs the shares of the merge. Raises UserError if the checkpoint is not there, if a weight cannot be
    merged, or if the export is not right.
    """
    config, checkpoint = spec.config, storage.join(folder.checkpoints, checkpoints.name_of(step))
    work = export_shares.prepare(spec, checkpoint)
    with ExitStack() as stack:
        plain = stack.enter_context(node_cache.local_folder(folder.adapter))
        merged = stack.enter_context(node_cache.local_folder(folder.merged)) if config.export.merged else None
        if merged is None:
            storage.remove(folder.merged)  # of an earlier attempt, with other settings
        found = None if merged is None else _write_merged(spec, work, checkpoint, merged, folder.merged, spread)
        quantised = export_shares.loss_on_original(spec, work, assigned_device())
        parity, compressed = _write_adapter(spec, work, checkpoint, plain, merged, found, quantised)
    measured = {"step": step, **parity.to_json()}
    if quantised is not None:
        measured["quantised"] = quantised.to_json()
        logger.info(f"adapter: {quantised.in_words()}")
    if compressed is not None:
        measured["compressed"] = compressed.to_json()
        logger.info(f"adapter of rank {compressed.rank}: {compressed.in_words()}")
    folder.write_parity(measured)
    if not parity.ok:
        raise UserError(f"export: {'; '.join(parity.problems())}; nothing is registered, see {folder.parity}")
    return measured


def _write_adapter(
    spec: TrainSpec,
    work: Work,
    checkpoint: str,
    out: Path,
    merged: Path | None,
    found: MergedFolder | None,
    quantised: OnOriginal | None,
) -> tuple[Parity, Compressed | None]:
    """Write the adapter folder, and check it before its card is written, which tells what was found.

    `found` is of the merged folder, at `merged`. All is compared on the original weights, which it is exported for.
    """
    config, base, limit = spec.config, on_this_node(spec.base, spec.config), spec.config.export.rank
    written, lost = compress(work.adapter, limit) if limit else (work.adapter, 0.0)
    name, state = _public_name(base), checkpoints.read(checkpoint).state
    revision = _revision(config, base)
    with new_adapter(written, config.adapter, name, out, work.model, revision) as (folder, rank):
        peft = check_adapter(folder, work.model, written, config.adapter.scale())
        parity = Parity(found, peft, _logits(spec, work, merged, folder, compressed=lost > 0))
        loss = measure(spec, work, written, assigned_device()) if lost else None
        compressed = Compressed(limit, lost, loss) if limit else None
        ends = more_ends(spec, base)
        words = parity.in_words(quantised is not None)
        _complete(config, base, state, folder, rank, words, compressed, quantised, ends)
    return parity, compressed


def _write_merged(
    spec: TrainSpec, work: Work, checkpoint: str, out: Path, place: str, spread: Spread[Any]
) -> MergedFolder:
    """Write the merged folder and check it; `place` is where it will be."""
    with replacing(out) as partial_folder:
        parts = export_shares.parts_of(spec, checkpoint, partial_folder, place, work)
        merge.copy_files(work.base, partial_folder)
        spread(export_shares.merge_part, parts)
        base = on_this_node(spec.base, spec.config)
        give_template(spec.config, base, partial_folder)
        if more_ends(spec, base):
            portable.end_with(partial_folder, spec.eos)
    return export_shares.check(work, [replace(part, folder=out) for part in parts], spread)


def _logits(spec: TrainSpec, work: Work, merged: Path | None, plain: Path, compressed: bool) -> Logits | str:
    """Logits of all models on held-out tokens, or why they are not measured."""
    device = assigned_device()
    if compressed:
        return "the adapter is compressed, which changes logits"
    if why := too_large(parameters(str(work.base)), torch.float32, device):
        return why
    folders = Folders(work.base, merged, plain, spec.config.model.trust_remote_code)
    found = measure_logits(
        folders,
        work.model,
        work.groups,
        work.adapter,
        spec.config.adapter.scale(),
        _held_out(spec.eval or spec.train),
        device,
    )
    if isinstance(found, str):
        logger.info(f"export: logits are not compared: {found}")
    return found


def _public_name(base: BaseModel) -> str:
    """The name by which PEFT and vLLM find the base: a hub id, or else the folder, which is this cluster's only."""
    elsewhere = storage.is_uri(base.name) or base.name.startswith("models:/") or Path(base.name).exists()
    return base.folder if elsewhere else base.name


def _revision(config: Config, base: BaseModel) -> str | None:
    """Which of the commits of its base an adapter is for, where that is from the hub and the config says it."""
    return None if Path(_public_name(base)).is_absolute() else config.model.revision


def _complete(
    config: Config,
    base: BaseModel,
    state: TrainState,
    adapter: Path,
    rank: int,
    checked: str = "",
    compressed: Compressed | None = None,
    quantised: OnOriginal | None = None,
    ends: str = "",
) -> None:
    """Give an adapter's folder its tokenizer and its model card; `ends` as of `more_ends`."""
    portable.copy_tokenizer(Path(base.folder), adapter)
    keep_tokenizer(config, base, adapter)
    give_template(config, base, adapter)
    card = portable.Card(
        base_name=_public_name(base),
        base_digest=base.digest,
        revision=_revision(config, base),
        adapter=config.adapter,
        rank=rank,
        sources=config.data.train,
        max_length=config.data.max_length,
        steps=state.step if state.best_step is None else state.best_step,
        eval_loss=state.best_loss,
        checked=checked,
        compressed=compressed.in_words(reasons=False) if compressed and compressed.lost else "",
        quantised=quantised.in_words(reasons=False) if quantised else "",
        ends=ends,
    )
    (adapter / "README.md").write_text(portable.model_card(card), encoding="utf-8")


def _held_out(store: TokenStore) -> list[torch.Tensor]:
    """Token ids (1, T) of single examples, PARITY_TOKENS in all at most: of a first one that is longer, its beginning.

    Logits are a row of the vocabulary for each token, several times over: those of one example of 32,768 tokens would
    take a hundred gigabytes.
    """
    found: list[torch.Tensor] = []
    room = PARITY_TOKENS
    for index in range(store.available):
        pack, place = store[index], 0
        for size in pack.segments:
            if size > room and found:
                return found
            taken = min(size, room)
            found.append(torch.tensor(pack.input_ids[place : place + taken], dtype=torch.int64)[None])
            place, room = place + size, room - taken
    return found
