"""Ports of this machine."""

import socket


def free_port():
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
