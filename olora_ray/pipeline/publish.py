"""Publication of a finished run: metrics, reports and the model go to MLflow, and a version is registered."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import node_cache, storage
from olora_ray.common.errors import UserError
from olora_ray.common.secrets import mask
from olora_ray.common.text import plural
from olora_ray.config.load import flatten
from olora_ray.config.schema import Config, Source
from olora_ray.model.load import load_tokenizer
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.answers import Sample, Scores, as_text, score
from olora_ray.pipeline.run_folder import Fingerprint, RunFolder, settings_digest
from olora_ray.tokens.manifest import Manifest
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import client, models, run
from olora_ray.tracking.checksums import RUN
from olora_ray.tracking.models import BaseOfAdapter, Contents, check_adapter_only, has_chat_template
from olora_ray.tracking.run import Tracker
from olora_ray.tracking.start import check_artifacts, mlflow_run, resolve_uri
from olora_ray.train.checkpoint import TrainState, perplexity

logger = logging.getLogger(__name__)

# Description of a registered version in words, in the Markdown that MLflow's page shows.


NAMED = 6
"""Sources that are named; of more only the number is told."""
LONGEST_LINE = 80
"""Characters of a name."""
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
from transformers import AutoModelForCausalLM

folder = mlflow.artifacts.download_artifacts("{uri}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{place}"{revision}), f"{folder}/peft")
```"""


def describe(spec: TrainSpec, result: TrainResult, scores: Scores, base: BaseOfAdapter | None) -> str:
    """The description; {uri} in it stands for the version's models:/ address. `base` is that of an adapter alone."""
    assert result.state is not None
    blocks = [
        _origin(spec),
        "\n".join(_table(result.state, scores, len(result.answers))),
        *_training(spec, result.state),
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


def _table(state: TrainState, scores: Scores, answers: int) -> Iterator[str]:
    """Losses and scores before and after training; nothing where nothing is held out."""
    losses = [row["eval/loss"] for row in state.history if "eval/loss" in row]
    rows = []
    if losses:
        best = losses[-1] if state.best_loss is None else state.best_loss
        rows.append(("loss per held-out token", f"{losses[0]:.4f}", f"{best:.4f}"))
    for name, after in scores.get("after", {}).items():
        before = scores.get("before", {}).get(name)
        rows.append(
            (f"{_clean(name)} ({plural(answers, 'row')})", "-" if before is None else f"{before:.3f}", f"{after:.3f}")
        )
    if rows:
        yield from ("| | before | after |", "|---|---|---|")
        yield from (f"| {name} | {before} | **{after}** |" for name, before, after in rows)


def _training(spec: TrainSpec, state: TrainState) -> Iterator[str]:
    data, train = spec.config.data, spec.config.train
    taken = state.step if state.best_step is None else state.best_step
    steps = plural(state.step, "step") + (
        f", of which the adapter of step {taken} is kept" if taken != state.step else ""
    )
    yield (
        f"**Trained on** {_rows(spec.train)}{_sources(data.train)}: {steps}; a step has"
        f" {plural(train.global_batch, 'sequence')} of at most {data.max_length:,} tokens."
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
    shown = [_source(source) for source in sources[:NAMED]]
    if rest := len(sources) - NAMED:
        shown += [f"{rest} more"] if rest > 0 else []
    return ", ".join(shown)


def _source(source: Source) -> str:
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    return f"{_code(_short(source.path))} ({source.format}{weight})"


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
    text = ADAPTER.replace("{base}", what).replace("{elsewhere}", elsewhere)
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
    return flat if len(flat) <= LONGEST_LINE else f"{flat[: LONGEST_LINE - 3]}..."


# Input example of a registered model: the first held-out question of its training, as a request to a server.


LONGEST_EXAMPLE = 4000
"""Characters of a question that still serves as an example."""
_ROLES = (("user",), ("system", "user"))
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}%d\N{OBJECT REPLACEMENT CHARACTER}"


def request(spec: TrainSpec, folder: Path, prompt: tuple[int, ...]) -> dict[str, Any] | None:
    """The request that asks the model in `folder` what `prompt` (token ids) asks; None if there is no such request."""
    tokenizer = load_tokenizer(BaseModel(str(folder), str(folder), ""), spec.config.model)
    limit = {"max_tokens": spec.config.evaluation.max_new_tokens}
    if not has_chat_template(folder):
        text = as_text(tokenizer, prompt)
        return {"prompt": text, **limit} if 0 < len(text) <= LONGEST_EXAMPLE else None
    messages = chat(tokenizer, as_text(tokenizer, prompt, special=True))
    return {"messages": messages, **limit} if messages else None


def chat(tokenizer: Any, text: str) -> list[dict[str, str]] | None:
    """The messages that the tokenizer's chat template writes as `text`; None if these are not one or two."""
    for roles in _ROLES:
        marked = _rendered(tokenizer, [{"role": role, "content": _MARK % i} for i, role in enumerate(roles)])
        pattern = re.escape(marked)
        for i in range(len(roles)):
            pattern = pattern.replace(re.escape(_MARK % i), "(.+?)", 1)
        found = re.fullmatch(pattern, text, re.DOTALL)
        if found is None or len(found.groups()) != len(roles) or len(text) > LONGEST_EXAMPLE:
            continue
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


# Contents of the version that a run registers: its merged model, or its adapter with the base by reference.


@contextmanager
def of_run(spec: TrainSpec, folder: RunFolder, result: TrainResult, scores: Scores) -> Iterator[Contents]:
    """What a finished run registers, as files on this machine for the block."""
    config = spec.config
    with node_cache.fetched(folder.merged if config.export.merged else folder.adapter) as place:
        base = None if config.export.merged else _reference(spec, place)
        yield Contents(
            place,
            base,
            answers_as=config.registry.model or config.run.name,
            description=describe(spec, result, scores, base),
            example=_example(spec, place, result),
        )


def _example(spec: TrainSpec, place: Path, result: TrainResult) -> dict[str, Any] | None:
    """The input example; a tokenizer that does not load here is no reason not to register."""
    with suppress(UserError):
        return request(spec, place, result.answers[0].prompt) if result.answers else None
    return None


def _reference(spec: TrainSpec, adapter: Path) -> BaseOfAdapter:
    """The base of a run, as an adapter-only version keeps it."""
    base, revision = spec.base, spec.config.model.revision
    commit = _commit(base)
    # MLflow takes the tokenizer from where it takes the base. The hub's does not do if a chat template was added.
    on_hub = commit is not None and has_chat_template(adapter) == has_chat_template(Path(base.folder))
    name = models.pinned(base.name, spec.config)
    return BaseOfAdapter(name, base.digest, base.folder, commit or revision, on_hub)


def _commit(base: BaseModel) -> str | None:
    """The commit of a model that lies as the hub's client has downloaded it: models--ORG--NAME/snapshots/COMMIT."""
    place = Path(base.folder)
    from_hub = place.parts[-3:-1] == (f"models--{base.name.replace('/', '--')}", "snapshots")
    return place.name if from_hub else None


# The MLflow run of a training: made or resumed, and closed.


LATER = "nothing is lost: run the same command again when it does, to finish logging and registering"


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


@contextlib.contextmanager
def tracked(spec: TrainSpec, folder: RunFolder, parent: str | None = None) -> Iterator[run.Tracker]:
    """The MLflow run of this run, made or resumed; closed as FINISHED, FAILED or KILLED.

    `parent` is the id of the run of a search that this one is a trial of.
    """
    config = spec.config
    tags = {"olora.base_digest": spec.base.digest, "olora.method": config.adapter.method}
    with mlflow_run(config, tags, folder, flatten(config), parent=parent, advice=LATER) as tracker:
        log_data(tracker, spec)
        if not parent:
            tracker.watch_system()
        yield tracker


def log_data(tracker: run.Tracker, spec: TrainSpec) -> None:
    """Log the token stores that are complete as inputs of the run."""
    sources = {"training": (spec.train, spec.config.data.train), "evaluation": (spec.eval, spec.config.data.eval)}
    for context, (store, named) in sources.items():
        if store is not None and store.complete:  # else it is logged when training has ended
            place = ", ".join(source.path for source in named) or "held out from training"
            tracker.dataset(context, store.digest, place, store.manifest.rows, context)


@dataclass(frozen=True)
class Published:
    """What a run has left in MLflow."""

    result: dict[str, Any]
    """The content of result.json."""
    scores: Scores
    page: str | None
    """Address of the run's page, if a server shows it."""


def log_results(spec: TrainSpec, tracker: Tracker, result: TrainResult, answers: Sequence[Sample]) -> Scores:
    """Score the answers, and log scores, pictures and tables; safe to repeat.

    It comes before `publish`, so that a version is registered only when nothing is left that can fail. Raises
    UserError for a scorer that fails, and TrackingUnavailable if MLflow does not answer.
    """
    assert result.state is not None
    scores, history = score(spec.config, answers), result.state.history
    tracker.metrics({result.state.step: {f"score/{name}": value for name, value in scores.get("after", {}).items()}})
    tracker.metrics({0: {f"score/{name}": value for name, value in scores.get("before", {}).items()}})
    tracker.learning_curve(_points(history, "train/loss"), _points(history, "eval/loss"))
    columns = ("prompt", "reference", "before", "after")
    tracker.table("samples", columns, [[getattr(item, name) for name in columns] for item in answers])
    return scores


def publish(
    spec: TrainSpec,
    folder: RunFolder,
    tracker: Tracker,
    result: TrainResult,
    parity: dict[str, Any],
    more_tags: Mapping[str, str],
    scores: Scores | None = None,
) -> int | None:
    """Log the metrics that MLflow lacks, the parity report and the model; register it, if it is to be.

    Returns the version. Safe to repeat; raises TrackingUnavailable if MLflow does not answer.
    """
    config, state = spec.config, result.state
    assert state is not None
    tracker.metrics({int(row["step"]): {k: v for k, v in row.items() if k != "step"} for row in state.history})
    log_data(tracker, spec)
    tracker.text(json.dumps(parity, indent=2), "parity.json")
    name, alias, what = config.registry.model, config.registry.alias, _what(config)
    with of_run(spec, folder, result, scores or {}) as found, client.reachable(tracker.uri, upload=True):
        tags = {**_tags(spec, folder, state), **more_tags}
        if name is None:
            logger.info(f"logging the {what}")
            models.log_model(tracker, found, tags)
            return None
        logger.info(f"registering the {what} as {name}@{alias}")
        return models.register(tracker, found, name, alias, tags)


def _what(config: Config) -> str:
    return "merged model" if config.export.merged else "adapter, without its base model,"


def _tags(spec: TrainSpec, folder: RunFolder, state: TrainState) -> dict[str, object]:
    """The tags of a version: a few for people, and those of its record."""
    config = spec.config
    held_out = spec.eval.digest if spec.eval else ""
    made_of = Fingerprint(spec.base.digest, spec.train.digest, held_out, settings_digest(config))
    return {
        **made_of.tags(),
        RUN: folder.root,
        "olora.method": config.adapter.method,
        "olora.rank": config.adapter.rank,
        "olora.eval_loss": "" if state.best_loss is None else f"{state.best_loss:.6f}",
    }


def finish(
    spec: TrainSpec, tracker: Tracker, result: TrainResult, scores: Scores, parity: dict[str, Any], version: int | None
) -> Published:
    """Log what the run has come to; safe to repeat.

    Raises TrackingUnavailable if MLflow does not answer: result.json must not be written before all is logged.
    """
    content = _result(spec, tracker, result, scores, parity, version)
    tracker.text(json.dumps(content, indent=2) + "\n", "result.json")
    return Published(content, scores, tracker.url())


def _result(
    spec: TrainSpec, tracker: Tracker, result: TrainResult, scores: Scores, parity: dict[str, Any], version: int | None
) -> dict[str, Any]:
    assert result.state is not None
    state = result.state
    last: dict[str, float] = {}
    for row in state.history:
        last |= {name: value for name, value in row.items() if name != "step"}
    if state.best_loss is not None:  # that of the adapter that is exported
        last |= {"eval/loss": state.best_loss, "eval/perplexity": perplexity(state.best_loss)}
    first = next((row["eval/loss"] for row in state.history if "eval/loss" in row), None)
    return {
        "run": spec.config.run.name,
        "steps": state.step,
        "stopped_early": result.stopped_early,
        "best_step": state.best_step if state.best_step is not None else state.step,
        "metrics": last,
        "eval_loss_before": first,
        "scores": scores,
        "base": spec.base.to_json(),
        "data": {"train": spec.train.digest, "eval": spec.eval.digest if spec.eval else None},
        "self_test": result.self_test,
        "parity": parity,
        "mlflow": {"uri": client.shown_uri(tracker.uri), "run_id": tracker.run_id},
        "registered": {"model": spec.config.registry.model, "version": version, "alias": spec.config.registry.alias}
        if version is not None
        else None,
    }


def _points(history: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), row[name]) for row in history if name in row]
