"""A run on a Ray cluster: connect, prepare tokens, train, export. Each stage is one function."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import ray
import ray.train
from ray.exceptions import RayActorError, RayTaskError

from olora_ray.cluster import address, channel, preflight
from olora_ray.cluster.failures import TellDriver, cause, counts
from olora_ray.cluster.resources import Demand, free_workers, worker_resources
from olora_ray.cluster.spec import Outcome, Task
from olora_ray.cluster.worker import train_worker
from olora_ray.common.errors import UserError
from olora_ray.common.quiet import ENVIRONMENT, quiet_ray, quiet_transformers
from olora_ray.config.schema import Config
from olora_ray.data.tokenize import TokenizerSpec, spec_from_pretrained
from olora_ray.model import source
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.monitor import Monitor, OnRow
from olora_ray.pipeline.progress import Progress
from olora_ray.pipeline.publish import export_run
from olora_ray.pipeline.run_folder import RunFolder
from olora_ray.pipeline.signals import Stop
from olora_ray.tokens import store
from olora_ray.tokens.prepare import Made, Preparation
from olora_ray.tokens.store import TokenStore
from olora_ray.tracking import run as tracking
from olora_ray.train.schedule import Schedule

# Ray's stubs describe Train V1; V2, which runs, has more arguments.
ray_train: Any = ray.train
Say = Callable[[str], None]
Fit = Callable[[int], Outcome]
SETTLE = 3.0
"""Seconds for which the room for workers must stay as it is: ended workers give theirs back one by one."""


@contextlib.contextmanager
def connect(config: Config, say: Say, base: BaseModel | None = None) -> Iterator[Stop]:
    """A connection to the cluster of RAY_ADDRESS or of this machine, or to a new local Ray.

    Yields what takes the signals meanwhile. Raises UserError if it does not answer or the run cannot work there;
    with `base`, its memory and the disk are looked at too. On leaving, the connection is closed,
    and a local Ray with it.
    """
    quiet_ray()
    shared: dict[str, Any] = {"logging_level": logging.WARNING, "runtime_env": {"env_vars": ENVIRONMENT}}
    if (found := address.find()) == "local":
        # With its dashboard: Train frees the resources of a stopped run through the State API. It can start
        # jobs, so it answers this machine only.
        shared["dashboard_host"] = "127.0.0.1"
    ray.init(address=found, **shared)
    try:
        with Stop() as stop:  # after ray.init, which sets a handler of its own
            resources = ray.cluster_resources()
            say(f"ray: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {len(ray.nodes())} node(s)")
            preflight.check(config, base, say)
            yield stop
    except BaseException:
        # A prefetching thread of Ray Data that calls Ray after its shutdown ends this process without a word:
        # the error would be lost.
        time.sleep(1)
        raise
    finally:
        ray.shutdown()


@contextlib.contextmanager
def tokens(config: Config, spec: TokenizerSpec, say: Say) -> Iterator[tuple[Preparation, TokenStore | None]]:
    """The token store for training and, if rows are held out, the one for evaluation.

    The latter is complete. The former may be in the making, where the cluster has room for that beside
    the training; what is not made on leaving is left to the next run.
    """
    with user_errors():
        training = store.begin(config, spec, "train", say)
        held_out = None
        if config.data.eval or config.data.eval_fraction:
            held_out = store.prepare(config, spec, "eval", say)
        if training.complete or training.small:
            training.run()
        else:
            say("tokens: train: in the making; training starts with the first shards")
            training.start(config.cluster.most() * config.cluster.cpus_per_worker)
    try:
        yield training, held_out
    finally:
        training.stop()
        with contextlib.suppress(Exception):  # it has been told, or nobody needs it any more
            training.join()


def made_task(config: Config, base: source.BaseModel, tokenizer: Any, say: Say, cpus_held: float = 0.0) -> Task:
    """The task of a config, its tokens complete, without a board.

    Where others hold `cpus_held` CPUs, about all, Ray is asked for none.

    Raises UserError for data that cannot be used.
    """
    spec = spec_from_pretrained(tokenizer, base.name)
    with user_errors():
        training = store.begin(config, spec, "train", say)
        training.run(cpus_held)
        wanted = config.data.eval or config.data.eval_fraction
        held_out = store.prepare(config, spec, "eval", say) if wanted else None
    complete = TokenStore.open(training.store.uri)
    return Task(config, base, spec.digest, source.end_tokens(base, tokenizer), complete, held_out, None)


def train(
    task: Task,
    folder: RunFolder,
    preparation: Preparation | Made,
    tracker: tracking.Tracker,
    stop: Stop,
    say: Say,
    on_row: OnRow | None = None,
    fit: Fit | None = None,
) -> Outcome:
    """Train until done, whatever dies meanwhile; keeps training.json.

    `fit` trains once with so many workers, by default under TorchTrainer. Raises UserError with what went
    wrong in the end, and Stopped if a signal has asked for an end.
    """
    total = Schedule(task.config.train, preparation.store).total()
    stop.gentle = True
    try:
        with Progress(total, task.config.train.log_every, say) as progress:
            wanted = worker_resources(task.config)
            monitor = Monitor(task, preparation, tracker, progress, stop, wanted, on_row)
            outcome = _until_done(task, preparation, monitor, stop, fit or partial(_fit, task, folder, wanted))
    finally:
        stop.gentle = False
    folder.write_training(outcome.to_json())
    if stop.asked:
        raise stop.stopped("stopped after the last step")
    return outcome


def _until_done(task: Task, preparation: Preparation | Made, monitor: Monitor, stop: Stop, fit: Fit) -> Outcome:
    """One group of workers after the other, until one comes to the end."""
    cluster, failures, first = task.config.cluster, 0, True
    while True:
        # The number is decided here, not by Ray's elastic policy: that one restarts from the checkpoint that
        # is there when it grows, counts nodes that are being taken away, and waits for the reservations of
        # a controller that was killed.
        workers = cluster.most() if first and not cluster.elastic() else _room(task.config, monitor, stop)
        first = False
        ray.get(task.board.stop.remote(None))
        try:
            outcome: Outcome = monitor.follow(_in_thread(partial(fit, workers)))
        except (RayActorError, ray_train.TrainingFailedError) as error:
            failures += counts(error)
            # A group of fixed size has been restarted by Ray already, except for the loss of its controller.
            spent = isinstance(error, ray_train.WorkerGroupError) and not cluster.elastic()
            if spent or 0 <= cluster.max_failures < failures:
                tried = cluster.max_failures if spent else failures - 1
                raise UserError(f"training failed after {tried} restarts: {cause(error)}") from error
            monitor.happened(cause(error))
            if not counts(error):
                monitor.waiting("trying again")
            continue
        with user_errors():
            if preparation.problem is not None or preparation.store.packs is not None:
                preparation.join()  # that too many rows are unusable may turn out at the last of them
        if outcome.problem:
            raise UserError(outcome.problem)
        if not outcome.interrupted:
            return outcome
        assert outcome.state is not None
        if stop.asked:
            raise stop.stopped(f"stopped after step {outcome.state.step} of {monitor.progress.total or '?'}")
        monitor.happened(outcome.interrupted)


def _room(config: Config, monitor: Monitor, stop: Stop) -> int:
    """How many workers to start now: as many as fit, once the fewest do; waits for that."""
    fewest, most = config.cluster.fewest(), config.cluster.most()
    free, since, told = -1, time.monotonic(), False
    with Demand(monitor.wanted, fewest, after=3 * SETTLE) as demand:
        while True:
            if (now := min(free_workers(monitor.wanted), most)) != free:
                free, since = now, time.monotonic()
            if free == most or (free >= fewest and time.monotonic() - since >= SETTLE):
                return free
            if demand.look() and not told:
                told = True
                monitor.waiting(f"waiting for room for {fewest} workers: there is room for {free}")
            if stop.asked:
                raise stop.stopped("stopped while waiting for the cluster")
            time.sleep(0.5)


def _fit(task: Task, folder: RunFolder, wanted: Mapping[str, float], workers: int) -> Outcome:
    from ray.train.torch import TorchTrainer

    # With a number of workers of its own each time, every failure comes back to `_until_done`.
    cluster = task.config.cluster
    limits = {"max_failures": cluster.max_failures}
    if cluster.elastic():
        limits = {"max_failures": 0, "max_preemption_failures": 0, "controller_failure_limit": 0}
    trainer = TorchTrainer(
        cast("Any", train_worker),  # Ray's types forget that a loop may return
        train_loop_config={"task": task, "checkpoints": folder.checkpoints},
        scaling_config=ray_train.ScalingConfig(
            num_workers=workers, use_gpu="GPU" in wanted, resources_per_worker=dict(wanted)
        ),
        run_config=ray_train.RunConfig(
            name="checkpoints",
            storage_path=folder.root,
            failure_config=ray_train.FailureConfig(**limits),
            callbacks=[TellDriver(task.board)],
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
        ),
    )
    outcome = getattr(trainer.fit(), "return_value", None)
    if not isinstance(outcome, Outcome):
        raise RuntimeError(f"training returned {outcome!r}")
    return outcome


def _in_thread(work: Callable[[], Outcome]) -> "Future[Outcome]":
    """Run `work` in a thread that does not keep the process alive; the main thread stays free for signals."""
    future: Future[Outcome] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="train", daemon=True).start()
    return future


def make_board() -> Any:
    """The board on this node, for progress and metrics."""
    return channel.make(ray.get_runtime_context().get_node_id())


def run_export(task: Task, folder: RunFolder, outcome: Outcome, say: Say) -> dict[str, Any]:
    """Write both exports and measure their parity, in a Ray task with a worker's resources.

    Returns the content of parity.json, that of an earlier attempt if it is there; raises UserError if
    the exports disagree.
    """
    assert outcome.state is not None
    step = outcome.state.step
    if (parity := folder.exported(step)) is not None:
        return parity
    wanted = worker_resources(task.config)
    say("exporting adapter and merged model, and comparing them")
    with user_errors():
        job = ray.remote(_export).options(
            num_cpus=_export_cpus(task.config, wanted),
            num_gpus=wanted.get("GPU", 0),
            max_retries=3,
            retry_exceptions=[OSError],
        )
        measured: dict[str, Any] = ray.get(job.remote(task, folder, step))
    return measured


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Raise the UserError that a Ray task raised as itself, not wrapped."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


def _export_cpus(config: Config, wanted: dict[str, float]) -> float:
    """On GPU nodes one worker's CPUs; else those of all workers, as far as one node has them."""
    if "GPU" in wanted:
        return wanted["CPU"]
    largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    return float(min(wanted["CPU"] * config.cluster.most(), largest))


def _export(task: Task, folder: RunFolder, step: int) -> dict[str, Any]:
    quiet_transformers()
    return export_run(task, folder, step)
