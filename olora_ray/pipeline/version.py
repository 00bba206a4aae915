"""The content of a version in MLflow's registry: its files and its description."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from olora_ray.cluster.spec import TrainSpec
from olora_ray.common import node_cache
from olora_ray.common.secrets import mask
from olora_ray.common.text import plural
from olora_ray.config.load import flatten
from olora_ray.pipeline.answers import Scores
from olora_ray.pipeline.export import Exported
from olora_ray.pipeline.model_card import facts_of
from olora_ray.tracking import models
from olora_ray.tracking.models import BaseOfAdapter, Contents, has_chat_template
from olora_ray.train.objectives.objective import objective_named

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
    elsewhere = ', base_model_path="FOLDER_OF_THE_BASE"' if base and not base.on_hub else ""
    needed = (
        f"This version is only the adapter. Loading it needs its base model, {_name(base)}."
        if base
        else ""
    )
    blocks = [
        facts_of(files),
        "\n".join(_table(exported, scores)),
        LOAD.replace("ELSEWHERE", elsewhere),
        needed,
    ]
    return "\n\n".join(block for block in blocks if block)


def _table(exported: Exported, scores: Scores) -> Iterator[str]:
    state, rows = exported.state, []
    if losses := exported.losses():
        best = losses[-1] if state.best_loss is None else state.best_loss
        rows.append(("loss per held-out token", f"{losses[0]:.4f}", f"{best:.4f}"))
    answers = plural(len(exported.result.answers), "row")
    for name, after in scores.get("after", {}).items():
        before = scores.get("before", {}).get(name)
        rows.append(
            (
                f"{_clean(name)} ({answers})",
                "-" if before is None else f"{before:.3f}",
                f"{after:.3f}",
            )
        )
    if rows:
        yield from ("| | before | after |", "|---|---|---|")
        yield from (f"| {name} | {before} | **{after}** |" for name, before, after in rows)


def _name(base: BaseOfAdapter) -> str:
    if base.on_hub:
        return f"`{_clean(base.name)}` at commit `{base.revision}`"
    # The description must not show the folders of this cluster.
    name = _clean(base.name.rstrip("/").rpartition("/")[2])
    return f"a copy of `{name}`; without `base_model_path`, MLflow uses its path at registration"


def _clean(text: str) -> str:
    # Backticks and bars are syntax of Markdown tables, and a path or a column name may contain them.
    flat = " ".join(mask(text).replace("`", "'").replace("|", "/").split())
    return flat if len(flat) <= 80 else f"{flat[:77]}..."


# The registered files: the merged model, or the adapter with a reference to its base model.


@contextmanager
def contents_of(exported: Exported, scores: Scores) -> Iterator[Contents]:
    """Yield the files that a finished run registers, on this machine for the duration of the block."""
    spec, folder, config = exported.spec, exported.folder, exported.spec.config
    with node_cache.fetched(folder.merged if config.export.merged else folder.adapter) as files:
        base = None if config.export.merged else _reference(spec, files)
        yield Contents(
            files,
            base,
            answers_as=config.registry.model or config.run.name,
            description=describe(exported, scores, base, files),
            params=flatten(config),
            measured=_measured(exported, scores),
        )


def _measured(exported: Exported, scores: Scores) -> list[tuple[int, list[str], tuple[str, str]]]:
    spec, step = exported.spec, exported.step
    found = [(step, ["train/loss"], ("training", spec.train.digest))]
    if spec.eval:
        held_out = ("evaluation", spec.eval.digest)
        names = [f"score/{name}" for name in scores.get("after", {})]
        found += [
            (step, [*objective_named(spec.config.train.objective).measures()], held_out),
            (exported.state.step, names, held_out),
        ]
    return found


def _reference(spec: TrainSpec, adapter: Path) -> BaseOfAdapter:
    base, revision = spec.base, spec.config.model.revision
    commit = base.commit()
    # MLflow loads the tokenizer from where it loads the base model. If the run added a chat template, the hub's
    # tokenizer lacks it, so the base model must not be loaded from the hub.
    on_hub = (
        commit is not None
        and spec.template is None
        and has_chat_template(adapter) == has_chat_template(Path(base.folder))
    )
    name = models.pinned(base.name, spec.config)
    return BaseOfAdapter(name, base.digest, base.folder, commit or revision, on_hub)
