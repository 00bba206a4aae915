"""What answers a Ray head's health check, with Ray's own messages: the address is asked in moments, without a Ray."""

import contextlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc


@contextlib.contextmanager
def head(version: str = ray.__version__, token: str | None = None) -> Iterator[int]:
    """The port of one that runs `version` and asks for `token`."""

    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def CheckAlive(self, request: object, context: Any) -> Any:  # Ray's name
            given = dict(context.invocation_metadata()).get("authorization")
            if token is not None and given != f"Bearer {token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return vars(gcs_service_pb2)["CheckAliveReply"](ray_version=version)

    server = grpc.server(futures.ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)
