"""The ports of a group: none for its store on one node, and none that other networks reach."""

import multiprocessing
from multiprocessing.connection import Connection

import psutil
import pytest
import ray

from olora_ray.cluster.train_backend import Store, connect, open_store
from olora_ray.common import collectives


def worker(rank: int, store: Store | bool, pipe: Connection) -> None:
    """Join a group of two; send the store if there is none yet, then the values of all and the own ports."""
    if isinstance(store, bool):
        store = open_store(store)
        pipe.send(store)
    connect("gloo", rank, 2, store)
    told = collectives.gather(f"worker {rank}")
    collectives.wait_for_all(0.01)
    ports = psutil.Process().net_connections("tcp")
    pipe.send((told, [each.laddr.ip for each in ports if each.status == psutil.CONN_LISTEN]))
    pipe.recv()


@pytest.mark.parametrize("one_node", [True, False])
def test_a_group_listens_where_its_own_workers_are(one_node: bool) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = []
    store: Store | bool = one_node
    for rank in range(2):
        here, there = context.Pipe()
        context.Process(target=worker, args=(rank, store, there), daemon=True).start()
        pipes.append(here)
        if rank == 0:
            store = here.recv()
    assert isinstance(store, Store)
    found = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send("end")
    assert [told for told, _ in found] == [["worker 0", "worker 1"]] * 2
    everywhere = {ip for _, ips in found for ip in ips}
    assert everywhere
    if one_node:
        assert everywhere == {"127.0.0.1"}
        assert not store.port
    else:
        assert not everywhere & {"0.0.0.0", "::"}
        assert ray.util.get_node_ip_address() in found[0][1]
