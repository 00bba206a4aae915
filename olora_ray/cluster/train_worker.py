"""A Ray Train worker from its entry point to its result: alone, in the group it finds, or in one after the other."""

import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.train as ray_train

from olora_ray.cluster import ray_internals
from olora_ray.cluster.channel import sent_to
from olora_ray.cluster.membership.peers import Peers, through
from olora_ray.cluster.membership.state import Finished, Member
from olora_ray.cluster.preemption import StopRequests
from olora_ray.cluster.resume import starting_point
from olora_ray.cluster.spec import LEFT, TrainResult, TrainSpec
from olora_ray.cluster.worker import Worker
from olora_ray.cluster.worker_context import RayTrainContext, WorkerContext
from olora_ray.common import collectives
from olora_ray.common.errors import TryAgain, UserError
from olora_ray.common.logs import quiet_transformers


@dataclass(frozen=True)
class Entry:
    """Entry of a worker into a training whose workers may change."""

    first_rank: int
    """Number of the first worker that its trainer has started."""
    attempt: int
    """The driver's attempt."""


def train_worker(spec: TrainSpec, checkpoints: str, channel: Any, entry: Entry | None = None) -> TrainResult:
    """Entry point under TorchTrainer; the same on every worker, only the first reports.

    Without an `entry` the workers are, and stay, those of the process group that is there.
    """
    quiet_transformers()
    ray_internals.quiet_train_worker()
    context = RayTrainContext(spec.config)
    if entry is None:
        result = train_at(context, spec, checkpoints, channel)
        if result.problem is not None:  # of this worker alone, perhaps: the others wait for it in an exchange then
            ray.get(channel.finish.remote(result))
        return result
    with Peers(through(channel), _member(entry)) as peers:
        try:
            result = train_at(context, spec, checkpoints, channel, peers)
        except Finished:
            return TrainResult(interrupted=LEFT)
        if result.interrupted != LEFT:
            ray.get(channel.finish.remote(result))
        return result


def _member(entry: Entry) -> Member:
    """This worker of Ray Train."""
    from ray.util import get_node_ip_address

    context = ray.get_runtime_context()
    rank = entry.first_rank + ray_train.get_context().get_world_rank()
    place = collectives.meeting_place(get_node_ip_address())
    name, node = context.get_actor_id() or "", context.get_node_id()
    return Member(name, rank, place, node, process=os.getpid(), attempt=entry.attempt)


def train_at(
    context: WorkerContext, spec: TrainSpec, checkpoints: str, channel: Any, peers: Peers | None = None
) -> TrainResult:
    """Train a spec; what the user has to mend is in the result.

    With `peers` the workers form the groups of a membership; without, they are those of the process group here.
    """
    late = peers is not None and peers.running()
    try:
        with sent_to(channel, peers.leads if peers else lambda: context.rank == 0):
            if peers and not late and not peers.next_group().begins:
                raise RuntimeError("the training has begun meanwhile")  # Ray starts this worker again
            requests = StopRequests(channel, context, peers)
            start = starting_point(context, spec, checkpoints, requests.waiting)
            return Worker(context, spec, checkpoints, channel, start, requests, peers, late).run()
    except UserError as error:
        if peers and peers.group is None:
            raise RuntimeError(str(error)) from error  # it came late and alone: the others train on
        # Returned, not raised: a retry would meet the same problem.
        return TrainResult(problem=str(error), passes=isinstance(error, TryAgain))
