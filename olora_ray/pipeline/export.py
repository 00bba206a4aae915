"""Export of a finished training: adapter and merged model, written and compared in a Ray task."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from olora_ray.adapter import export, sharing
from olora_ray.adapter.parity import measure_parity
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import storage
from olora_ray.common.errors import UserError
from olora_ray.common.quiet import quiet_transformers
from olora_ray.config.schema import Config
from olora_ray.data import chat_template
from olora_ray.data.tokenize import adds_begin_token
from olora_ray.model.folder import parameters
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel, on_this_node
from olora_ray.pipeline.connection import user_errors
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import models
from olora_ray.train import checkpoints
from olora_ray.train.state import TrainState

logger = logging.getLogger(__name__)

PARITY_TOKENS = 256
"""Held-out tokens on which the logits of the exports are compared."""


def run_export(spec: TrainSpec, folder: RunFolder, result: TrainResult) -> dict[str, Any]:
    """Write both exports and measure their parity, in a Ray task with the resources of a worker.

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
    return export_run(spec, folder, step)


def export_run(spec: TrainSpec, folder: RunFolder, step: int) -> dict[str, Any]:
    """Write export/adapter, export/merged and export/parity.json from the best adapter up to `step`.

    Raises UserError if the checkpoint is not there, or if the adapted, merged and PEFT-loaded models
    do not agree.
    """
    config = spec.config
    newest = checkpoints.read(storage.join(folder.checkpoints, checkpoints.name_of(step)))
    best = newest.best_adapter()
    found = on_this_node(spec.base, config)
    base = Path(found.folder)
    transposed = export.transposed_layers(found, config, best.keys())
    with storage.local_folder(folder.adapter) as adapter_folder, storage.local_folder(folder.merged) as merged_folder:
        name = _public_name(found)
        export.write_adapter(
            best,
            config.adapter,
            name,
            adapter_folder,
            transposed=transposed,
            revision=config.model.revision if name == found.name else None,
            complete=partial(_complete, config, found, newest.state),
        )
        export.write_merged(base, best, config.adapter.scale(), merged_folder, transposed=transposed)
        give_template(config, found, merged_folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parity = measure_parity(
            base,
            best,
            config.adapter.scale(),
            merged_folder,
            adapter_folder,
            _held_out(spec.eval or spec.train),
            dtype=_parity_dtype(found, device),
            device=device,
            trust_remote_code=config.model.trust_remote_code,
        )
    measured = {"step": step, **parity.to_json()}
    folder.write_parity(measured)
    if not parity.ok:
        raise UserError(f"export: {'; '.join(parity.problems())}; nothing is registered, see {folder.parity}")
    return measured


def _public_name(base: BaseModel) -> str:
    """The name by which PEFT and vLLM find the base: a hub id, or else the folder, which is this cluster's only."""
    elsewhere = storage.is_uri(base.name) or base.name.startswith("models:/") or Path(base.name).exists()
    return base.folder if elsewhere else base.name


def _complete(config: Config, base: BaseModel, state: TrainState, adapter: Path, rank: int) -> None:
    """Give an adapter's folder its tokenizer and its model card."""
    sharing.copy_tokenizer(Path(base.folder), adapter)
    give_template(config, base, adapter)
    card = sharing.Card(
        base_name=_public_name(base),
        base_digest=base.digest,
        adapter=config.adapter,
        rank=rank,
        sources=config.data.train,
        max_length=config.data.max_length,
        steps=state.step if state.best_step is None else state.best_step,
        eval_loss=state.best_loss,
    )
    (adapter / "README.md").write_text(sharing.model_card(card), encoding="utf-8")


def give_template(config: Config, base: BaseModel, folder: Path) -> None:
    """A base without a chat template was trained with the default one: its users need it too."""
    chats = any(
        source.format not in ("text", "prompt_completion") or source.chat is True for source in config.data.train
    )
    if chats and not models.has_chat_template(folder):
        template = chat_template.default(adds_begin_token(load_tokenizer(base, config.model)))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _parity_dtype(base: BaseModel, device: torch.device) -> torch.dtype:
    """float32, the sharpest, unless a model of that size does not fit on the GPU."""
    if device.type == "cuda" and parameters(base.folder) * 4 > 0.7 * torch.cuda.mem_get_info(device)[0]:
        return torch.bfloat16
    return torch.float32


def _held_out(store: TokenStore) -> list[torch.Tensor]:
    """Token ids (1, T) of single examples, PARITY_TOKENS in all at most."""
    found: list[torch.Tensor] = []
    for index in range(store.available):
        pack, place = store[index], 0
        for size in pack.segments:
            if sum(ids.shape[1] for ids in found) + size > PARITY_TOKENS and found:
                return found
            found.append(torch.tensor(pack.input_ids[place : place + size], dtype=torch.int64)[None])
            place += size
    return found
