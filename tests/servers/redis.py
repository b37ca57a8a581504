"""A real, throw-away Redis. Needs Debian's redis-server; serves at once."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.processes import HOST, ServerMissingError, accepts_connections, dying_with_parent, free_port


@contextmanager
def running_redis(base: Path, host: str = HOST) -> Iterator[str]:
    """The host:port of a server on `host` that keeps its append-only file below `base`."""
    if shutil.which("redis-server") is None:
        raise ServerMissingError("redis-server not found: apt-get install redis-server")
    base.mkdir(parents=True, exist_ok=True)
    port = free_port(host)
    options = ["--bind", host, "--port", str(port), "--protected-mode", "no", "--dir", str(base)]
    options += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--set-proc-title", "no"]
    with (base / "redis.log").open("ab") as log:
        command = dying_with_parent("redis-server", *options)
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while not accepts_connections(port, host):
            if server.poll() is not None:
                raise RuntimeError(f"Redis does not start: {(base / 'redis.log').read_text()[-800:]}")
            time.sleep(0.02)
        yield f"{host}:{port}"
    finally:
        server.kill()
        server.wait()
