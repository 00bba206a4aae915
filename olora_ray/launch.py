"""A run on a Ray cluster: connect, prepare tokens, train, export. Each stage is one function."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import ray
import ray.train
from ray.exceptions import RayError, RayTaskError

from olora_ray import board, tracking
from olora_ray.config import Config
from olora_ray.data import store
from olora_ray.data.tokenize import TokenizerSpec
from olora_ray.deliver import export_run
from olora_ray.errors import UserError
from olora_ray.progress import Progress
from olora_ray.quiet import ENVIRONMENT, quiet_ray, quiet_transformers
from olora_ray.run_folder import RunFolder
from olora_ray.train.feed import total_steps
from olora_ray.worker import Outcome, Task, train_worker

# Ray's stubs describe Train V1; V2, which runs, has more arguments.
ray_train: Any = ray.train
Say = Callable[[str], None]


@contextlib.contextmanager
def connect(config: Config, say: Say) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS or of this machine, or to a new local Ray.

    Raises UserError if the cluster is too small for the workers. On leaving, the connection is closed,
    and a local Ray with it.
    """
    quiet_ray()
    shared: dict[str, Any] = {"logging_level": logging.WARNING, "runtime_env": {"env_vars": ENVIRONMENT}}
    try:
        ray.init(address="auto", **shared)
    except ConnectionError:
        # With its dashboard: Train frees the resources of a stopped run through the State API.
        ray.init(address="local", **shared)
    try:
        resources = ray.cluster_resources()
        say(f"ray: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, {len(ray.nodes())} node(s)")
        _check_size(config, resources)
        yield
    except UserError:
        # A prefetching thread of Ray Data that calls Ray after its shutdown ends this process without a word:
        # the error would be lost.
        time.sleep(1)
        raise
    finally:
        ray.shutdown()


def worker_resources(config: Config) -> dict[str, float]:
    """What one worker takes: CPUs, and GPUs if the config or the cluster says so."""
    gpus = config.cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    wanted = {"CPU": float(config.cluster.cpus_per_worker)}
    return wanted | ({"GPU": float(gpus)} if gpus else {})


def prepare(config: Config, spec: TokenizerSpec, say: Say) -> tuple[store.TokenStore, store.TokenStore | None]:
    """The token stores for training and, if rows are held out, for evaluation."""
    with user_errors():
        train = store.prepare(config, spec, "train", say)
        held_out = config.data.eval or config.data.eval_fraction
        return train, store.prepare(config, spec, "eval", say) if held_out else None


def train(task: Task, folder: RunFolder, tracker: tracking.Tracker, say: Say) -> Outcome:
    """Train under TorchTrainer until done; restarts of workers happen inside.

    Raises UserError with what went wrong in the end.
    """
    from ray.train.torch import TorchTrainer

    config = task.config
    cluster = config.cluster
    wanted = worker_resources(config)
    trainer = TorchTrainer(
        cast("Any", train_worker),  # Ray's types forget that a loop may return
        train_loop_config={"task": task},
        scaling_config=ray_train.ScalingConfig(
            num_workers=cluster.workers, use_gpu="GPU" in wanted, resources_per_worker=wanted
        ),
        run_config=ray_train.RunConfig(
            # Ray's own layout is <storage_path>/<name>/<checkpoint>: this gives <run>/checkpoints/step-...
            name="checkpoints",
            storage_path=folder.root,
            failure_config=ray_train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=config.train.keep),
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
        ),
    )
    with _collecting(task.board, tracker, total_steps(config.train, len(task.train)), config, say):
        try:
            result = trainer.fit()
        except ray_train.TrainingFailedError as error:
            raise UserError(f"training failed after {cluster.max_failures} restarts: {_root(error)}") from error
    outcome = getattr(result, "return_value", None)
    if not isinstance(outcome, Outcome):
        raise RuntimeError(f"training returned {outcome!r}")
    if outcome.problem:
        raise UserError(outcome.problem)
    return outcome


def make_board() -> Any:
    """The board on this node, for progress and metrics."""
    return board.make(ray.get_runtime_context().get_node_id())


def run_export(task: Task, folder: RunFolder, say: Say) -> dict[str, Any]:
    """Write both exports and measure their parity, in a Ray task with a worker's resources.

    Returns the content of parity.json; raises UserError if the exports disagree.
    """
    wanted = worker_resources(task.config)
    say("exporting adapter and merged model, and comparing them")
    with user_errors():
        job = ray.remote(_export).options(
            num_cpus=_export_cpus(task.config, wanted),
            num_gpus=wanted.get("GPU", 0),
            max_retries=2,
        )
        parity: dict[str, Any] = ray.get(job.remote(task, folder))
    return parity


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
    return float(min(wanted["CPU"] * config.cluster.workers, largest))


def _export(task: Task, folder: RunFolder) -> dict[str, Any]:
    quiet_transformers()
    return export_run(task, folder)


def _check_size(config: Config, resources: dict[str, float]) -> None:
    wanted = worker_resources(config)
    for kind, each in wanted.items():
        there = resources.get(kind, 0.0)
        if each * config.cluster.workers > there:
            field = "gpus_per_worker" if kind == "GPU" else "cpus_per_worker"
            raise UserError(
                f"cluster.workers={config.cluster.workers} with {field}={each:g} needs"
                f" {each * config.cluster.workers:g} {kind}s, but the cluster has {there:g}; use fewer workers"
            )


@contextlib.contextmanager
def _collecting(source: Any, tracker: tracking.Tracker, total: int, config: Config, say: Say) -> Iterator[None]:
    """Show and track what the workers put on the board, from a thread, until training has ended."""
    done = threading.Event()
    with Progress(total, config.train.log_every, say) as progress:

        def collect() -> None:
            while True:
                last = done.is_set()
                try:
                    messages = ray.get(source.take.remote(), timeout=30)
                except RayError:
                    messages = []  # progress only; the history is in the checkpoint
                for message in messages:
                    progress.line(message) if isinstance(message, str) else progress.row(message)
                if rows := [message for message in messages if not isinstance(message, str)]:
                    tracker.metrics({int(row["step"]): _without_step(row) for row in rows})
                if last:
                    return
                done.wait(1.0)

        thread = threading.Thread(target=collect, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(60)


def _without_step(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def _root(error: BaseException) -> str:
    """The innermost cause's last line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
