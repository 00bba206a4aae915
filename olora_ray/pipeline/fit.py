"""Training of a run on the cluster; a training that an earlier attempt finished is found instead."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
import ray.train

from olora_ray.cluster.channel import make_channel
from olora_ray.cluster.failures import TellDriver
from olora_ray.cluster.in_place import InPlaceGroups, in_place
from olora_ray.cluster.late_start import LateStart
from olora_ray.cluster.process_group import ProcessGroup
from olora_ray.cluster.resources import worker_resources
from olora_ray.cluster.spec import TrainResult, TrainSpec
from olora_ray.cluster.train_worker import Entry, train_worker
from olora_ray.pipeline.attempts import Attempts
from olora_ray.pipeline.monitor import Monitor, OnRow
from olora_ray.pipeline.progress import Progress
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.pipeline.signals import Stop
from olora_ray.pipeline.trainers import WorkerGroup
from olora_ray.tokens.prepare import CompleteStore, StoreBuild
from olora_ray.tracking.prometheus import Telemetry
from olora_ray.tracking.run import Tracker
from olora_ray.train import checkpoint, checkpoints
from olora_ray.train.schedule import Schedule

logger = logging.getLogger(__name__)

# Ray's stubs describe Train V1; V2, which runs, has more arguments.
ray_train: Any = ray.train
SPARE = {"CPU": 0.0, "memory": 1.0}
"""What Ray is to set aside for a spare: something, and no CPU."""
FitOn = Callable[[Any, WorkerGroup], TrainResult]
"""Trains once: gets the driver's channel and the workers."""


def train(
    spec: TrainSpec,
    folder: RunFolder,
    build: StoreBuild | CompleteStore,
    tracker: Tracker,
    stop: Stop,
    on_row: OnRow | None = None,
    fit_on: FitOn | None = None,
) -> TrainResult:
    """Train until done, whatever dies meanwhile; keeps training.json.

    `fit_on` trains once, on workers that it has a place for; by default TorchTrainer does, where there is room. Raises
    UserError with what went wrong in the end, and Stopped if a signal has asked for an end.
    """
    config = spec.config
    channel = make_channel(ray.get_runtime_context().get_node_id())
    worker = worker_resources(config)
    stop.gentle = True
    try:
        with Progress(Schedule(config.train, build.store).total(), config.train.log_every) as progress:
            monitor = Monitor(channel, tracker, progress, Telemetry(config.run.name), on_row)
            fit = partial(fit_on or partial(_fit, spec, folder, worker), channel)
            changing = fit_on is None and in_place(config, worker)
            result = Attempts(spec, build, monitor, stop, worker, fit, changing, placed=fit_on is not None).run()
    finally:
        stop.gentle = False
    folder.write_training(result.to_json())
    if stop.asked:
        raise stop.stopped("stopped after the last step")
    return result


def finished_training(spec: TrainSpec, folder: RunFolder) -> TrainResult | None:
    """What an earlier attempt's training gave, if it had ended; what comes after it may be left to do.

    Raises UserError if the run's checkpoints are of another model, tokenizer, data or adapter.
    """
    found = checkpoints.latest_good(folder.checkpoints)
    if found is None:
        return None
    place, newest = found
    checkpoint.require_same(newest.identity, spec.identity(), place)
    text = folder.trained()
    if text is None:
        return None
    try:
        result = TrainResult.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(f"{folder.training} is damaged ({error}): the end of the training is done again")
        return None
    if result.state is None or result.state.step != newest.state.step:
        return None  # the last checkpoint is lost: train again from the one before, with the same result
    logger.info(f"training was finished before, at step {result.state.step}: continuing with what comes after it")
    return result


def trainer(spec: TrainSpec, folder: RunFolder, worker: Mapping[str, float], channel: Any, group: WorkerGroup) -> Any:
    """Ray's trainer for a group of workers, each with the resources of `worker`."""
    from ray.train.torch import TorchTrainer

    from olora_ray.cluster import train_internals

    # Groups that do not change in place are of another size at each attempt where they are elastic, so Ray must not
    # retry: every failure returns to `Attempts`, as does any of a group's whole if its room is gone.
    cluster, changing = spec.config.cluster, in_place(spec.config, worker)
    limits = {"max_failures": cluster.max_failures}
    if cluster.is_elastic():
        limits |= {"controller_failure_limit": 0}
    if cluster.is_elastic() and not changing:
        limits |= {"max_failures": 0, "max_preemption_failures": 0}
    torch_config: Any = InPlaceGroups() if changing else ProcessGroup()
    # Not as train_loop_config, which the controller unpacks too: it would import torch for the spec.
    work: Any = partial(train_worker, spec, folder.checkpoints, channel)
    if changing:
        entry = Entry(group.first_rank, group.attempt)
        work = LateStart(channel, ray.cloudpickle.dumps(partial(train_worker, spec, folder.checkpoints, entry=entry)))
    made = TorchTrainer(
        work,
        torch_config=torch_config,
        scaling_config=ray_train.ScalingConfig(
            num_workers=group.workers,
            use_gpu="GPU" in worker,
            resources_per_worker=SPARE if group.spare else dict(worker),
        ),
        run_config=ray_train.RunConfig(
            name="checkpoints",
            storage_path=folder.root,
            failure_config=ray_train.FailureConfig(**limits),
            callbacks=[TellDriver(channel)],
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
        ),
    )
    return train_internals.adapted(made)


def _fit(
    spec: TrainSpec, folder: RunFolder, worker: Mapping[str, float], channel: Any, group: WorkerGroup
) -> TrainResult:
    result = getattr(trainer(spec, folder, worker, channel, group).fit(), "return_value", None)
    if not isinstance(result, TrainResult):
        raise RuntimeError(f"training returned {result!r}")
    return result
