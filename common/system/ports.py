"""Where a server of this machine listens."""

import errno
import os
import socket

from common.errors import UserError

_OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises UserError where it is taken, or `host` is not an address of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as test:
            if os.name != "nt":  # a port that was just closed is free; on Windows this would share a taken port
                test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind((host, port))
            return int(test.getsockname()[1])
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of a name that no host can have
        of_host = not isinstance(error, OverflowError) and getattr(error, "errno", None) not in _OF_THE_PORT
        fix = "Give an address of this machine: --host 127.0.0.1" if of_host else "Give another --port."
        raise UserError(f"--port {port} on {host} cannot be used: {error}.", fix) from None


def address_of(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
