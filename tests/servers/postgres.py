"""A real, throw-away PostgreSQL on loopback. Needs Debian's postgresql; serves about a second after the start.

python -m tests.servers.postgres [DIRECTORY]      prints its URL, runs until SIGTERM or SIGINT
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.processes import HOST, ServerMissingError, dying_with_parent, free_port

# Nothing here outlives the test run, so nothing waits for the disk; but what was committed must outlive a killed process, so
# commits still wait for the log to be written. Its memory is in files of the folder: /dev/shm would keep that of a killed one.
_OPTIONS = {"fsync": "off", "full_page_writes": "off", "dynamic_shared_memory_type": "mmap"}


@contextmanager
def running_postgres(base: Path, host: str = HOST) -> Iterator[str]:
    """The URL (postgresql://user@host:port/postgres, no password) of a server with its data below `base`.

    It listens on `host` and trusts whoever comes from its network.
    `base` must be reachable by the user `postgres` when this runs as root. Raises `ServerMissingError` when it is not
    installed, `RuntimeError` when it does not start.
    """
    make_data(base)
    with serving_data(base, host) as server:
        yield server.url


class PostgresServer:
    """A running one, at `address` (HOST:PORT)."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self.address = address
        self.url = f"postgresql://test@{address}/postgres"
        self._process = process

    def kill(self) -> None:
        """As when its machine fails: it says goodbye to nobody. Its other processes end as they notice."""
        self._process.kill()
        self._process.wait()


def make_data(base: Path, source: PostgresServer | None = None) -> None:
    """The data of a new server below `base`: empty, or those of a standby that follows `source`."""
    base.mkdir(parents=True, exist_ok=True)
    prefix = _as_postgres(base)
    data = base / "data"
    if source is not None:
        quick = ("--checkpoint=fast", "--no-sync")
        _must(*prefix, _programs() / "pg_basebackup", "-D", data, "-d", source.url, "-R", *quick, cwd=base)
        return
    options = ("-U", "test", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
    _must(*prefix, _programs() / "initdb", "-D", data, *options, cwd=base)
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all samenet trust\n")


@contextmanager
def serving_data(base: Path, host: str = HOST) -> Iterator[PostgresServer]:
    """Runs a server on what `make_data` made below `base`; a standby answers too, to whoever only reads."""
    port = free_port(host)
    options = {**_OPTIONS, "listen_addresses": host, "unix_socket_directories": base}
    server = (_programs() / "postgres", "-D", base / "data", "-p", port, *(f"-c{k}={v}" for k, v in options.items()))
    command = [*_as_postgres(base), *dying_with_parent(*map(str, server))]
    with (base / "postgres.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=base, stdout=log, stderr=log)
    try:
        while _call(_programs() / "pg_isready", "-h", host, "-p", str(port)).returncode:
            if process.poll() is not None:
                raise RuntimeError(f"PostgreSQL does not start: {(base / 'postgres.log').read_text()[-800:]}")
            time.sleep(0.05)
        yield PostgresServer(process, f"{host}:{port}")
    finally:
        process.send_signal(signal.SIGQUIT)  # at once, as for a throw-away server it may be
        process.wait()


def _as_postgres(base: Path) -> list[str]:
    """What makes a command run as a user that PostgreSQL accepts, to whom `base` is given: it refuses to run as root."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam("postgres")
    os.chown(base, user.pw_uid, user.pw_gid)
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "env", f"HOME={base}"]


def _programs() -> Path:
    """The folder of PostgreSQL's own programs, which Debian keeps out of the PATH; the newest version there is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        raise ServerMissingError("postgres not found: apt-get install postgresql")
    return (found[-1] if found else Path(str(on_path))).parent


def _must(*command: str | Path, cwd: Path) -> None:
    done = _call(*command, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()[-800:]}")


def _call(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a PostgreSQL on loopback until it is told to end.")
    parser.add_argument("directory", type=Path, nargs="?", help="an empty folder (default: a temporary one)")
    directory = parser.parse_args().directory
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with tempfile.TemporaryDirectory() as temporary, running_postgres(directory or Path(temporary)) as url:
        print(url, flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
