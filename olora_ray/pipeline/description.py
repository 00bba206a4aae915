"""Description of a registered version in words, in the Markdown that MLflow's page shows.

It says nothing of machines: files are named without their folders. An adapter's base is named as its version keeps it.
"""

from collections.abc import Iterator, Sequence

from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.common import storage
from olora_ray.common.secrets import mask
from olora_ray.common.text import plural
from olora_ray.config.schema import Source
from olora_ray.pipeline.answers import Scores
from olora_ray.tokens.manifest import Manifest
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking.contents import BaseOfAdapter
from olora_ray.train.state import TrainState

NAMED = 6
"""Sources that are named; of more only the number is told."""
LONGEST = 80
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
    return flat if len(flat) <= LONGEST else f"{flat[: LONGEST - 3]}..."
