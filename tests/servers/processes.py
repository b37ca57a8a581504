"""What the scripts that start real servers have in common."""

from __future__ import annotations

import os
import socket

HOST = "127.0.0.1"


class ServerMissingError(Exception):
    """The programs of a server are not installed; the message says what to install."""


def free_port(host: str = HOST) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def accepts_connections(port: int, host: str = HOST) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((host, port)) == 0


def dying_with_parent(*command: str) -> list[str]:
    """`command`, made to end with the thread that starts it, so that a killed test run leaves no server behind."""
    return ["setpriv", "--pdeathsig", "KILL", *command]


def required() -> bool:
    """Whether a missing server is a failure rather than a reason to skip, as it is in CI."""
    return os.environ.get("CI_REQUIRE_SERVERS") == "1"
