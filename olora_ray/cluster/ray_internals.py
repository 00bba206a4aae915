"""Ray's private parts: the only file that uses names which Ray may change without notice.

Each use is marked with the version whose source it was read from, and each function says why no public way would do.
After an upgrade of Ray, tests/cluster/test_ray_internals.py shows what no longer holds.
"""

import contextlib
import copy
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

HEAD = "node:__internal_head__"
"""A resource that Ray 2.60 gives to the head only; no other field of ray.nodes() tells which node that is."""


# Joining a Ray.


def started_address() -> str | None:
    """Return the address of the Ray that `ray start` has started on this machine, or joined; None without one.

    `ray start` writes it into a file of the folder for temporary files, `ray stop` removes that; ray.init never writes
    it. `ray.init("auto")` takes any Ray among the processes, also one that another program has started for itself. A
    head with a --temp-dir of its own has its file there.
    """
    from ray._private.utils import read_ray_address  # Ray 2.60

    return read_ray_address() or None


def joined_running_node() -> bool:
    """True if this process is a driver that has joined a Ray which was running before.

    False in Ray's own processes, and in one that has started a Ray for itself. Ray 2.60, _private/worker.py; the
    runtime context knows the node, but not who started it.
    """
    node: Any = ray._private.worker._global_node
    return node is not None and not node.is_head()


def version_at(address: str, token: str | None, timeout: float) -> str:
    """Return the version of the Ray whose head answers at `address` within `timeout` seconds.

    Raises PermissionError if it asks for another token, or for one at all, and ConnectionError if what answers is no
    Ray head. Ray 2.60, core/generated: the call that Ray's own health checks make. ray.init tries for a minute, a line
    a second, and ends in a traceback.
    """
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        head: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            reply = head.CheckAlive(messages.CheckAliveRequest(), timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            call: Any = error
            if call.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise PermissionError(call.details()) from None
            raise ConnectionError(f"{call.code().name.lower()}: {call.details()}") from None
    return str(reply.ray_version)


def set_auth_mode(mode: str) -> None:
    """Let this process use tokens (`token`) or none (`disabled`), whatever it did before; before ray.init.

    RAY_AUTH_MODE alone is read when Ray is imported.
    """
    from ray import _raylet  # Ray 2.60, _private/authentication/authentication_token_setup.py

    os.environ["RAY_AUTH_MODE"] = mode
    vars(_raylet)["Config"].initialize("")


def beside_job(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that this job was not submitted with; all in a process that is no job.

    Given one that the job has, ray.init ends in a traceback, whatever its value is, and shows all of them in it. The
    runtime context tells them only after ray.init.
    """
    # Ray 2.60, _private/runtime_env/constants.py
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    of_job = (told.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in variables.items() if name not in of_job}


def quiet_ray() -> None:
    """Let Ray's libraries log warnings and errors only, in this process."""
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray 2.60. It warns at each start of a local Ray that tokens are on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


# The state of the cluster.


def _state() -> Any:
    """Return the client of Ray's control store: public functions sum over nodes, or ask a dashboard that may be off."""
    from ray._private.state import state  # Ray 2.60

    return state


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Return node id -> what is free there."""
    free: Mapping[str, Mapping[str, float]] = _state().available_resources_per_node()
    return free


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are about to be taken away. In `ray.nodes()` they are alive until the end."""
    return set(_state().get_draining_nodes())


def autoscaler_groups() -> list[tuple[dict[str, float], int]] | None:
    """Return resources and largest number of each kind of node that the autoscaler may start; below 0: no limit.

    None if it has not told the control store.
    """
    told = _state().get_cluster_config()
    return None if told is None else [(dict(each.resources), each.max_count) for each in told.node_group_configs]


def actor_died(actor_id: str) -> bool:
    """True if the actor with this id (hex) is certainly dead. Takes about a millisecond."""
    found: Any = _state().actor_table(actor_id)
    return bool(found) and found["State"] == "DEAD"


def end_train_controllers() -> None:
    """Kill the controllers of all trainers that this process has started, with their workers.

    Ray 2.60, train/v2/api/data_parallel_trainer.py: `fit` keeps the actor to itself, and has no end of its own while a
    worker waits for room.
    """
    from ray._private.worker import global_worker  # Ray 2.60; ray.kill wants a handle
    from ray.core.generated import gcs_pb2

    table: Any = vars(gcs_pb2)["ActorTableData"]
    worker: Any = global_worker
    here = ray.get_runtime_context().get_worker_id()
    for actor in map(table.FromString, _state()._connect_and_get_accessor().get_actor_table(None, "ALIVE")):
        if actor.class_name == "TrainController" and actor.owner_address.worker_id.hex() == here:
            worker.core_worker.kill_actor(ray.ActorID(actor.actor_id), True)


def abandoned_placement_groups() -> "list[PlacementGroup]":
    """Return this job's placement groups whose creating actor is dead.

    The public table of placement groups does not say who made a group, nor whether that actor still lives.
    """
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup

    table: Any = vars(gcs_pb2)["PlacementGroupTableData"]
    job = ray.get_runtime_context().get_job_id()
    stored = _state()._connect_and_get_accessor().get_placement_group_table()
    groups = [group for raw in stored if (group := table.FromString(raw)).creator_job_id.hex() == job]
    return [
        PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
        for group in groups
        # What the driver itself has made, as Tune does for its trials, has no creating actor.
        if not ray.ActorID(group.creator_actor_id).is_nil() and group.creator_actor_dead
        if group.state != table.REMOVED
    ]


# Ray Train.


def train_parts() -> SimpleNamespace:
    """Return the classes of Train's controller that cluster/membership/places.py builds on.

    Raises ImportError or AttributeError with the name that this Ray does not have.
    """
    # Ray 2.60
    from ray.train.v2._internal import exceptions, util
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback
    from ray.train.v2._internal.execution import callback, controller, worker_group

    group = worker_group.WorkerGroup
    # What a group of ours overrides: with other parameters Ray would call it in another way.
    for method, wanted in {"_create_placement_group": 3, "_create_workers": 8, "_assign_worker_ranks": 4}.items():
        if len(inspect.signature(getattr(group, method)).parameters) != wanted:
            raise AttributeError(f"WorkerGroup.{method} has other parameters")
    return SimpleNamespace(
        WorkerGroup=group,
        Worker=worker_group.Worker,
        PlacementGroupHandle=worker_group.PlacementGroupHandle,
        ControllerCallback=callback.ControllerCallback,
        TrainController=controller.TrainController,
        WorkerGroupStartupFailedError=exceptions.WorkerGroupStartupFailedError,
        bundle_to_remote_args=util.bundle_to_remote_args,
        unwanted_callbacks=(datasets.DatasetsCallback, placement_group_callback.PlacementGroupCleanerCallback),
    )


def replaces_one_by_one() -> str | None:
    """Return why this Ray cannot replace one worker while the others train on; None if it can."""
    from ray.train.backend import Backend

    try:
        train_parts()
    except (ImportError, AttributeError) as error:
        return str(error)
    return None if hasattr(Backend, "has_replica_groups") else "Backend.has_replica_groups is not there"


def startup_failed(error: Exception) -> bool:
    """True if this error of Train's controller says that a group of workers could not start.

    Inside the public ControllerError only the class tells.
    """
    from ray.train.v2._internal import exceptions  # Ray 2.60

    return isinstance(error, exceptions.WorkerGroupStartupFailedError | exceptions.WorkerGroupStartupTimeoutError)


def _train_context() -> Any:
    from ray.train.v2._internal.execution import context  # Ray 2.60

    return context


def preemption_noted() -> bool:
    """True if Train's watcher has left word in this worker that a node will be taken away. A local read.

    The public `ray.train.get_preemption_info()` is a barrier of all workers over an actor: too expensive to be called
    every step.
    """
    noted = getattr(_train_context().get_train_context(), "preemption_context", None)
    return getattr(noted, "preemption_info", None) is not None


def quiet_train_worker() -> None:
    """Let Train log no line for each report of this worker.

    The logger is named after the path of its file, so that the level of "ray.train" does not reach it.
    """
    _train_context().logger.setLevel(logging.WARNING)


def begin_autoscaling_coordinator() -> None:
    """Have the actor started that Train's controller waits for before it asks for room for workers.

    The controller makes it on its own node, the driver's, if it is not there. By then it has started, beside other
    work.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator  # Ray 2.60

    default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()


# Ray Data.


def reads_data() -> bool:
    """True while a thread of this process is at work for Ray Data.

    Ray 2.60: its threads have several names, but all of them run code of its package.
    """
    package = os.path.join(os.path.dirname(ray.__file__), "data", "")
    return any(
        package in frame.f_code.co_filename
        for current in sys._current_frames().values()
        for frame, _ in traceback.walk_stack(current)
    )


# This machine.


def system_memory() -> int:
    """Return the bytes of this machine, or the limit of its container.

    Public values are those of a node that has started, less Ray's own share.
    """
    from ray._common.utils import get_system_memory  # Ray 2.60

    return int(get_system_memory())


def gpu_memory() -> list[int]:
    """Return the bytes of each GPU of this machine that tells; empty without one.

    Those that share the memory of the machine do not tell (GB10), nor do some of which a part alone is seen (MIG).
    torch would take memory on each GPU to say the same.
    """
    return _of_each_gpu(lambda pynvml, handle: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))


def gpu_generations() -> list[tuple[int, int]]:
    """Return the compute capability of each GPU of this machine; as `gpu_memory`."""
    return _of_each_gpu(lambda pynvml, handle: tuple(map(int, pynvml.nvmlDeviceGetCudaComputeCapability(handle))))


def _of_each_gpu(told: Callable[[Any, Any], Any]) -> list[Any]:
    from ray._private.thirdparty import pynvml  # Ray 2.60

    found: list[Any] = []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    for handle in handles:
        with contextlib.suppress(pynvml.NVMLError):
            found.append(told(pynvml, handle))
    return found


# Ray Tune.


def keep_credentials() -> None:
    """Have Tune leave the keys of AWS where they are: in the environment of this process, and of each node.

    Ray 2.60, tune/execution/class_cache.py: Tune copies them from this process into the description of each trial's
    process, which Ray shows to whoever asks it, and writes into the log of each node in clear.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def go_on_with(tuner: Any, folder: str, most: int, scheduler: Any) -> None:
    """Let a restored Tuner run so many trials at the same time, in the folder where the search lies now.

    Ray 2.60, tune/impl/tuner_internal.py and tune/search: tuner.pkl has the number of the first attempt, and so have
    the states from which the searchers restore all that they are. These also say where the search lay then: the trials
    that were made before are told of today's place, and those that are made now were not. So does the scheduler of
    tuner.pkl, which is as new as `scheduler`: Tune keeps nothing of what one has learned.
    """
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
    from ray.tune.search.search_generator import SearchGenerator

    settings = tuner._local_tuner._tune_config
    if settings.search_alg is None:
        settings.search_alg = _placed(_limited(BasicVariantGenerator, most), folder)(max_concurrent=most)
    else:
        limited = _limited(ConcurrencyLimiter, most)(settings.search_alg, max_concurrent=most)
        settings.search_alg = _placed(SearchGenerator, folder)(limited)
    settings.max_concurrent_trials = None  # as the searcher says
    settings.scheduler = scheduler


def _limited(kind: Any, most: int) -> Any:
    """The kind of searcher, which keeps its limit when it is restored; its state is found by the kind's name."""

    def set_state(self: Any, state: Mapping[str, Any]) -> None:
        kind.set_state(self, {**state, "max_concurrent": most})

    return type(kind.__name__, (kind,), {"set_state": set_state})


def _placed(kind: Any, folder: str) -> Any:
    """The kind of searcher, whose trials write below a folder, path or URI."""
    from ray.train._internal.storage import get_fs_and_path  # Ray 2.60

    def next_trial(self: Any) -> Any:
        trial = kind.next_trial(self)
        if trial is not None:
            place = copy.copy(trial.storage)
            place.storage_filesystem, place.storage_fs_path = get_fs_and_path(folder)
            trial.set_storage(place)
        return trial

    return type(kind.__name__, (kind,), {"next_trial": next_trial})
