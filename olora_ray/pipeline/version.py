"""The content of a version in MLflow's registry: its files and its description."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import node_cache
from olora_ray.common.secrets import mask
from olora_ray.common.statistics import share
from olora_ray.common.text import plural, shortened
from olora_ray.config.load import flatten
from olora_ray.pipeline.answers import Scores
from olora_ray.pipeline.export import Exported
from olora_ray.pipeline.exporter import system_message
from olora_ray.pipeline.model_card import facts_of
from olora_ray.tracking import models
from olora_ray.tracking.models import BaseOfAdapter, Contents, has_chat_template
from olora_ray.train.objectives.objective import objective_of

# The description of a version, in the Markdown that MLflow's page shows.


LOAD = """### Load

```python
import mlflow  # with MLFLOW_TRACKING_URI set to this server

generate = mlflow.transformers.load_model("{uri}"ELSEWHERE)
```"""


def describe(exported: Exported, scores: Scores, base: BaseOfAdapter | None, files: Path) -> str:
    """Return the description, with {uri} for the models:/ address; `base` is set for an adapter-only version.

    `files` is the export; its model card has the same facts.
    """
    blocks = [facts_of(files)]
    rows = []
    losses = exported.losses()
    if losses:
        best = exported.best_loss
        if best is None:
            best = losses[-1]
        rows.append(f"| loss per held-out token | {losses[0]:.4f} | **{best:.4f}** |")
    answers = plural(len(exported.result.answers), "row")
    for name, after in scores.get("after", {}).items():
        before = scores.get("before", {}).get(name)
        shown = "-" if before is None else f"{before:.3f}"
        rows.append(f"| {_clean(name)} ({answers}) | {shown} | **{after:.3f}** |")
    if rows:
        blocks.append("\n".join(["| | before | after |", "|---|---|---|", *rows]))
    if "eval/pairs/preferred" in exported.best_row:
        blocks.append(_of_pairs(exported))
    elsewhere = ""
    if base and not base.on_hub:
        elsewhere = ', base_model_path="FOLDER_OF_THE_BASE"'
    blocks.append(LOAD.replace("ELSEWHERE", elsewhere))
    if base:
        blocks.append(
            f"This version is only the adapter. Loading it needs its base model, {_name(base)}."
        )
    return "\n\n".join(blocks)


def _of_pairs(exported: Exported) -> str:
    store = exported.spec.eval
    assert store is not None
    pairs = store.counts(range(len(store))).pairs
    preferred = share(exported.best_row["eval/pairs/preferred"], pairs)
    than = "the version from which it continued" if exported.spec.start else "the base model"
    return (
        f"On {plural(pairs, 'held-out pair')} it gives the preferred answer the higher gain over {than} in"
        f" {preferred.mean:.2f} (95% interval {preferred.low:.2f} to {preferred.high:.2f})."
    )


def _name(base: BaseOfAdapter) -> str:
    if base.on_hub:
        return f"`{_clean(base.name)}` at commit `{base.revision}`"
    # The description must not show the folders of this cluster.
    name = _clean(base.name.rstrip("/").rpartition("/")[2])
    return f"a copy of `{name}`; without `base_model_path`, MLflow uses its path at registration"


def _clean(text: str) -> str:
    # Backticks and bars are syntax of Markdown tables, and a path or a column name may contain them.
    flat = mask(text).replace("`", "'").replace("|", "/").split()
    return shortened(" ".join(flat), 80)


# The registered files: the merged model, or the adapter with a reference to its base model.


@contextmanager
def contents_of(exported: Exported, scores: Scores) -> Iterator[Contents]:
    """Yield the files that a finished run registers, on this machine for the duration of the block."""
    spec = exported.spec
    config = spec.config
    measured = [(exported.step, ["train/loss"], ("training", spec.train.digest))]
    if spec.eval:
        held_out = ("evaluation", spec.eval.digest)
        losses = [*objective_of(config.train).measures()]
        names = [f"score/{name}" for name in scores.get("after", {})]
        measured.append((exported.step, losses, held_out))
        measured.append((exported.state.step, names, held_out))
    location = exported.folder.merged if config.export.merged else exported.folder.adapter
    with node_cache.fetched(location) as files:
        base = None
        if not config.export.merged:
            base = _reference(spec, files)
        yield Contents(
            files,
            base,
            answers_as=config.registry.model or config.run.name,
            system=system_message(config.data.train),
            description=describe(exported, scores, base, files),
            params=flatten(config),
            measured=measured,
        )


def _reference(spec: TrainSpec, adapter: Path) -> BaseOfAdapter:
    base = spec.base
    commit = base.commit()
    # MLflow loads the tokenizer from where it loads the base model. If the run added a chat template, the hub's
    # tokenizer lacks it, so the base model must not be loaded from the hub.
    on_hub = (
        commit is not None
        and spec.template is None
        and has_chat_template(adapter) == has_chat_template(Path(base.folder))
    )
    name = models.pinned(base.name, spec.config)
    return BaseOfAdapter(
        name, base.digest, base.folder, commit or spec.config.model.revision, on_hub
    )
