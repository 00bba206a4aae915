"""A run that has ended, but for the training: all that publishing, evaluating and the gate find of one, without Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.adapter.peft_folder import new_adapter
from olora_ray.cluster.spec import AnswerPair, TrainResult, TrainSpec
from olora_ray.config.load import build
from olora_ray.config.schema import Config
from olora_ray.model.load import load_tokenizer
from olora_ray.pipeline import publish
from olora_ray.pipeline.base import open_base
from olora_ray.pipeline.export import Exported, about_data, complete
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.tokens.prepare import prepare
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.start import resolve_uri, start_run
from olora_ray.train.checkpoint import TrainState
from olora_ray.train.generate import questions
from tests import mlflow_database, tiny
from tests.export_parts import Case, make_case
from tests.pipelines import project

SCORES = {"before": {"exact_match": 0.0}, "after": {"exact_match": 0.5}}


@dataclass
class FinishedRun:
    """What a training has left, and its exports."""

    spec: TrainSpec
    folder: RunFolder
    result: TrainResult
    case: Case

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def exported(self) -> Exported:
        return Exported(self.spec, self.folder, self.result, {})

    @property
    def aliases(self) -> Aliases:
        return Aliases(resolve_uri(self.config), str(self.config.registry.model))

    def registered(self, tags: Mapping[str, str] | None = None) -> str:
        """Register it once more, by another run of MLflow; returns the version."""
        tracker = start_run(self.config, "test", {})
        return str(publish.register(self.exported, tracker, tags or {}, SCORES))


def make(folder: Path, **changes: Any) -> FinishedRun:
    """A run in `folder` on a tiny model and corpus, with changes as project.settings has them."""
    from transformers import AutoModelForCausalLM

    project.make_tiny(folder)
    config = tiny.read_as(
        build(project.settings(folder, folder / "model", train__objective="tokens", **changes))
    )
    mlflow_database.place(Path(config.run.storage))
    case = make_case(
        folder / "model", AutoModelForCausalLM.from_pretrained(folder / "model"), config.adapter
    )
    base = open_base(config)
    decided = tiny.decided(config)
    train = prepare(decided, base.spec, "train")
    held_out = prepare(decided, base.spec, "eval")
    spec = TrainSpec(config, base.model, base.spec.digest, base.eos, train, held_out)
    state = TrainState(
        6, 1.25, 6, history=[{"step": 0.0, "eval/loss": 2.5}, {"step": 6.0, "eval/loss": 1.25}]
    )
    question = questions(held_out, 1)[0]
    result = TrainResult(
        state=state, answers=(AnswerPair(question.prompt, question.reference, (), ()),)
    )
    run = FinishedRun(spec, tiny.claimed(config), result, case)
    _export(run, state)
    return run


def _export(run: FinishedRun, state: TrainState) -> None:
    case, base = run.case, run.spec.base
    merged = case.write_merged(Path(run.folder.merged)) if run.config.export.merged else None
    with new_adapter(
        case.adapter, case.settings, base.folder, Path(run.folder.adapter), case.model
    ) as (folder, rank):
        complete(
            run.config,
            base,
            state,
            folder,
            rank,
            load_tokenizer(base, run.config.model),
            None,
            merged,
            **about_data(run.spec),
        )
    run.folder.write_result({"metrics": {}, "base": {"digest": base.digest}})
