"""Calls of Ray's private functions and modules, whose names may change without notice.

Each use is marked with the version of Ray whose source was read, and each function says why public functions are not
enough. After an upgrade of Ray, tests/cluster/test_ray_internals.py shows what has changed.
"""

import contextlib
import copy
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray

from olora_ray.common import storage

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

HEAD = "node:__internal_head__"
"""A resource that only the head has in Ray 2.60. No other field of ray.nodes() identifies the head."""


# Joining a Ray.


def started_address() -> str | None:
    """Return the address of the Ray that `ray start` has started or joined on this machine; None without one.

    `ray.init("auto")` is no replacement: it joins any Ray of this machine, even one that another program has started
    for itself. `ray start` writes the address into a file in Ray's temporary folder, and `ray stop` removes the file.
    A head with another --temp-dir is not found.
    """
    from ray._private.utils import read_ray_address  # Ray 2.60

    return read_ray_address() or None


def joined_running_node() -> bool:
    """True if this process is a driver that has joined a running Ray; False if it has started its own Ray.

    Also False in Ray's own processes. Ray 2.60, _private/worker.py. The public runtime context knows the node, but not
    who started it.
    """
    node: Any = ray._private.worker._global_node
    return node is not None and not node.is_head()


def version_at(address: str, token: str | None, timeout: float) -> str:
    """Return the version of the Ray whose head answers at `address` within `timeout` seconds.

    Raises PermissionError if the head rejects `token`, or requires one, and ConnectionError if no Ray head answers.
    Ray 2.60, core/generated: the call of Ray's own health checks. The public ray.init tries for a minute, with a log
    line per second, and ends in a traceback.
    """
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        head: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            reply = head.CheckAlive(
                messages.CheckAliveRequest(), timeout=timeout, metadata=metadata
            )
        except grpc.RpcError as error:
            call: Any = error
            if call.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise PermissionError(call.details()) from None
            raise ConnectionError(f"{call.code().name.lower()}: {call.details()}") from None
    return str(reply.ray_version)


def set_auth_mode(mode: str) -> None:
    """Set whether this process uses tokens (`token`) or none (`disabled`). Call it before ray.init.

    The environment variable RAY_AUTH_MODE alone would not be enough: Ray reads it at its import.
    """
    from ray import _raylet  # Ray 2.60, _private/authentication/authentication_token_setup.py

    os.environ["RAY_AUTH_MODE"] = mode
    vars(_raylet)["Config"].initialize("")


@contextlib.contextmanager
def agents_at_free_ports() -> Iterator[None]:
    """Let a Ray that the block starts give its agents ports that are free now.

    Ray 2.60, _private/node.py: the dashboard's agent would take port 52365, and a later `ray start --head` on this
    machine would have no agent for `ray job submit`. With a port of the agents' choice, the node would wait until each
    has written its file, and abort after a fixed 15 s, which is too short on a busy machine (ray-project/ray#65983).
    `ray.init` has no argument for them.
    """
    from ray import _raylet
    from ray._private import node

    listen = "dashboard_agent_listen_port"
    ports = {}
    with contextlib.ExitStack() as reserved:
        for name in (listen, "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port"):
            server = reserved.enter_context(socket.create_server(("", 0)))
            ports[name] = server.getsockname()[1]
    whole: Any = node.Node.start_head_processes

    def start(self: Any) -> None:
        self._ray_params.update(**ports)
        raylet: Any = _raylet
        file = raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME
        raylet.persist_port(self.get_session_dir_path(), self.node_id, file, ports[listen])
        whole(self)

    node.Node.start_head_processes = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        node.Node.start_head_processes = whole  # type: ignore[method-assign]


def beside_job(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that this Ray job was not submitted with; all of them outside a job.

    If ray.init gets a variable that the job already has, it ends in a traceback that shows the values of all of them.
    The public runtime context knows the job's variables only after ray.init.
    """
    # Ray 2.60, _private/runtime_env/constants.py
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    of_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in variables.items() if name not in of_job}


def quiet_ray() -> None:
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray 2.60 warns at each start of a local Ray that tokens are on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
        logging.ERROR
    )


# The state of the cluster.


def _state() -> Any:
    """Return the client of Ray's control store. Public functions sum over nodes, or need the dashboard to run."""
    from ray._private.state import state  # Ray 2.60

    return state


def free_resources() -> Mapping[str, Mapping[str, float]]:
    free: Mapping[str, Mapping[str, float]] = _state().available_resources_per_node()
    return free


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that will be taken away. In the public `ray.nodes()` they are alive until the end."""
    return set(_state().get_draining_nodes())


def autoscaler_groups() -> list[tuple[dict[str, float], int]] | None:
    """Return the resources and the largest number of each type of node of the autoscaler; a number below 0: no limit.

    None if the autoscaler has not published its limits in the control store.
    """
    limits = _state().get_cluster_config()
    if limits is None:
        return None
    return [(dict(each.resources), each.max_count) for each in limits.node_group_configs]


def end_train_controllers() -> None:
    """Kill the controllers of all trainers that this process has started, with their workers.

    Ray 2.60, train/v2/api/data_parallel_trainer.py: `fit` does not publish the controller, and does not end while a
    worker waits for room.
    """
    from ray._private.worker import global_worker  # Ray 2.60; ray.kill wants a handle
    from ray.core.generated import gcs_pb2

    table: Any = vars(gcs_pb2)["ActorTableData"]
    worker: Any = global_worker
    here = ray.get_runtime_context().get_worker_id()
    for actor in map(
        table.FromString, _state()._connect_and_get_accessor().get_actor_table(None, "ALIVE")
    ):
        if actor.class_name == "TrainController" and actor.owner_address.worker_id.hex() == here:
            worker.core_worker.kill_actor(ray.ActorID(actor.actor_id), True)


def abandoned_placement_groups() -> "list[PlacementGroup]":
    """Return this job's placement groups whose creating actor is dead.

    The public table of placement groups has neither the creating actor nor its state.
    """
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup

    table: Any = vars(gcs_pb2)["PlacementGroupTableData"]
    job = ray.get_runtime_context().get_job_id()
    abandoned = []
    for raw in _state()._connect_and_get_accessor().get_placement_group_table():
        group = table.FromString(raw)
        # Placement groups that the driver itself has created, such as Tune's for its trials, have no creating actor.
        if group.creator_job_id.hex() != job or ray.ActorID(group.creator_actor_id).is_nil():
            continue
        if group.creator_actor_dead and group.state != table.REMOVED:
            abandoned.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return abandoned


# Ray Train.


def without_helpers(trainer: Any) -> Any:
    """Let the trainer's controller start no processes but the workers, and return the trainer.

    Ray 2.60 starts one process for datasets, and one that frees a dead controller's placement groups. Both import much,
    which slows the start of the workers on a machine with few CPUs. A run has no Ray dataset, and the driver itself
    frees abandoned placement groups (resources.py). No public setting turns them off.
    """
    callbacks = trainer._create_default_callbacks
    names = ("DatasetsCallback", "PlacementGroupCleanerCallback")
    trainer._create_default_callbacks = lambda: [
        each for each in callbacks() if type(each).__name__ not in names
    ]
    return trainer


def startup_failed(error: Exception) -> bool:
    """True if the error of Ray Train's controller means that a group of workers could not start.

    The public ControllerError contains the error, but only the private class of the error shows its meaning.
    """
    from ray.train.v2._internal import exceptions  # Ray 2.60

    return isinstance(
        error, exceptions.WorkerGroupStartupFailedError | exceptions.WorkerGroupStartupTimeoutError
    )


def quiet_train_worker() -> None:
    """Turn off Ray Train's log line for each report of this worker.

    The logger is named after the path of its file, so the level of the logger "ray.train" does not apply to it.
    """
    from ray.train.v2._internal.execution import context  # Ray 2.60

    train_context: Any = context
    train_context.logger.setLevel(logging.WARNING)


def report(metrics: Mapping[str, float], checkpoint: str) -> None:
    """Call `ray.train.report` with a checkpoint that is already in the run folder; `checkpoint` is its path there.

    Ray 2.60: the storage context, which knows the folder and its file system, "may change without notice".
    """
    from ray import train as public

    train: Any = public  # Ray's stubs describe Train V1
    place = train.get_context().get_storage()
    kept = train.Checkpoint(f"{place.experiment_fs_path}/{checkpoint}", place.storage_filesystem)
    train.report(
        dict(metrics), checkpoint=kept, checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD
    )


def forget_report(folder: str) -> None:
    """Remove what an earlier training has reported from the run folder.

    Ray 2.60, train/v2/_internal/execution/checkpoint/checkpoint_manager.py: a trainer does not start if the reported
    checkpoint was removed, or another version of Ray has written the report.
    """
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    storage.remove(storage.join(folder, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))


def begin_autoscaling_coordinator() -> None:
    """Start the actor that Ray Train's controller needs before it requests room for workers.

    The controller would start it and wait for it. Started here, it comes up while the driver does other work.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator  # Ray 2.60

    default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()


# This machine.


def system_memory() -> int:
    """Return the bytes of memory of this machine, or the limit of its container.

    The public values describe a started node, after Ray has subtracted its own share.
    """
    from ray._common.utils import get_system_memory  # Ray 2.60

    return int(get_system_memory())


def gpu_memory() -> int | None:
    """Return the bytes of the smallest GPU of this machine; None without one, or if one does not tell its own.

    GPUs that share the memory of the machine (GB10) do not tell it, and a divided GPU (MIG) tells that of all parts.
    """
    sizes = _of_each_gpu(_undivided)
    if len(sizes) < len(gpu_generations()):
        return None
    return min(sizes, default=None)


def _undivided(pynvml: Any, handle: Any) -> int:
    divided = 0
    with contextlib.suppress(pynvml.NVMLError):  # an older GPU has no such mode
        divided, _ = pynvml.nvmlDeviceGetMigMode(handle)
    if divided:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)


def gpus_in_use() -> list[tuple[int, list[int]]]:
    """Return the free bytes of each GPU of this machine, and the ids of the processes that compute there."""
    return _of_each_gpu(
        lambda pynvml, handle: (
            int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            [int(process.pid) for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)],
        )
    )


def gpu_generations() -> list[tuple[int, int]]:
    return _of_each_gpu(
        lambda pynvml, handle: tuple(map(int, pynvml.nvmlDeviceGetCudaComputeCapability(handle)))
    )


def gpu_names() -> list[str]:
    return _of_each_gpu(lambda pynvml, handle: str(pynvml.nvmlDeviceGetName(handle)))


def driver_cuda() -> int | None:
    """Return the newest major version of CUDA that NVIDIA's driver runs; None without a GPU."""
    of_gpus = _of_each_gpu(lambda pynvml, _: pynvml.nvmlSystemGetCudaDriverVersion() // 1000)
    return min(of_gpus, default=None)


def _of_each_gpu(query: Callable[[Any, Any], Any]) -> list[Any]:
    from ray._private.thirdparty import pynvml  # Ray 2.60

    answers: list[Any] = []
    try:
        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(number)
            for number in range(pynvml.nvmlDeviceGetCount())
        ]
    except pynvml.NVMLError:
        return []
    for handle in handles:
        with contextlib.suppress(pynvml.NVMLError):
            answers.append(query(pynvml, handle))
    return answers


# Ray Tune.


def keep_credentials() -> None:
    """Stop Tune from copying this process's AWS keys to the trials, which use their node's environment.

    Ray 2.60, tune/execution/class_cache.py: Tune copies the keys into the description of each trial's process. Ray
    shows that description to every client, and writes it unmasked into the log of each node.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def update_restored(tuner: Any, folder: str, most: int, scheduler: Any) -> None:
    """Set a restored Tuner's number of trials at a time to `most`, and its folder and scheduler to the current ones.

    Ray 2.60, tune/impl/tuner_internal.py and tune/search: tuner.pkl and the saved states of the searchers have the
    number of trials and the folder of the first attempt. Tune moves only the existing trials to the current folder, so
    `_placed` moves those that the searcher creates. The scheduler of tuner.pkl has the old folder, too. Tune saves
    nothing that a scheduler has learned, so a new one replaces it without loss.
    """
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
    from ray.tune.search.search_generator import SearchGenerator

    settings = tuner._local_tuner._tune_config
    if settings.search_alg is None:
        settings.search_alg = _placed(_limited(BasicVariantGenerator, most), folder)(
            max_concurrent=most
        )
    else:
        limited = _limited(ConcurrencyLimiter, most)(settings.search_alg, max_concurrent=most)
        settings.search_alg = _placed(SearchGenerator, folder)(limited)
    settings.max_concurrent_trials = None  # the searcher has the limit
    settings.scheduler = scheduler


def _limited(searcher: Any, most: int) -> Any:
    """Return a subclass of the searcher's class that keeps the limit `most` when its state is restored."""
    # Tune finds the saved state by the name of the class, so the subclass has the same name.

    def set_state(self: Any, state: Mapping[str, Any]) -> None:
        searcher.set_state(self, {**state, "max_concurrent": most})

    return type(searcher.__name__, (searcher,), {"set_state": set_state})


def _placed(searcher: Any, folder: str) -> Any:
    """Return a subclass of the searcher's class whose new trials write below `folder`, a path or URI."""
    from ray.train._internal.storage import get_fs_and_path  # Ray 2.60

    def next_trial(self: Any) -> Any:
        trial = searcher.next_trial(self)
        if trial is not None:
            trial_storage = copy.copy(trial.storage)
            trial_storage.storage_filesystem, trial_storage.storage_fs_path = get_fs_and_path(
                folder
            )
            trial.set_storage(trial_storage)
        return trial

    return type(searcher.__name__, (searcher,), {"next_trial": next_trial})
