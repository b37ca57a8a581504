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
# commits still wait for the log to be written.
_OPTIONS = {"fsync": "off", "full_page_writes": "off"}


@contextmanager
def running_postgres(base: Path, host: str = HOST) -> Iterator[str]:
    """The URL (postgresql://user@host:port/postgres, no password) of a server with its data below `base`.

    It listens on `host` and trusts whoever comes from its network.
    `base` must be reachable by the user `postgres` when this runs as root. Raises `ServerMissingError` when it is not
    installed, `RuntimeError` when it does not start.
    """
    programs = _programs()
    base.mkdir(parents=True, exist_ok=True)
    prefix: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        os.chown(base, user.pw_uid, user.pw_gid)
        prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "env", f"HOME={base}"]
    data, port = base / "data", free_port(host)
    initdb = (programs / "initdb", "-D", data, "-U", "test", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
    made = _call(*prefix, *initdb, cwd=base)
    if made.returncode:
        raise RuntimeError(f"initdb: {made.stderr.strip()[-800:]}")
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all samenet trust\n")
    options = [f"-c{name}={value}" for name, value in {**_OPTIONS, "listen_addresses": host}.items()]
    command = [*prefix, *dying_with_parent(str(programs / "postgres"), "-D", str(data), "-p", str(port), *options)]
    with (base / "postgres.log").open("ab") as log:
        server = subprocess.Popen([*command, f"-cunix_socket_directories={base}"], cwd=base, stdout=log, stderr=log)
    try:
        while _call(programs / "pg_isready", "-h", host, "-p", str(port)).returncode:
            if server.poll() is not None:
                raise RuntimeError(f"PostgreSQL does not start: {(base / 'postgres.log').read_text()[-800:]}")
            time.sleep(0.05)
        yield f"postgresql://test@{host}:{port}/postgres"
    finally:
        server.send_signal(signal.SIGQUIT)  # at once, as for a throw-away server it may be
        server.wait()


def _programs() -> Path:
    """The folder of PostgreSQL's own programs, which Debian keeps out of the PATH; the newest version there is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        raise ServerMissingError("postgres not found: apt-get install postgresql")
    return (found[-1] if found else Path(str(on_path))).parent


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
