"""Where the page is served. Free of torch and Gradio, for a command line that answers at once."""

from __future__ import annotations

import ipaddress
import os
import socket


def require_free(host: str, port: int) -> None:
    """Raise a ValueError where no page can be served."""
    if not 1 <= port <= 65535:
        raise ValueError(f"expected a port of 1 to 65535, got {port}")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python adds the address, which is said already
        raise ValueError(
            f"the page cannot be served at {host}:{port} ({reason}): choose another with --port or --host"
        ) from error


def bypass_proxy(host: str) -> None:
    """Gradio asks its own server whether it has started, which no proxy could answer."""
    already = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = ",".join([*filter(None, [already]), "localhost", "127.0.0.1", host])


def is_this_machine(host: str) -> bool:
    """Whether a page served there can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
