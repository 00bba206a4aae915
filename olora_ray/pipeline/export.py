"""The export of a finished training: adapter and merged model, written and checked in Ray tasks."""

import contextlib
import logging
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from olora_ray.adapter.peft_folder import CONFIG, compress, new_adapter, replacing
from olora_ray.cluster.channel import make_channel, sent_to
from olora_ray.cluster.failures import user_errors
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.spec import GUARD, TrainResult, TrainSpec
from olora_ray.cluster.worker_context import assigned_device
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.logs import quiet_transformers
from olora_ray.common.text import plural
from olora_ray.config.decided import DecidedConfig
from olora_ray.config.schema import Config
from olora_ray.config.tables import EXPORTERS
from olora_ray.data.formats import format_named
from olora_ray.data.tokenizer_spec import plain_template
from olora_ray.model.folder import read_json, text_class
from olora_ray.model.load import end_tokens, tokenizer_in, too_large
from olora_ray.model.source import BaseModel
from olora_ray.pipeline import export_losses, exporter, merge, model_card, model_files
from olora_ray.pipeline.export_losses import Compressed, OnOriginal
from olora_ray.pipeline.exporter import Work
from olora_ray.pipeline.parity import (
    Folders,
    Logits,
    MergedFolder,
    Parity,
    check_adapter,
    measure_logits,
)
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import models
from olora_ray.train import checkpoints
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.objectives.objective import objective_named

logger = logging.getLogger(__name__)

# Files for serving: template, tokenizer and end tokens, so that a server sees the prompts that training saw.


def give_template(config: Config, tokenizer: Any, folder: Path, chosen: str | None = None) -> None:
    """Write the training's chat template into `folder`: `chosen`, or the default one if the base model has none."""
    chats = any(
        format_named(source.format).is_chat(source.chat is True) for source in config.data.train
    )
    if chosen or (chats and not models.has_chat_template(folder)):
        model_files.put_template(folder, chosen or plain_template(tokenizer))


def more_ends(ends: Collection[int], base: BaseModel, tokenizer: Any) -> str:
    """Return the tokens in `ends` that the base model's files do not list as end tokens, as text; usually empty."""
    more = sorted(set(ends) - set(end_tokens(base, tokenizer)))
    return ", ".join(f"`{tokenizer.convert_ids_to_tokens(token)}` ({token})" for token in more)


def keep_tokenizer(config: Config, name: str, own: Any, folder: Path) -> None:
    """Make the tokenizer in an adapter's folder tokenise as `own`, the tokenizer of the base model `name`.

    An adapter has no config.json, and without its model type transformers may load another tokenizer class than for
    the base model. Some classes ignore parts of tokenizer.json. So try the classes, and keep the first that agrees.
    """
    settings = folder / "tokenizer_config.json"
    before = settings.read_bytes() if settings.is_file() else None
    wanted = own.backend_tokenizer.to_str()
    for class_name in ("", "PreTrainedTokenizerFast", type(own).__name__):
        if class_name:
            model_files.name_class(folder, class_name)
        with contextlib.suppress(Exception):  # a class may fail with any exception
            read: Any = tokenizer_in(folder, config.model.trust_remote_code)
            if read.backend_tokenizer.to_str() == wanted:
                return
    if before is not None:
        settings.write_bytes(before)
    logger.warning(
        f"export: the tokenizer in the adapter's folder tokenises differently from {name}; load the"
        f" tokenizer of {name} instead"
    )


PARITY_TOKENS = 256
"""Number of held-out tokens on which the logits of the exports are compared."""


@dataclass(frozen=True)
class Exported:
    spec: TrainSpec
    folder: RunFolder
    result: TrainResult
    parity: dict[str, Any]
    """The content of parity.json."""

    @property
    def state(self) -> TrainState:
        assert self.result.state is not None
        return self.result.state

    @property
    def step(self) -> int:
        return step_of_best(self.state)

    @property
    def best_row(self) -> dict[str, float]:
        return best_row(self.state)

    @property
    def best_loss(self) -> float | None:
        return best_loss(self.state)

    @property
    def guard(self) -> tuple[float, float] | None:
        """Loss on other texts before the training and of the export; None if it was not measured."""
        start = self.state.history[:1]
        if not start or GUARD not in start[0] or GUARD not in self.best_row:
            return None
        return start[0][GUARD], self.best_row[GUARD]

    def losses(self) -> list[float]:
        return [row["eval/loss"] for row in self.state.history if "eval/loss" in row]


def step_of_best(state: TrainState) -> int:
    """Return the step with the best held-out loss; without held-out rows the last step."""
    return state.step if state.best_step is None else state.best_step


def best_row(state: TrainState) -> dict[str, float]:
    """Return the held-out metrics of the step that is exported; empty if it was not evaluated."""
    for row in state.history:
        if row["step"] == state.best_step and "eval/loss" in row:
            return {name: value for name, value in row.items() if name.startswith("eval/")}
    return {}


def best_loss(state: TrainState) -> float | None:
    """Return eval/loss of the step that is exported, which `TrainState.best_loss` is not for every objective."""
    return best_row(state).get("eval/loss", state.best_loss)


def run_export(spec: TrainSpec, folder: RunFolder, result: TrainResult) -> Exported:
    """Write and check the exports in a Ray task with the resources of a worker.

    Reuses complete exports of an earlier attempt. Raises UserError if the exports disagree with the trained model.
    """
    assert result.state is not None
    step = result.state.step
    parity = folder.exported(spec.config, step)
    if parity is not None:
        return Exported(spec, folder, result, parity)
    wanted = worker_resources(spec.config)
    cpus = wanted["CPU"]
    # The workers have ended, so a merge on CPUs may use the cores of all of them, as far as they are on one node.
    if "GPU" not in wanted:
        largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        cpus = min(cpus * spec.config.cluster.most, largest)
    logger.info("exporting and checking the adapter and the merged model")
    channel = make_channel()
    done: list[Any] = []
    with user_errors():
        job: Any = ray.remote(_export_aloud).options(
            num_cpus=cpus, num_gpus=wanted.get("GPU", 0), max_retries=3, retry_exceptions=[OSError]
        )
        exporting = job.remote(channel, spec, folder, step)
        while not done:
            done, _ = ray.wait([exporting], timeout=1)
            for line in ray.get(channel.drain.remote()):
                logger.info(line)
        parity = ray.get(exporting)
    return Exported(spec, folder, result, parity)


def _export_aloud(channel: Any, *arguments: Any) -> dict[str, Any]:
    with sent_to(channel, lambda: True):
        return export_run(*arguments)


def export_run(spec: TrainSpec, folder: RunFolder, step: int) -> dict[str, Any]:
    """Write the folder export/ of the best adapter up to `step`: adapter, merged, those of export.also, parity.json.

    Raises UserError if the checkpoint is missing, a weight cannot be merged, or the exports disagree with the trained
    model.
    """
    quiet_transformers()
    checkpoint = storage.join(folder.checkpoints, checkpoints.name_of(step))
    work = exporter.prepare(spec, checkpoint)
    with ExitStack() as stack:
        plain = stack.enter_context(node_cache.local_folder(folder.adapter))
        merged = merged_check = None
        if spec.config.export.merged:
            merged = stack.enter_context(node_cache.local_folder(folder.merged))
            merged_check = _write_merged(work, merged)
        else:
            storage.remove(folder.merged)  # an earlier attempt may have had export.merged: true
        quantised = export_losses.loss_on_original(work)
        parity, compressed = _write_adapter(work, plain, merged, merged_check, quantised)
        for name in EXPORTERS.names():
            storage.remove(folder.export(name))  # of an earlier attempt, with another adapter
        if parity.ok:
            sources = {"adapter": plain}
            if merged is not None:
                sources["merged"] = merged
            for name in spec.config.export.also:
                out = stack.enter_context(node_cache.local_folder(folder.export(name)))
                exporter.write(work, name, sources, out)
    measured = {"step": step, **parity.to_json()}
    if quantised is not None:
        measured["quantised"] = quantised.to_json()
        logger.info(f"adapter: {quantised.in_words()}")
    if compressed is not None:
        measured["compressed"] = compressed.to_json()
        logger.info(f"adapter of rank {compressed.rank}: {compressed.in_words()}")
    folder.write_parity(spec.config, measured)
    if not parity.ok:
        raise UserError(
            f"export: {'; '.join(parity.problems())}; the model is not registered, see {folder.parity}"
        )
    return measured


def _write_adapter(
    work: Work,
    out: Path,
    merged: Path | None,
    merged_check: MergedFolder | None,
    quantised: OnOriginal | None,
) -> tuple[Parity, Compressed | None]:
    # The check comes before the model card, which contains its result. All comparisons use the original weights: the
    # export is for them, even if training used quantised ones.
    config = work.spec.config
    written = work.adapter
    compressed = None
    if config.export.rank:
        written, lost = compress(work.adapter, config.export.rank)
        loss = export_losses.compressed_loss(work, written) if lost else None
        compressed = Compressed(config.export.rank, lost, loss)
    name = public_name(work.base)
    revision = _revision(config, work.base)
    card = about_data(work.spec)
    logger.info("export: writing the adapter, and loading it with PEFT")
    with new_adapter(written, config.adapter, name, out, work.model, revision) as (folder, rank):
        peft = check_adapter(folder, work.model, written, config.adapter.scale())
        if compressed and compressed.lost:
            logits: Logits | str = "compression of the adapter changes the logits"
            card["compressed"] = compressed.in_words(reasons=False)
        else:
            logits = _logits(work, merged, folder)
        if quantised:
            card["quantised"] = quantised.in_words(reasons=False)
        parity = Parity(merged_check, peft, logits)
        complete(
            config,
            work.base,
            work.state,
            folder,
            rank,
            work.tokenizer,
            work.spec.template,
            merged,
            **card,
            checked=parity.in_words(quantised is not None),
            ends=more_ends(work.spec.eos, work.base, work.tokenizer),
            stacked="target_parameters" in read_json(folder / CONFIG),
        )
    return parity, compressed


def _write_merged(work: Work, out: Path) -> MergedFolder:
    """Write the merged folder and check it; the folder of a stopped attempt is kept if its bytes are right."""
    if out.is_dir():
        kept = _check_merged(work, out)
        if not kept.problems():
            logger.info(
                "export: keeping the merged model of an earlier attempt, which has the right bytes"
            )
            return kept
    base = Path(work.base.folder)
    scale = work.spec.config.adapter.scale()
    with replacing(out) as partial_folder:
        size = sum(group.size for group in work.groups) / 2**30
        logger.info(
            f"export: merging the adapter into {plural(len(work.groups), 'weight')}, {size:.2f} GiB"
        )
        merge.copy_files(base, partial_folder)
        merge.merge(base, partial_folder, work.groups, work.adapter, scale, assigned_device())
        give_template(work.spec.config, work.tokenizer, partial_folder, work.spec.template)
        if more_ends(work.spec.eos, work.base, work.tokenizer):
            model_files.end_with(partial_folder, work.spec.eos)
    logger.info("export: checking the merged weights")
    return _check_merged(work, out)


def _check_merged(work: Work, folder: Path) -> MergedFolder:
    base = Path(work.base.folder)
    changed = merge.changed(base, folder, work.groups)
    if changed:
        return MergedFolder(merge.Worst(0.0, "", "float32"), tuple(changed))
    scale = work.spec.config.adapter.scale()
    device = assigned_device()
    return MergedFolder(
        merge.check_weights(base, folder, work.groups, work.adapter, scale, device), ()
    )


def _logits(work: Work, merged: Path | None, plain: Path) -> Logits | str:
    spec = work.spec
    device = assigned_device()
    why = too_large(work.base.folder, torch.float32, device)
    if why:
        return why
    logger.info("export: comparing logits with the trained model's")
    folders = Folders(Path(work.base.folder), merged, plain, spec.config.model.trust_remote_code)
    tokens = first_examples(spec.eval or spec.train)
    scale = spec.config.adapter.scale()
    logits = measure_logits(folders, work.model, work.groups, work.adapter, scale, tokens, device)
    if isinstance(logits, str):
        logger.info(f"export: cannot compare logits: {logits}")
    return logits


def public_name(base: BaseModel) -> str:
    """Return the name by which PEFT and vLLM open the base model: a hub id, otherwise its folder in this cluster."""
    name = base.name
    if storage.is_uri(name) or name.startswith("models:/") or Path(name).exists():
        return base.folder
    return name


def _revision(config: Config, base: BaseModel) -> str | None:
    return None if Path(public_name(base)).is_absolute() else config.model.revision


def complete(
    config: DecidedConfig,
    base: BaseModel,
    state: TrainState,
    adapter: Path,
    rank: int,
    tokenizer: Any,
    template: str | None = None,
    merged: Path | None = None,
    **card_fields: Any,
) -> None:
    """Write tokenizer and model card into an adapter's folder, and a card into the folder `merged`.

    `card_fields` are further fields of `Card`.
    """
    model_files.copy_tokenizer(Path(base.folder), adapter)
    keep_tokenizer(config, base.name, tokenizer, adapter)
    had = models.has_chat_template(adapter)
    give_template(config, tokenizer, adapter, template)
    objective = objective_named(config.train.objective)
    card = model_card.Card(
        base_name=public_name(base),
        base_digest=base.digest,
        revision=_revision(config, base),
        adapter=config.adapter,
        rank=rank,
        sources=config.data.train,
        batch=config.train.global_batch,
        max_length=config.data.max_length,
        steps=step_of_best(state),
        eval_loss=best_loss(state),
        unit="supervised token" if objective.row else objective.unit,
        own_template=template is not None or had != models.has_chat_template(adapter),
        loader=text_class(Path(base.folder)).__name__,
        license=license_of(config, base),
        place=config.export.push or model_card.Card.place,
        **card_fields,
    )
    (adapter / "README.md").write_text(model_card.model_card(card), encoding="utf-8")
    if merged:
        whole = replace(card, merged=True, ends="", compressed="")
        (merged / "README.md").write_text(model_card.model_card(whole), encoding="utf-8")


def about_data(spec: TrainSpec) -> dict[str, Any]:
    """Return the fields of `Card` about the data of a run."""
    data = spec.config.data
    held_out = ""
    if spec.eval is not None:
        held_out = _rows(spec.eval)
        if data.eval:
            held_out += model_card.in_words(data.eval)
        else:
            held_out += f"{data.eval_fraction:g} of the training rows"
    return {"rows": _rows(spec.train), "held_out": held_out, "continued": bool(spec.start)}


def _rows(store: TokenStore) -> str:
    if not store.complete:
        return ""
    manifest = store.manifest
    used = manifest.rows - sum(manifest.rejected.values())
    return f"{used:,} rows, {manifest.tokens:,} tokens ({manifest.supervised:,} of them supervised), of "


def license_of(config: Config, base: BaseModel) -> dict[str, Any]:
    """Return the license's fields of the model cards; empty if neither the config nor the base model's card has one."""
    hub_id = None if Path(public_name(base)).is_absolute() else base.name
    return model_card.license_of(Path(base.folder), hub_id, config.export.license)


def first_examples(store: TokenStore) -> list[torch.Tensor]:
    """Return token ids (1, T) of single examples, at most PARITY_TOKENS in total; a longer first one is cut."""
    # The limit is for memory: logits have one vocabulary row per token, and several models are compared. One example of
    # 32,768 tokens would need a hundred gigabytes.
    examples: list[torch.Tensor] = []
    room = PARITY_TOKENS
    for index in range(len(store)):
        pack = store[index]
        offset = 0
        for size in pack.segments:
            if size > room and examples:
                return examples
            taken = min(size, room)
            ids = pack.input_ids[offset : offset + taken]
            examples.append(torch.tensor(ids, dtype=torch.int64)[None])
            offset += size
            room -= taken
    return examples
