"""Distributed OLoRA fine-tuning on Ray: `olora-ray --help` lists the commands, and these functions are for programs.

Each function does what its command does, and prints the same lines. They raise UserError for what you can fix, its
subclass TryAgain if the same call may succeed later, and Stopped after Ctrl+C.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

from olora_ray.common.errors import Stopped, TryAgain, UserError

if TYPE_CHECKING:
    from olora_ray.evaluation.chat import Answers
    from olora_ray.retrain.decision_run import Entry

    Path = str | PathLike[str]
    Metric = Callable[[Sequence[Mapping[str, str]]], Mapping[str, float]]

# Everything else is imported in the functions, because each process of a cluster imports this module.

__all__ = [
    "Outcome",
    "Result",
    "Stopped",
    "TryAgain",
    "UserError",
    "compare",
    "evaluate",
    "finetune",
    "init",
    "load",
    "retrain",
    "sweep",
]


class _Page:
    """A result that a notebook shows as the page in its folder."""

    folder: str

    def _repr_html_(self) -> str:
        """Return report.html as a frame."""
        from html import escape

        from olora_ray.common import storage

        page = storage.read_text(storage.join(self.folder, "report.html"))
        return f'<iframe srcdoc="{escape(page)}" style="width: 100%; height: 700px"></iframe>'


@dataclass(frozen=True)
class Result(_Page):
    folder: str
    """The run's folder: report.html, checkpoints, export/adapter, export/merged."""
    loss_before: float | None
    """Held-out loss of the base model in nats per token; None without held-out rows."""
    loss: float | None
    """Held-out loss of the exported model, in the same unit."""
    scores: Mapping[str, Mapping[str, float]]
    """{"before": {name: mean}, "after": {name: mean}}; {} without evaluation.scorer."""
    model: str | None
    """models:/NAME/VERSION in MLflow; None without registry.model."""
    history: Sequence[Mapping[str, float]] = field(default=(), repr=False)
    """A row per measurement, with `step` and train/... or eval/..., such as train/loss."""


@dataclass(frozen=True)
class Outcome(_Page):
    folder: str
    """The folder of a search or comparison: report.html and best.yaml, a config to fine-tune with."""
    record: Any
    """All its numbers: `record.best()` is the best trial (`params`, `value`) or the best arm (`name`, `loss`)."""


def finetune(
    config: Path | Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    model: Path | None = None,
    data: Any = None,
    eval: Any = None,
    name: str | None = None,
    on_step: Callable[[Mapping[str, float]], object] | None = None,
    **fields: Any,
) -> Result:
    """Fine-tune as `olora-ray finetune`; the same call resumes a run that was stopped, and returns a finished one.

    Without a config, `model` and `data` are enough: the rows decide the rest, as in `olora-ray init`. `data` is a path,
    a list of paths, or the rows: a list of dicts, a DataFrame or a Dataset. `eval` are held-out rows in the same forms;
    without them, some rows are held out. `name` is the run's name; by default that of the data.

    Other fields are keywords: a field's own name (`lr=1e-3`), its name in Hugging Face's libraries
    (`num_train_epochs=2`), or a section (`cluster={"workers": 2}`). `scorer` may be a function (answer, reference) ->
    {name: number}, or (rows) -> {name: number} for a number of all answers together. `config` is a config file or a
    nested mapping, and `changes` are dotted fields: `finetune("my_run.yaml", {"train.steps": 6})`. `on_step` gets each
    row of metrics in this process, with its `step`; after a restart of the workers, some steps again.

    Examples:
        >>> rows = [{"prompt": f"after {n}?", "completion": f"{n + 1}"} for n in range(40)]
        >>> seen = []
        >>> result = olora_ray.finetune(
        ...     model="model", data=rows, name="my_run", steps=6, on_step=seen.append
        ... )
        >>> result.loss < result.loss_before
        True
        >>> seen[-1]["step"] == result.history[-1]["step"] == 6
        True
    """
    logs = _ready()
    on_row = None
    if on_step is not None:

        def on_row(step: int, row: Mapping[str, float]) -> None:
            on_step({"step": step, **row})

    with logs.printed():
        from olora_ray.calls import settings
        from olora_ray.data import detect

        given = {**(changes or {}), **settings.changes_of(fields)}
        if model is not None:
            given["model.name"] = str(model)
        if name is not None:
            given["run.name"] = name
        read = settings.config_of(config, given, {"data": data, "eval": eval})
        found = detect.check_data(read)
        from olora_ray.pipeline import publish, run, run_folder

        content = run.run(read, found=found, on_row=on_row)
        publish.push(read)
    version = None
    registered = content["registered"]
    if registered:
        version = f"models:/{registered['model']}/{registered['version']}"
    return Result(
        folder=read.folder(),
        loss_before=content["eval_loss_before"],
        loss=content["metrics"].get("eval/loss"),
        scores=content["scores"],
        model=version,
        history=run_folder.history(read.folder()),
    )


def load(model: Path | Result, system: str | None = None) -> Answers:
    """Load a fine-tuned model into this process; call it with a prompt to get an answer.

    `model` is a finished run (its result, its folder, or its name in ./runs), a checkpoint, an adapter, or NAME@ALIAS
    of the registry. `system` is the message before each prompt; None: the one that all rows of the run's data have.

    Examples:
        >>> model = olora_ray.load("my_run")
        >>> answer, before = model("after 100?"), model("after 100?", adapted=False)
        >>> answers = model.generate(["after 100?", "after 7?"], max_new_tokens=4)
        >>> "".join(model.generate("after 100?", stream=True)).strip() == answer
        True
    """
    logs = _ready()
    from olora_ray.evaluation.chat import Answers

    with logs.printed():
        return Answers(_name(model), {}, system)


def evaluate(
    model: Path | Result | Answers,
    data: Any = None,
    *,
    metrics: Iterable[Metric] = (),
    config: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **fields: Any,
) -> dict[str, float]:
    """Measure a model on held-out rows as `olora-ray evaluate`, and return its metrics.

    `model` is a run, a checkpoint, an adapter, NAME@ALIAS of the registry or a base model. `data` are the rows, in the
    forms of `finetune`; by default those that `config` names, else those of the model's run. Each of `metrics` is a
    function from all answers, a list of {"prompt": ..., "reference": ..., "answer": ...}, to {name: number}.

    Examples:
        >>> rows = [{"prompt": "after 100?", "completion": "101"}]
        >>> def longest(answers):
        ...     return {"longest": max(len(row["answer"]) for row in answers)}
        >>> sorted(olora_ray.evaluate("runs/my_run", rows, metrics=[longest]))
        ['eval/exact_match', 'eval/longest', 'eval/loss', 'eval/perplexity']
    """
    logs = _ready()
    with logs.printed():
        from olora_ray.calls import measuring, settings

        file = None if config is None else str(config)
        given = {**(changes or {}), **settings.changes_of(fields)}
        return measuring.evaluate(_name(model), file, given, data, tuple(metrics))


def init(*data: Path, **options: Any) -> str:
    """Write a config for your rows as `olora-ray init`; return its path, for `finetune`.

    The options are those of the command: `model`, `name` and `out`.

    Examples:
        >>> config = olora_ray.init("train.jsonl", model="model")
    """
    return str(_command("init", map(str, data), {}, options))


def sweep(
    config: Path, space: Path, changes: Mapping[str, Any] | None = None, **options: Any
) -> Outcome:
    """Search settings as `olora-ray sweep`, with a config and a space file; the options are `register` and `refit`.

    `changes` are dotted fields of the config.
    """
    return Outcome(*_command("sweep", [str(config), str(space)], changes, options))


def compare(config: Path, changes: Mapping[str, Any] | None = None, **options: Any) -> Outcome:
    """Compare adapters as `olora-ray compare`, with a config file: `methods` (`"lora,olora"`), `seeds` (4) and `arm`.

    `arm` is a text, such as `"r64: adapter.rank=64"`, or a list of texts. `changes` are dotted fields of the config.
    """
    return Outcome(*_command("compare", [str(config)], changes, options))


def retrain(config: Path, changes: Mapping[str, Any] | None = None) -> Entry:
    """Retrain a registered model as `olora-ray retrain`, with a config file; return the decision.

    Its `decision` is unchanged, promoted or refused, with the `reason`; `challenger` and `champion`, the champion until
    then, are numbers of versions.
    """
    entry: Entry = _command("retrain", [str(config)], changes, {})
    return entry


def _command(
    command: str,
    words: Iterable[str],
    changes: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Any:
    """Run a command with these words, and return what its script returns."""
    logs = _ready()
    from olora_ray.calls.script import script

    argv = [*words]
    for name, value in (changes or {}).items():
        argv.append(f"{name}={json.dumps(value, default=str)}")
    for option, value in options.items():
        if value is True:
            argv.append(f"--{option}")
            continue
        values = value if isinstance(value, list | tuple) else [value]
        argv += [f"--{option}={each}" for each in values if each is not False]
    with logs.printed():
        return script(command).main(argv)


def _name(model: Path | Result | Answers) -> str:
    return str(getattr(model, "folder", model))


def _ready() -> Any:
    from olora_ray.common import logs

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise UserError(
            "this process is connected to Ray: call ray.shutdown(); RAY_ADDRESS chooses the cluster"
        )
    logs.quiet_environment()  # Ray reads these variables when it is imported
    return logs


class _Front(ModuleType):
    """Keeps the functions `sweep` and `retrain`: importing a subpackage of that name would replace them."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
