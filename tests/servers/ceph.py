"""A real S3 service on loopback: one Ceph monitor, one OSD that keeps everything in memory, one radosgw.

Needs Debian's ceph-mon, ceph-osd and radosgw (apt-get install --no-install-recommends); no manager, no systemd, no
disk, no root. Serves about 2 seconds after the start.

    python -m tests.servers.ceph DIRECTORY      prints one line of JSON (see S3Endpoint), runs until SIGTERM or SIGINT
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.processes import HOST, ServerMissingError, accepts_connections, dying_with_parent, free_port
from tests.servers.s3 import S3Endpoint

_START_SECONDS = 90
_MEMORY_GIB = 2

_CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:{host}:{mon_port}/0]
public addr = {host}
cluster addr = {host}
ms bind ipv4 = true
ms bind ipv6 = false
ms bind msgr1 = false
# radosgw asks for encrypted connections to the monitor, which "auth = none" cannot give: it would hang.
ms mon client mode = crc
auth cluster required = none
auth service required = none
auth client required = none
run dir = {base}/run
admin socket = {base}/run/$name.asok
pid file = {base}/run/$name.pid
log file = {base}/$name.log
mon cluster log file = {base}/cluster.log
crash dir = {base}/run
keyring = {base}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon pg warn min per osd = 0
mon max pg per osd = 1000
[mon]
mon data = {base}/mon
# The default of a second or more makes the start take 11 seconds instead of one.
paxos propose interval = 0.05
paxos min wait = 0.01
mon osd initial require min compat client = luminous
[osd]
osd data = {base}/osd
osd objectstore = memstore
memstore device bytes = {memory}
osd class load list = *
osd class default list = *
osd max object size = 134217728
[client.rgw]
rgw frontends = beast endpoint={host}:{port}
rgw run sync thread = false
rgw enable usage log = false
rgw lc debug interval = -1
rgw gc processor period = 60
rgw thread pool size = 32
rgw dns name = {host}
"""


@contextmanager
def running_ceph(base: Path, host: str = HOST) -> Iterator[S3Endpoint]:
    """Runs the three daemons on `host` with everything below `base`, an empty folder.

    Raises `ServerMissingError` when they are not installed, `RuntimeError` when they do not start.
    """
    missing = [p for p in ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin") if shutil.which(p) is None]
    if missing:
        raise ServerMissingError(f"{', '.join(missing)} not found: apt-get install ceph-mon ceph-osd radosgw")
    ceph = _Ceph(base, host)
    try:
        ceph.start()
        yield S3Endpoint(f"http://{host}:{ceph.port}", ceph.access_key, ceph.secret_key)
    finally:
        ceph.stop()


class _Ceph:
    def __init__(self, base: Path, host: str) -> None:
        self.host = host
        self.base = base.resolve()
        self.config = self.base / "ceph.conf"
        self.port = free_port(host)
        self.mon_port = free_port(host)
        self.fsid = str(uuid.uuid4())
        self.access_key, self.secret_key = "test-access", "test-secret"
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._write_files()
        monmap = str(self.base / "monmap")
        address = f"[v2:{self.host}:{self.mon_port}/0]"
        self._run("monmaptool", "--create", "--clobber", "--fsid", self.fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", *self._options, "--mkfs", "-i", "a", "--monmap", monmap)
        self._spawn("ceph-mon", "-i", "a")
        osd_id = str(uuid.uuid4())
        self._run("ceph", *self._options, "--connect-timeout", "30", "osd", "new", osd_id)
        self._run("ceph-osd", *self._options, "--mkfs", "-i", "0", "--osd-uuid", osd_id)
        self._spawn("ceph-osd", "-i", "0")
        keys = (f"--access-key={self.access_key}", f"--secret-key={self.secret_key}")
        self._run(
            *(
                "radosgw-admin",
                *self._options,
                "-n",
                "client.rgw",
                "user",
                "create",
                "--uid=test",
                "--display-name=test",
            ),
            *keys,
        )
        self._spawn("radosgw", "-n", "client.rgw")
        self._wait_until_it_serves()

    def stop(self) -> None:
        # Everything is in memory: there is nothing to write back, so no reason to ask politely.
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()

    @property
    def _options(self) -> tuple[str, str]:
        return ("-c", str(self.config))

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.config)}

    def _write_files(self) -> None:
        for folder in ("mon", "osd", "run"):
            (self.base / folder).mkdir(parents=True)
        (self.base / "keyring").touch()
        self.config.write_text(
            _CONFIG.format(
                fsid=self.fsid,
                host=self.host,
                port=self.port,
                mon_port=self.mon_port,
                base=self.base,
                memory=_MEMORY_GIB << 30,
            )
        )

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=_START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-800:]}")

    def _spawn(self, program: str, *arguments: str) -> None:
        with (self.base / f"{program}.out").open("ab") as log:
            command = dying_with_parent(program, *arguments, *self._options, "-f")
            self.daemons.append(
                subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _wait_until_it_serves(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while not accepts_connections(self.port, self.host):
            if any(daemon.poll() is not None for daemon in self.daemons) or time.monotonic() > end:
                raise RuntimeError(f"radosgw does not answer; see the logs in {self.base}")
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a Ceph S3 service on loopback until it is told to end.")
    parser.add_argument("directory", type=Path, nargs="?", help="an empty folder (default: a temporary one)")
    directory = parser.parse_args().directory
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with tempfile.TemporaryDirectory() as temporary, running_ceph(directory or Path(temporary)) as endpoint:
        print(endpoint.to_json(), flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
