"""Publication of a finished run: what is registered as a version, and how that and the run's results go to MLflow."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.secrets import mask
from olora_ray.common.text import plural
from olora_ray.config.load import flatten
from olora_ray.config.schema import Config, Source
from olora_ray.model.folder import text_class
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.answers import Sample, Scores, as_text, score
from olora_ray.pipeline.export import Exported
from olora_ray.pipeline.run_folder import Fingerprint, RunFolder, settings_digest
from olora_ray.tokens.manifest import Manifest
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import client, models
from olora_ray.tracking.checksums import RUN
from olora_ray.tracking.models import BaseOfAdapter, Contents, check_adapter_only, has_chat_template
from olora_ray.tracking.run import Tracker
from olora_ray.tracking.start import check_artifacts, mlflow_run, resolve_uri
from olora_ray.train.checkpoint import perplexity

logger = logging.getLogger(__name__)

# What is registered: first its description in words, in the Markdown that MLflow's page shows.


MERGED = """```python
import mlflow  # with MLFLOW_TRACKING_URI set to this server

generate = mlflow.transformers.load_model("{uri}")
```"""
ADAPTER = """This version is the adapter alone: loading it needs {base}.

```python
import mlflow  # with MLFLOW_TRACKING_URI set to this server

generate = mlflow.transformers.load_model("{uri}"{elsewhere})
```

With PEFT:

```python
from peft import PeftModel
from transformers import {loader}

folder = mlflow.artifacts.download_artifacts("{uri}")
model = PeftModel.from_pretrained({loader}.from_pretrained("{place}"{revision}), f"{folder}/peft")
```"""


def describe(exported: Exported, scores: Scores, base: BaseOfAdapter | None) -> str:
    """The description; {uri} in it stands for the version's models:/ address. `base` is that of an adapter alone."""
    blocks = [
        _origin(exported.spec),
        "\n".join(_table(exported, scores)),
        *_training(exported),
        "### Load",
        _loading(base) if base else MERGED,
    ]
    return "\n\n".join(block for block in blocks if block)


def _origin(spec: TrainSpec) -> str:
    adapter = spec.config.adapter
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    rank = spec.config.export.rank
    compressed = "" if rank is None else f", compressed to rank {rank} for the export"
    kind = spec.config.model.quantization
    quantised = "" if kind == "none" else f", trained on the base as {kind} and exported for its original weights"
    start = "; training began with the adapter of an earlier run" if spec.start else ""
    return (
        f"Fine-tuned from {_code(_short(spec.base.name))}: {adapter.method}, rank {adapter.rank}, alpha"
        f" {adapter.alpha:g}, on {_code(targets)}{quantised}{compressed}{start}."
    )


def _table(exported: Exported, scores: Scores) -> Iterator[str]:
    """Losses and scores before and after training; nothing where nothing is held out."""
    state, rows = exported.state, []
    if losses := exported.losses():
        best = losses[-1] if state.best_loss is None else state.best_loss
        rows.append(("loss per held-out token", f"{losses[0]:.4f}", f"{best:.4f}"))
    answers = plural(len(exported.result.answers), "row")
    for name, after in scores.get("after", {}).items():
        before = scores.get("before", {}).get(name)
        rows.append((f"{_clean(name)} ({answers})", "-" if before is None else f"{before:.3f}", f"{after:.3f}"))
    if rows:
        yield from ("| | before | after |", "|---|---|---|")
        yield from (f"| {name} | {before} | **{after}** |" for name, before, after in rows)


def _training(exported: Exported) -> Iterator[str]:
    spec, last = exported.spec, exported.state.step
    data, train = spec.config.data, spec.config.train
    kept = f", of which the adapter of step {exported.step} is kept" if exported.step != last else ""
    yield (
        f"**Trained on** {_rows(spec.train)}{_sources(data.train)}: {plural(last, 'step')}{kept}; a step has"
        f" {plural(train.global_batch, 'sequence')} of at most {data.length():,} tokens."
    )
    if spec.eval is not None:
        where = _sources(data.eval) if data.eval else f"{data.eval_fraction:g} of these rows"
        yield f"**Held out** {_rows(spec.eval)}{where}."


def _rows(store: TokenStore) -> str:
    """`1,200 rows, 34,000 tokens (12,000 of them supervised), of `; empty while a store is not complete."""
    if not store.complete:
        return ""
    found: Manifest = store.manifest
    used = found.rows - sum(found.rejected.values())
    return f"{used:,} rows, {found.tokens:,} tokens ({found.supervised:,} of them supervised), of "


def _sources(sources: Sequence[Source]) -> str:
    """The first six, and the number of the others."""
    shown = [
        f"{_code(_short(source.path))} ({source.format}{f', weight {source.weight:g}' if source.weight != 1 else ''})"
        for source in sources[:6]
    ]
    return ", ".join([*shown, f"{len(sources) - 6} more"] if len(sources) > 6 else shown)


def _loading(base: BaseOfAdapter) -> str:
    name = _short(base.name)
    if base.on_hub:
        what, place, elsewhere = f"its base, {_code(name)} at commit {_code(base.revision or '')}", base.name, ""
        revision = f', revision="{base.revision}"'
    else:
        what = (
            f"a copy of its base, {_code(name)}; without `base_model_path` that is looked for where it lay when this"
            " version was registered"
        )
        place, revision = "FOLDER_OF_THE_BASE", ""
        elsewhere = ', base_model_path="FOLDER_OF_THE_BASE"'
    loader = text_class(Path(base.folder)).__name__
    text = ADAPTER.replace("{loader}", loader).replace("{base}", what).replace("{elsewhere}", elsewhere)
    return text.replace("{place}", place).replace("{revision}", revision)


def _short(place: str) -> str:
    """A hub id, a package's file or a registered model as it is; of a path or an address of a store the last part."""
    if place.startswith(("hf://", "package://", "models:/")) or (place.count("/") == 1 and not place.startswith("/")):
        return place
    return (place.partition("?")[0] if storage.is_uri(place) else place).rstrip("/").rpartition("/")[2]


def _code(text: str) -> str:
    return f"`{_clean(text)}`"


def _clean(text: str) -> str:
    """Without what Markdown would take for something else, without secrets, and not too long."""
    flat = " ".join(mask(text).replace("`", "'").replace("|", "/").split())
    return flat if len(flat) <= 80 else f"{flat[:77]}..."


# What is registered: the input example, which is the first held-out question of the training as a request.


_PLACE = "OBJECTREPLACEMENT"
"""Stands for a message's text in a template: letters, which no template and no regular expression changes."""


def request(config: Config, folder: Path, prompt: tuple[int, ...]) -> dict[str, Any] | None:
    """The request that asks the model in `folder` what `prompt` (token ids) asks; None if there is no such request."""
    tokenizer = load_tokenizer(BaseModel(str(folder), str(folder), ""), config.model)
    chats = has_chat_template(folder)
    text = as_text(tokenizer, prompt, special=chats)
    asked = chat(tokenizer, text) if chats else text
    if not asked or len(text) > 4000:  # too long for an example
        return None
    return {"messages" if chats else "prompt": asked, "max_tokens": config.evaluation.max_new_tokens}


def chat(tokenizer: Any, text: str) -> list[dict[str, str]] | None:
    """The messages that the tokenizer's chat template writes as `text`; None if these are not one or two."""
    for roles in (["user"], ["system", "user"]):
        pattern = re.escape(_rendered(tokenizer, [{"role": role, "content": _PLACE} for role in roles]))
        found = re.fullmatch(pattern.replace(_PLACE, "(.+?)"), text, re.DOTALL)
        if found and len(found.groups()) == len(roles):
            messages = [{"role": role, "content": content} for role, content in zip(roles, found.groups(), strict=True)]
            if _rendered(tokenizer, messages) == text:
                return messages
    return None


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The text of a conversation before its answer; empty if the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)).strip()
    except Exception:  # a template is code: it may raise anything
        return ""


# What is registered: the merged model, or the adapter with the base by reference.


@contextmanager
def contents_of(exported: Exported, scores: Scores) -> Iterator[Contents]:
    """Yield what a finished run registers, as files on this machine for the block."""
    spec, folder, config = exported.spec, exported.folder, exported.spec.config
    with node_cache.fetched(folder.merged if config.export.merged else folder.adapter) as place:
        base = None if config.export.merged else _reference(spec, place)
        example = None
        if answers := exported.result.answers:
            with suppress(UserError):  # a tokenizer that does not load here is no reason not to register
                example = request(config, place, answers[0].prompt)
        yield Contents(
            place,
            base,
            answers_as=config.registry.model or config.run.name,
            description=describe(exported, scores, base),
            example=example,
        )


def _reference(spec: TrainSpec, adapter: Path) -> BaseOfAdapter:
    """The base of a run, as an adapter-only version keeps it."""
    base, revision = spec.base, spec.config.model.revision
    commit = _commit(base)
    # MLflow takes the tokenizer from where it takes the base. The hub's does not do if a chat template was added.
    on_hub = (
        commit is not None
        and spec.template is None
        and has_chat_template(adapter) == has_chat_template(Path(base.folder))
    )
    name = models.pinned(base.name, spec.config)
    return BaseOfAdapter(name, base.digest, base.folder, commit or revision, on_hub)


def _commit(base: BaseModel) -> str | None:
    """The commit of a model that lies as the hub's client has downloaded it: models--ORG--NAME/snapshots/COMMIT."""
    place = Path(base.folder)
    from_hub = place.parts[-3:-1] == (f"models--{base.name.replace('/', '--')}", "snapshots")
    return place.name if from_hub else None


# How: the MLflow run of a training is made or resumed, and closed.


def check_tracking(config: Config, folder: RunFolder) -> None:
    """Raise UserError if MLflow does not answer, its files cannot be written, or it cannot load what is exported.

    A run that is there already may continue without it for a while.
    """
    uri = resolve_uri(config)
    if not config.export.merged:
        check_adapter_only()
    if folder.tracking_run(uri) is None:
        client.check(uri)
        check_artifacts(config, uri)


@contextmanager
def tracked(spec: TrainSpec, folder: RunFolder, parent: str | None = None) -> Iterator[Tracker]:
    """The MLflow run of this run, made or resumed; closed as FINISHED, FAILED or KILLED.

    `parent` is the id of the run of a search that this one is a trial of.
    """
    config = spec.config
    tags = {"olora.base_digest": spec.base.digest, "olora.method": config.adapter.method}
    later = "nothing is lost: run the same command again when it does, to finish logging and registering"
    with mlflow_run(config, tags, folder, flatten(config), parent=parent, advice=later) as tracker:
        log_data(tracker, spec)
        if not parent:
            tracker.watch_system()
        yield tracker


def log_data(tracker: Tracker, spec: TrainSpec) -> None:
    """Log the token stores that are complete as inputs of the run."""
    sources = {"training": (spec.train, spec.config.data.train), "evaluation": (spec.eval, spec.config.data.eval)}
    for context, (store, named) in sources.items():
        if store is not None and store.complete:  # else it is logged when training has ended
            place = ", ".join(source.path for source in named) or "held out from training"
            tracker.dataset(context, store.digest, place, store.manifest.rows, context)


# How: a finished run logs its results, and registers its version.


@dataclass(frozen=True)
class Published:
    """The results of a run, as MLflow has them."""

    result: dict[str, Any]
    """The content of result.json."""
    page: str | None
    """Address of the run's page, if a server shows it."""


def log_scores(exported: Exported, tracker: Tracker, answers: Sequence[Sample]) -> Scores:
    """Score the answers, and log scores, pictures and tables; safe to repeat.

    It comes before `publish`, so that a version is registered only when nothing is left that can fail. Raises
    UserError for a scorer that fails, and TrackingUnavailable if MLflow does not answer.
    """
    scores, history = score(exported.spec.config, answers), exported.state.history
    for step, when in ((exported.state.step, "after"), (0, "before")):
        tracker.metrics({step: {f"score/{name}": value for name, value in scores.get(when, {}).items()}})
    train, held_out = (
        [(int(row["step"]), row[name]) for row in history if name in row] for name in ("train/loss", "eval/loss")
    )
    tracker.learning_curve(train, held_out)
    columns = ("prompt", "reference", "before", "after")
    tracker.table("samples", columns, [[getattr(item, name) for name in columns] for item in answers])
    return scores


def publish(exported: Exported, tracker: Tracker, tags: Mapping[str, str], scores: Scores) -> Published:
    """Register a run, and log what it has come to; safe to repeat.

    Raises TrackingUnavailable if MLflow does not answer: result.json must not be written before all is logged.
    """
    content = _result(exported, tracker, scores, register(exported, tracker, tags, scores))
    tracker.text(json.dumps(content, indent=2) + "\n", "result.json")
    return Published(content, tracker.url())


def register(exported: Exported, tracker: Tracker, tags: Mapping[str, str], scores: Scores | None = None) -> int | None:
    """Log the metrics that MLflow lacks, the parity report and the model; register it, if it is to be.

    `tags` are over those that a version gets anyway. Returns the version. Safe to repeat; raises TrackingUnavailable
    if MLflow does not answer.
    """
    spec, state = exported.spec, exported.state
    config, registry = spec.config, spec.config.registry
    tracker.metrics({int(row["step"]): {k: v for k, v in row.items() if k != "step"} for row in state.history})
    log_data(tracker, spec)
    tracker.text(json.dumps(exported.parity, indent=2), "parity.json")
    made_of = Fingerprint(
        spec.base.digest, spec.train.digest, spec.eval.digest if spec.eval else "", settings_digest(config)
    )
    own: dict[str, object] = {
        **made_of.tags(),
        RUN: exported.folder.root,
        "olora.method": config.adapter.method,
        "olora.rank": config.adapter.rank,
        "olora.automatic_lr": f"{state.lr or 0:g}",
        "olora.eval_loss": "" if state.best_loss is None else f"{state.best_loss:.6f}",
        **tags,
    }
    what = "merged model" if config.export.merged else "adapter, without its base model,"
    with contents_of(exported, scores or {}) as contents, client.reachable(tracker.uri, upload=True):
        if registry.model is None:
            logger.info(f"logging the {what}")
            models.log_model(tracker, contents, own)
            return None
        logger.info(f"registering the {what} as {registry.model}@{registry.alias}")
        return models.register(tracker, contents, registry.model, registry.alias, own)


def _result(exported: Exported, tracker: Tracker, scores: Scores, version: int | None) -> dict[str, Any]:
    """The content of result.json."""
    spec, state, registry = exported.spec, exported.state, exported.spec.config.registry
    last: dict[str, float] = {}
    for row in state.history:
        last |= {name: value for name, value in row.items() if name != "step"}
    if state.best_loss is not None:  # that of the adapter that is exported
        last |= {"eval/loss": state.best_loss, "eval/perplexity": perplexity(state.best_loss)}
    registered = {"model": registry.model, "version": version, "alias": registry.alias}
    return {
        "run": spec.config.run.name,
        "steps": state.step,
        "automatic_lr": state.lr,
        "stopped_early": exported.result.stopped_early,
        "best_step": exported.step,
        "metrics": last,
        "eval_loss_before": next(iter(exported.losses()), None),
        "scores": scores,
        "base": spec.base.to_json(),
        "data": {"train": spec.train.digest, "eval": spec.eval.digest if spec.eval else None},
        "self_test": exported.result.self_test,
        "parity": exported.parity,
        "mlflow": {"uri": client.shown_uri(tracker.uri), "run_id": tracker.run_id},
        "registered": None if version is None else registered,
    }
