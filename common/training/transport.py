"""Messages between a training and its workers, by gRPC: one call, bytes in and bytes out, and a shared secret.

The secret is sent as it is: over a network that others can read, tunnel the port (ssh -L, WireGuard).
"""

import hmac
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.errors import UserError, install_extra

SECRET = "TWINTUNE_SECRET"  # noqa: S105  # the variable's name
_LEAST = 16  # characters
_SERVICE, _METHOD, _HEADER = "twintune.Worker", "Ask", "x-twintune-secret"
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
_AGAIN = [("grpc.initial_reconnect_backoff_ms", 500), ("grpc.max_reconnect_backoff_ms", 2_000)]


def secret() -> str:
    """Raises UserError where there is none, or one that can be guessed."""
    found = os.environ.get(SECRET, "")
    if len(found) < _LEAST or not (found.isascii() and found.isprintable()):
        raise UserError(
            f"{SECRET} is not set, or has fewer than {_LEAST} characters.",
            f"Give both sides the same: export {SECRET}=$(openssl rand -hex 16)",
        )
    return found


def grpc() -> Any:
    """Raises UserError where it is not installed."""
    try:
        import grpc
    except ImportError:
        raise UserError("grpcio is not installed.", install_extra("workers")) from None
    return grpc


def serve(answer: Callable[[bytes], bytes], address: str, shared: str) -> tuple[Any, int]:
    """`(the server, which has started; its port)`. One call is answered after another."""
    rpc = grpc()

    def ask(data: bytes, call: Any) -> bytes:
        given = dict(call.invocation_metadata()).get(_HEADER, "")
        if not hmac.compare_digest(given.encode(), shared.encode()):
            call.abort(rpc.StatusCode.UNAUTHENTICATED, "another secret")
        return answer(data)

    alone = ("grpc.so_reuseport", 0)  # or two workers would share a port
    server = rpc.server(ThreadPoolExecutor(1), options=[*_OPTIONS, alone])
    handlers = {_METHOD: rpc.unary_unary_rpc_method_handler(ask)}
    server.add_generic_rpc_handlers((rpc.method_handlers_generic_handler(_SERVICE, handlers),))
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise UserError(f"{address} is not free.", "Give another --port.") from None
    server.start()
    return server, port


class Line:
    """To one worker. It connects by itself, and again where the worker was away."""

    def __init__(self, address: str, shared: str) -> None:
        self._rpc, self.address = grpc(), address
        self._channel = self._rpc.insecure_channel(address, options=[*_OPTIONS, *_AGAIN])
        self._ask = self._channel.unary_unary(f"/{_SERVICE}/{_METHOD}")
        self._metadata = ((_HEADER, shared),)

    def ask(self, data: bytes, seconds: float) -> Any:
        """A future of the answer's bytes; it fails where the worker is away, or takes longer."""
        return self._ask.future(data, timeout=seconds, metadata=self._metadata)

    def fault(self, future: Any) -> str:
        """Why it failed, in a word or two; empty where it did not."""
        error = future.exception()
        if error is None:
            return ""
        code = error.code() if hasattr(error, "code") else None
        known = {
            self._rpc.StatusCode.UNAUTHENTICATED: f"it has another {SECRET}",
            self._rpc.StatusCode.UNAVAILABLE: "it cannot be reached",
            self._rpc.StatusCode.DEADLINE_EXCEEDED: "it took too long",
        }
        return known.get(code, str(getattr(code, "name", error)).lower())

    def close(self) -> None:
        self._channel.close()
