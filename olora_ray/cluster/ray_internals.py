"""Ray's private parts: with train_internals.py and tune_internals.py the only file that uses names which Ray may change
without notice.

Each function says why no public way would do and names the version whose source it was read from. After an upgrade
of Ray, tests/cluster/test_ray_internals.py shows what no longer holds.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

HEAD = "node:__internal_head__"
"""A resource that Ray 2.60 gives to the head only; no other field of ray.nodes() tells which node that is."""


def started_address() -> str | None:
    """Address of the Ray that `ray start` has started on this machine, or joined; None if there is none.

    Ray 2.60, scripts/scripts.py and _private/utils.py: `ray start` writes it into a file of the folder for temporary
    files, `ray stop` removes that; ray.init never writes it. `ray.init("auto")` takes any Ray among the processes, also
    one that another program has started for itself. A head with a --temp-dir of its own has its file there.
    """
    from ray._private.utils import read_ray_address

    return read_ray_address() or None


def version_at(address: str, token: str | None, timeout: float) -> str:
    """Version of the Ray whose head answers at `address` within `timeout` seconds.

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

    Ray 2.60, _private/authentication/authentication_token_setup.py: RAY_AUTH_MODE alone is read when Ray is imported.
    """
    from ray import _raylet

    os.environ["RAY_AUTH_MODE"] = mode
    vars(_raylet)["Config"].initialize("")


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Node id -> what is free there.

    Ray 2.60, _private/state.py. `ray.available_resources()` only has the sum over all nodes.
    """
    free: Mapping[str, Mapping[str, float]] = ray._private.state.state.available_resources_per_node()
    return free


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away.

    Ray 2.60, _private/state.py. In `ray.nodes()` they are alive until the end.
    """
    return set(ray._private.state.state.get_draining_nodes())


def autoscaler_groups() -> list[tuple[dict[str, float], int]] | None:
    """Resources and largest number of each kind of node that the autoscaler may start; below 0: no limit.

    None if it has not told the control store. Ray 2.60, _private/state.py; nothing public has these limits.
    """
    told = ray._private.state.state.get_cluster_config()
    return None if told is None else [(dict(each.resources), each.max_count) for each in told.node_group_configs]


def joined_running_node() -> bool:
    """Whether this process is a driver that has joined a Ray which was running before.

    False in Ray's own processes, and in one that has started a Ray for itself. Ray 2.60, _private/worker.py; the
    runtime context knows the node, but not who started it.
    """
    node: Any = ray._private.worker._global_node
    return node is not None and not node.is_head()


def job_variables() -> Mapping[str, str]:
    """The environment variables that this job was submitted with; none in a process that is no job.

    Ray 2.60, _private/worker.py: given one of these, ray.init ends in a traceback, whatever its value is, and shows all
    of them in it. The runtime context tells them only after ray.init.
    """
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    told = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    found: Mapping[str, str] = (told.get("runtime_env") or {}).get("env_vars") or {}
    return found


def startup_failed(error: Exception) -> bool:
    """Whether this error of Train's controller says that a group of workers could not start.

    Ray 2.60, train/v2/_internal/exceptions.py: inside the public ControllerError only the class tells.
    """
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

    return isinstance(error, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError)


def preemption_noted() -> bool:
    """Whether Train's watcher has left word in this worker that a node will be taken away. A local read.

    Ray 2.60, train/v2/_internal/execution. The public `ray.train.get_preemption_info()` is a barrier of all workers
    over an actor: too expensive to be called every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    context = getattr(get_train_context(), "preemption_context", None)
    return getattr(context, "preemption_info", None) is not None


def actor_died(actor_id: str) -> bool:
    """Whether the actor with this id (hex) is certainly dead. Asks the control store: about a millisecond.

    Ray 2.60, _private/state.py. ray.util.state asks the dashboard, which a user may have turned off.
    """
    found: Any = ray._private.state.state.actor_table(actor_id)
    return bool(found) and found["State"] == "DEAD"


def end_train_controllers() -> None:
    """Kill the controllers of all trainers that this process has started, with their workers.

    Ray 2.60, train/v2/api/data_parallel_trainer.py: `fit` keeps the actor to itself, and has no end of its own while a
    worker waits for room.
    """
    from ray._raylet import ActorID
    from ray.core.generated import gcs_pb2

    table: Any = vars(gcs_pb2)["ActorTableData"]
    worker: Any = ray._private.worker.global_worker
    here = ray.get_runtime_context().get_worker_id()
    stored = ray._private.state.state._connect_and_get_accessor().get_actor_table(None, "ALIVE")
    for actor in map(table.FromString, stored):
        if actor.class_name == "TrainController" and actor.owner_address.worker_id.hex() == here:
            worker.core_worker.kill_actor(ActorID(actor.actor_id), True)


def reads_data() -> bool:
    """Whether a thread of this process is at work for Ray Data.

    Ray 2.60: its threads have several names, but all of them run code of its package.
    """
    package = os.path.join(os.path.dirname(ray.__file__), "data", "")
    return any(
        package in frame.f_code.co_filename
        for current in sys._current_frames().values()
        for frame, _ in traceback.walk_stack(current)
    )


def meeting_place() -> tuple[str, int]:
    """Address and a free port of this worker's node, at which the workers of a group meet.

    Ray 2.60, train/_internal/utils.py, as Ray's own backend for torch asks for it.
    """
    from ray.train._internal.utils import get_address_and_port

    address, port = get_address_and_port()
    return str(address), int(port)


def join_process_group(backend: str, rank: int, world: int, place: tuple[str, int]) -> None:
    """Join torch's process group in this worker, and set what torchrun would in its environment; all must call it.

    Ray 2.60, train/torch/config.py: what _TorchBackend.on_start asks of the workers. The public way there is
    TorchConfig, with which the controller imports torch too, before it starts them.
    """
    from ray.train.torch import config

    address, port = place
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(
        backend=backend, world_rank=rank, world_size=world, init_method="env://", timeout_s=config.TorchConfig.timeout_s
    )


def leave_process_group(several: bool) -> None:
    """Leave it, where several workers have joined. Ray 2.60, train/torch/config.py: _TorchBackend.on_shutdown."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=several)


def train_worker_logger() -> logging.Logger:
    """The logger of a Train worker's reports.

    Ray 2.60, train/v2/_internal/execution/context.py. It is named after the path of that file, so that the level
    of "ray.train" does not reach it.
    """
    from ray.train.v2._internal.execution import context

    logger: logging.Logger = context.logger
    return logger


def token_logger() -> logging.Logger:
    """The logger that says at each start of a local Ray that it has made itself a token.

    Ray 2.60, _private/authentication/authentication_token_setup.py.
    """
    return logging.getLogger("ray._private.authentication.authentication_token_setup")


def begin_autoscaling_coordinator() -> None:
    """Have the actor started that Train's controller waits for before it asks for room for workers.

    Ray 2.60, data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py: the controller makes it on its own
    node, the driver's, if it is not there. By then it has started, beside other work.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

    default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()


def system_memory() -> int:
    """Bytes of this machine, or the limit of its container.

    Ray 2.60, _common/utils.py. Public values are those of a node that has started, less Ray's own share.
    """
    from ray._common.utils import get_system_memory

    return int(get_system_memory())


def gpu_memory() -> list[int]:
    """Bytes of each GPU of this machine that tells; empty without one.

    Those that share the memory of the machine do not tell (GB10), nor do some of which a part alone is seen (MIG).
    Ray 2.60, _private/thirdparty/pynvml: torch would take memory on each GPU to say the same.
    """
    return _of_each_gpu(lambda pynvml, handle: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))


def gpu_generations() -> list[tuple[int, int]]:
    """Compute capability of each GPU of this machine; as `gpu_memory`."""
    return _of_each_gpu(lambda pynvml, handle: tuple(map(int, pynvml.nvmlDeviceGetCudaComputeCapability(handle))))


def _of_each_gpu(told: Callable[[Any, Any], Any]) -> list[Any]:
    from ray._private.thirdparty import pynvml

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


def abandoned_placement_groups() -> "list[PlacementGroup]":
    """This job's placement groups whose creating actor is dead.

    Ray 2.60, core/generated/gcs_pb2 and _private/state.py. The public table of placement groups does not say who
    made a group, nor whether that actor still lives.
    """
    from ray._raylet import PlacementGroupID
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup

    table: Any = vars(gcs_pb2)["PlacementGroupTableData"]
    job = ray.get_runtime_context().get_job_id()
    stored = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    groups = [group for raw in stored if (group := table.FromString(raw)).creator_job_id.hex() == job]
    return [
        PlacementGroup(PlacementGroupID(group.placement_group_id))
        for group in groups
        if _maker_died(group) and group.state != table.REMOVED
    ]


def _maker_died(group: Any) -> bool:
    from ray._raylet import ActorID

    # What the driver itself has made, as Tune does for its trials, has no creating actor.
    return bool(not ActorID(group.creator_actor_id).is_nil() and group.creator_actor_dead)
