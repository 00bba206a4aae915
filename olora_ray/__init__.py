"""Distributed OLoRA fine-tuning on Ray: `olora-ray --help` lists the commands, and these functions are for programs.

Each function does what its command does, and prints the same lines.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olora_ray.evaluation.chat import Answers

# Everything else is imported in the functions, because each process of a cluster imports this module.

__all__ = ["Result", "evaluate", "finetune", "load"]


@dataclass(frozen=True)
class Result:
    folder: str
    """The run's folder: report.html, checkpoints, export/adapter, export/merged."""
    loss_before: float | None
    """Held-out loss of the base model in nats per token; None without held-out rows."""
    loss: float | None
    scores: Mapping[str, Mapping[str, float]]
    """{"before": {name: mean}, "after": {name: mean}}; {} without evaluation.scorer."""
    model: str | None
    """models:/NAME/VERSION in MLflow; None without registry.model."""

    def _repr_html_(self) -> str:
        """Return the run's page for a notebook."""
        from html import escape

        from olora_ray.common import storage

        page = storage.read_text(storage.join(self.folder, "report.html"))
        return f'<iframe srcdoc="{escape(page)}" style="width: 100%; height: 700px"></iframe>'


def finetune(
    config: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None
) -> Result:
    """Fine-tune as `olora-ray finetune`; the same call resumes a run that was stopped, and returns a finished one.

    `config` is a config file, or its content as a nested mapping; `changes` are dotted fields. Raises UserError for
    what you can fix, its subclass TryAgain if the same call may succeed later, and Stopped after Ctrl+C.

    >>> result = olora_ray.finetune("my_run.yaml", {"train.steps": 6})
    >>> result.loss < result.loss_before
    True
    """
    logs = _ready()
    from olora_ray.config import command_line

    with logs.printed():
        read = command_line.loaded(config, dict(changes or {}))
        from olora_ray.data import detect

        found = detect.check_data(read)
        from olora_ray.pipeline import publish, run

        content = run.run(read, found=found)
        publish.push(read)
    model = None
    registered = content["registered"]
    if registered:
        model = f"models:/{registered['model']}/{registered['version']}"
    loss = content["metrics"].get("eval/loss")
    return Result(read.folder(), content["eval_loss_before"], loss, content["scores"], model)


def load(run: str, system: str | None = None) -> Answers:
    """Load a finished run's model, by its folder or its name in ./runs; call it with a prompt to get an answer.

    `system` is the message before each prompt; None: the one that all rows of the data have.

    >>> model = olora_ray.load("my_run")
    >>> answer, before = model("after 100?"), model("after 100?", adapted=False)
    """
    logs = _ready()
    from olora_ray.evaluation.chat import Answers

    with logs.printed():
        return Answers(run, {}, system)


def evaluate(
    model: str, config: str | None = None, changes: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Measure a model on held-out rows as `olora-ray evaluate`, and return its metrics.

    `model` is a run, a checkpoint, an adapter, models:/NAME@ALIAS or a base model; `config` names the rows, by default
    those of the model's run.

    >>> sorted(olora_ray.evaluate("runs/my_run"))
    ['eval/loss', 'eval/perplexity']
    """
    logs = _ready()
    from olora_ray.evaluation import results

    with logs.printed():
        (measured,), _ = results.run(results.EvalRequest((model,), config, dict(changes or {})))
    return measured.metrics()


def _ready() -> Any:
    from olora_ray.common import errors, logs

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise errors.UserError(
            "this process is connected to Ray: call ray.shutdown(); RAY_ADDRESS chooses the cluster"
        )
    logs.quiet_environment()  # Ray reads these variables when it is imported
    return logs
