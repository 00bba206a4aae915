"""A part of the change of a challenger that is better on its task but does harm elsewhere.

    dA(t) = dA0 + t (dA - dA0)        dB(t) = dB0 + t (dB - dB0)

dA0 and dB0 are those of the night's first step: 0 from the base model, the champion's from the champion. So t = 0 is
the model from which the night started, t = 1 is the challenger, and each t between them is an adapter of the same
method and rank. The weights change by t times the trained change, except for the product dB dA, which counts t^2 times.

Each t is measured as an adapter, without a version. The first that passes gets a run folder with a checkpoint in which
all steps are done, so the pipeline trains nothing: it measures, exports, checks and registers.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from olora_ray.adapter.layer import AdapterWeights
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.common import node_cache, storage
from olora_ray.config.load import dump, override
from olora_ray.config.schema import Config
from olora_ray.config.section import extended
from olora_ray.model.load import skeleton
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.retrain import gate
from olora_ray.retrain.compare import Candidate
from olora_ray.retrain.gate import Decision
from olora_ray.retrain.recipe import SHRUNK, Inputs
from olora_ray.tracking.checksums import Version
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def tried(
    refused: Decision,
    challenger: Version,
    trained: Config,
    inputs: Inputs,
    decide: Callable[[Version], Decision],
) -> Decision:
    """Return the refusal of a challenger. Its tags name the largest part of its change that `decide` passes.

    `trained` is the config of its run.
    """
    logger.info(f"version {challenger.number} does harm: {refused.reason}")
    model = inputs.base.model
    reason = refused.reason
    for factor in gate.SHRUNK:
        logger.info(f"trying {factor:g} of the change of version {challenger.number}")
        part = _part(trained, factor)
        if part is None:
            return replace(refused, reason=f"{reason}; its checkpoint is gone, so it is not shrunk")
        path = RunFolder(trained.folder()).export(f"shrunk-{factor:g}")
        with node_cache.local_folder(path) as folder:
            shape = skeleton(model, trained.model)
            write_adapter(part.adapter, trained.adapter, model.folder, folder, shape)
        decision = decide(Candidate(**vars(challenger), factor=factor, adapter=path))
        storage.remove(path)
        if decision.passed:
            tags = {**refused.tags, SHRUNK: f"{factor:g}"}
            return replace(refused, reason=f"{reason}; {factor:g} of its change passes", tags=tags)
        logger.info(f"{factor:g} of the change does not pass: {decision.reason}")
    reason += f"; {factor:g} of its change does not pass either: {decision.reason}"
    return replace(refused, reason=reason)


def prepare(trained: Config, factor: float) -> Config:
    """Write the run folder of a part of a run's change, unless it exists; return its config."""
    name, _, key = trained.run.name.rpartition("-")
    config = override(trained, {"run.name": extended(name, f"{key}-shrunk-{factor:g}")})
    folder = RunFolder(config.folder())
    if not checkpoints.names(folder.checkpoints):
        part = _part(trained, factor)
        assert part is not None
        folder.write_config(config, RunFolder(trained.folder()).decisions(), folder.state())

        def write(out: Path) -> None:
            checkpoint.save(
                out, part.adapter, None, part.optimizer, part.state, part.identity, dump(config)
            )

        name = checkpoints.name_of(part.state.step)
        checkpoints.put(write, storage.join(folder.checkpoints, name))
    return config


def _part(trained: Config, factor: float) -> Checkpoint | None:
    """Return the checkpoint of a part of a run's change; None if the run's own checkpoints are gone."""
    latest = checkpoints.latest_good(RunFolder(trained.folder()).checkpoints)
    if latest is None:
        return None
    whole = latest[1]
    start: dict[str, AdapterWeights] = {}
    if trained.train.start is not None:
        start = checkpoints.read(trained.train.start).best_adapter()
    adapter = {}
    for name, weights in whole.best_adapter().items():
        adapter[name] = weights.shrunk(start.get(name), factor)
    # The held-out numbers after step 0 are those of the whole change.
    history = []
    for row in whole.state.history:
        if row["step"] > 0:
            row = {each: value for each, value in row.items() if not each.startswith("eval/")}
        history.append(row)
    state = replace(whole.state, best_loss=None, best_step=None, history=history, shrunk=factor)
    return replace(whole, adapter=adapter, best=None, state=state)
