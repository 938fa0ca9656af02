"""What emoji and voting have in common: a gRPC server with Prometheus metrics beside it, until SIGTERM.

Methods are plain functions from request to response. A method fails by raising `RpcFailed`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from prometheus_client import Counter, start_http_server

STARTED = Counter("grpc_server_started", "RPCs begun", ["grpc_service", "grpc_method"])
HANDLED = Counter("grpc_server_handled", "RPCs finished", ["grpc_service", "grpc_method", "grpc_code"])
GRACE_SECONDS = 5


class RpcFailed(Exception):
    """Ends an rpc with a status. `code` is a `grpc.StatusCode`."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


Method = tuple[Callable[[Any], Any], type[Any]]
"""(function, request class)"""


def _handler(service: str, name: str, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
    function, request_class = method

    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        STARTED.labels(service, name).inc()
        try:
            response = function(request)
        except RpcFailed as failed:
            HANDLED.labels(service, name, failed.code.name).inc()
            await context.abort(failed.code, str(failed))
        HANDLED.labels(service, name, "OK").inc()
        return response

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=request_class.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )


async def serve(service: str, methods: Mapping[str, Method], environment: Mapping[str, str]) -> None:
    """Serves `methods` of `service` on GRPC_PORT and metrics on PROM_PORT; returns after SIGTERM or SIGINT."""
    port, prometheus_port = int(environment["GRPC_PORT"]), int(environment["PROM_PORT"])
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    start_http_server(prometheus_port)  # its thread ends with the process
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {name: _handler(service, name, method) for name, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"0.0.0.0:{port}")
    await server.start()
    print(f"{service}: gRPC on {port}, metrics on {prometheus_port}", flush=True)
    await stop.wait()
    await server.stop(GRACE_SECONDS)
