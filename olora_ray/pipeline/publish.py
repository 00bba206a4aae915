"""What leaves a run: the best checkpoint as exports that agree, and a registered version."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from olora_ray.adapter import export
from olora_ray.adapter.layer import is_transposed
from olora_ray.adapter.parity import measure_parity
from olora_ray.cluster.spec import Outcome, Task
from olora_ray.common import storage
from olora_ray.common.errors import Stopped, UserError
from olora_ray.config.schema import Config, flatten
from olora_ray.data import chat_template
from olora_ray.model.source import BaseModel, on_this_node, parameters, skeleton
from olora_ray.pipeline.fingerprint import Fingerprint, settings_digest
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import models, run
from olora_ray.train import checkpoint, checkpoints

Say = Callable[[str], None]
LATER = "nothing is lost: run the same command again when it does, to finish logging and registering"
PARITY_TOKENS = 256
"""Held-out tokens on which the logits of the exports are compared."""


def registered(config: Config) -> Callable[[str], Path]:
    """A function from a models:/ name to the local folder of that model, in this run's MLflow."""
    # Under the storage, so that the workers see it too.
    cache = None if storage.is_uri(config.run.storage) else Path(config.run.storage)
    return lambda name: models.resolve_model_uri(name, run.resolve_uri(config), cache)


def check_tracking(config: Config, folder: RunFolder) -> None:
    """Raise UserError if MLflow does not answer; a run that is there already may go on without it for a while."""
    uri = run.resolve_uri(config)
    if folder.tracking_run(uri) is None:
        run.check(uri)


@contextlib.contextmanager
def tracked(task: Task, folder: RunFolder, parent: str | None = None) -> Iterator[run.Tracker]:
    """The MLflow run of this run, made or taken up again; closed as FINISHED, FAILED or KILLED.

    `parent` is the id of the run of a search that this one is a trial of.
    """
    config, uri = task.config, run.resolve_uri(task.config)
    tags = {"olora.base_digest": task.base.digest, "olora.method": config.adapter.method}
    if parent:
        tags["mlflow.parentRunId"] = parent
    tracker = run.start(config, config.run.name, tags, folder.tracking_run(uri))
    folder.keep_tracking_run(uri, tracker.run_id)
    tracker.params(flatten(config))
    _log_data(tracker, task)
    if not parent:
        tracker.watch_system()
    try:
        yield tracker
    except BaseException as error:
        with contextlib.suppress(run.TrackingAway):  # then it stays open until the next attempt
            tracker.end("KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED", seconds=5)
        if isinstance(error, run.TrackingAway):
            raise run.TrackingAway(f"{error}; {LATER}") from None
        raise
    try:
        tracker.end("FINISHED")
    except run.TrackingAway as error:
        raise run.TrackingAway(f"{error}; {LATER}") from None


def trained(task: Task, folder: RunFolder, say: Say) -> Outcome | None:
    """What an earlier attempt's training gave, if it had ended; what comes after it may be left to do.

    Raises UserError if the run's checkpoints are of another model, tokenizer, data or adapter.
    """
    found = checkpoints.newest(folder.checkpoints, say)
    if found is None:
        return None
    place, newest = found
    checkpoint.require_same(newest.identity, task.identity(), place)
    text = folder.trained()
    if text is None:
        return None
    try:
        outcome = Outcome.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        say(f"warning: {folder.training} is damaged ({error}): the end of the training is done again")
        return None
    if outcome.state is None or outcome.state.step != newest.state.step:
        return None  # its last checkpoint is lost: from the one before, the same comes out
    say(f"training was finished before, at step {outcome.state.step}: going on with what comes after it")
    return outcome


def export_run(task: Task, folder: RunFolder, step: int) -> dict[str, Any]:
    """Write export/adapter, export/merged and export/parity.json from the best adapter up to `step`.

    Raises UserError if the checkpoint is not there, or if the adapted, merged and PEFT-loaded models
    do not agree.
    """
    config = task.config
    best = checkpoints.read(storage.join(folder.checkpoints, checkpoints.name_of(step))).best_adapter()
    found = on_this_node(task.base, config)
    base = Path(found.folder)
    transposed = transposed_layers(found, config, best.keys())
    with local_folder(folder.adapter) as adapter_folder, local_folder(folder.merged) as merged_folder:
        # What PEFT and vLLM look up by themselves: a hub id or a folder.
        name = found.folder if storage.is_uri(found.name) or found.name.startswith("models:/") else found.name
        export.write_adapter(best, config.adapter, name, adapter_folder, transposed=transposed)
        export.write_merged(base, best, config.adapter.scale(), merged_folder, transposed=transposed)
        _give_template(config, merged_folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parity = measure_parity(
            base,
            best,
            config.adapter.scale(),
            merged_folder,
            adapter_folder,
            _held_out(task.eval or task.train),
            dtype=_parity_dtype(found, device),
            device=device,
            trust_remote_code=config.model.trust_remote_code,
        )
    measured = {"step": step, **parity.to_json()}
    folder.write_parity(measured)
    if not parity.ok:
        raise UserError(f"export: {'; '.join(parity.problems())}; nothing is registered, see {folder.parity}")
    return measured


def publish(
    task: Task,
    folder: RunFolder,
    tracker: run.Tracker,
    outcome: Outcome,
    parity: dict[str, Any],
    say: Say,
    more_tags: Mapping[str, str],
) -> int | None:
    """Log the metrics that MLflow lacks, the parity report and the merged model; register it, if it is to be.

    Returns the version. Safe to repeat; raises TrackingAway if MLflow does not answer.
    """
    config, state = task.config, outcome.state
    assert state is not None
    tracker.metrics({int(row["step"]): {k: v for k, v in row.items() if k != "step"} for row in state.history})
    _log_data(tracker, task)
    tracker.text(json.dumps(parity, indent=2), "parity.json")
    made_of = Fingerprint(
        task.base.digest, task.train.digest, task.eval.digest if task.eval else "", settings_digest(config)
    )
    tags = {
        **made_of.tags(),
        "olora.run_folder": folder.root,
        "olora.method": config.adapter.method,
        "olora.rank": config.adapter.rank,
        "olora.eval_loss": "" if state.best_loss is None else f"{state.best_loss:.6f}",
        **more_tags,
    }
    merged = storage.local_copy(folder.merged)
    name, alias = config.registry.model, config.registry.alias
    with run.reachable(tracker.uri, upload=True):
        if name is None:
            say("logging the merged model")
            models.log_model(tracker, merged, tags, base_name=task.base.name)
            return None
        say(f"registering the merged model as {name}@{alias}")
        return models.register(tracker, merged, name, alias, tags, base_name=task.base.name)


def _log_data(tracker: run.Tracker, task: Task) -> None:
    sources = {"training": (task.train, task.config.data.train), "evaluation": (task.eval, task.config.data.eval)}
    for context, (store, named) in sources.items():
        if store is not None and store.complete:  # else it is logged when training has ended
            place = ", ".join(source.path for source in named) or "held out from training"
            tracker.dataset(context, store.digest, place, store.manifest.rows, context)


def _give_template(config: Config, merged: Path) -> None:
    """A base without a chat template was trained with the default one: its users need it too."""
    chats = any(source.format not in ("text", "prompt_completion") for source in config.data.train)
    if chats and not models.has_chat_template(merged):
        (merged / "chat_template.jinja").write_text(chat_template.DEFAULT, encoding="utf-8")


def _parity_dtype(base: BaseModel, device: torch.device) -> torch.dtype:
    """float32, the sharpest, unless a model of that size does not fit on the GPU."""
    if device.type == "cuda" and parameters(base.folder) * 4 > 0.7 * torch.cuda.mem_get_info(device)[0]:
        return torch.bfloat16
    return torch.float32


def transposed_layers(base: BaseModel, config: Config, names: Iterable[str]) -> frozenset[str]:
    """Those of the named layers that keep their weight as n x m (GPT-2's Conv1D)."""
    shape = skeleton(base, config.model)
    return frozenset(name for name in names if is_transposed(shape.get_submodule(name)))


def _held_out(store: TokenStore) -> list[torch.Tensor]:
    """Token ids (1, T) of single examples, PARITY_TOKENS in all at most."""
    found: list[torch.Tensor] = []
    for index in range(store.known):
        pack, place = store[index], 0
        for size in pack.segments:
            if sum(ids.shape[1] for ids in found) + size > PARITY_TOKENS and found:
                return found
            found.append(torch.tensor(pack.input_ids[place : place + size], dtype=torch.int64)[None])
            place += size
    return found


@contextlib.contextmanager
def local_folder(place: str) -> Iterator[Path]:
    """A local folder to write; uploaded afterwards if the storage is elsewhere."""
    if not storage.is_uri(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="olora-export-") as temporary:
        folder = Path(temporary) / place.rsplit("/", 1)[-1]
        yield folder
        storage.upload(folder, place)
