"""Several "hosts" on one Linux machine: namespaces for network and processes each, joined by a bridge in one of its own.

Needs root and Debian's iproute2 and util-linux. Nothing outside the namespaces is touched, and nothing of them stays: a
process of its own watches over them, and ends what runs in them when this one ends, however that comes about.

    python -m tests.servers.hosts FOLDER NAMESPACE...      the watch; at the end of its input it removes all of these
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.servers.processes import ServerMissingError

_NETWORK = "10.77.0"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000


# The first process of a host: all others end with it, and it is the parent of those that lost theirs.
_INIT = """
import os, time
print("ready", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
"""


class NotPermittedError(Exception):
    """Hosts cannot be made here, whatever is installed: a container may keep even root from making namespaces."""


class Host:
    """One of `Hosts`: an address, and the processes that were started there, which see only each other."""

    def __init__(self, name: str, namespace: str, address: str, port: str, switch: str) -> None:
        self.name, self.namespace, self.address = name, namespace, address
        self._port, self._switch = port, switch
        self._init: subprocess.Popen[bytes] | None = None

    def popen(self, command: list[str], **arguments: Any) -> subprocess.Popen[Any]:
        """A process on this host; what it starts is there too."""
        return subprocess.Popen([*self._enter(), *command], **arguments)

    def run(self, command: list[str], **arguments: Any) -> subprocess.CompletedProcess[Any]:
        return subprocess.run([*self._enter(), *command], **arguments)

    def _enter(self) -> list[str]:
        """What puts a command onto this host; boots it if it is off."""
        if self._init is None:
            isolate = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "setpriv", "--pdeathsig", "KILL"]
            self._init = subprocess.Popen(
                ["nsenter", f"--net={_NAMESPACES / self.namespace}", *isolate, sys.executable, "-ISc", _INIT],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert self._init.stdout is not None
            if self._init.stdout.readline() != b"ready\n":
                raise RuntimeError(f"the host {self.name} does not start")
        unshare = self._init.pid
        init = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0]
        return ["nsenter", f"--target={init}", "--net", "--pid", "--mount"]

    def cut(self) -> None:
        """Pulls the cable: nothing comes or goes, and nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def heal(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def processes(self) -> dict[int, str]:
        """Living processes on this host: pid and title."""
        return {pid: title for pid in _pids(self.namespace) if (title := _title(pid))}

    def kill_all(self) -> None:
        """SIGKILL to every process, as when the machine loses power. The next `popen` switches it on again."""
        _kill_all(self.namespace)
        if self._init is not None:
            self._init.communicate()
            self._init = None

    @contextlib.contextmanager
    def standing_here(self) -> Iterator[None]:
        """This thread, what it starts and what it connects to, see the network from this host."""
        with Path("/proc/thread-self/ns/net").open() as home:
            _enter((_NAMESPACES / self.namespace).open())
            try:
                yield
            finally:
                _enter(home)


class Hosts:
    """The hosts of these names, with addresses that all of them can reach. `folder` is removed with them."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder
        missing = [program for program in ("ip", "nsenter", "unshare", "setpriv") if shutil.which(program) is None]
        if missing:
            raise ServerMissingError(f"{', '.join(missing)} not found: apt-get install iproute2 util-linux")
        if os.geteuid() != 0:
            raise NotPermittedError("network namespaces need root")
        self._switch = f"arkor-{os.getpid()}-sw"
        self._hosts = {
            name: Host(name, f"arkor-{os.getpid()}-{name}", f"{_NETWORK}.{10 + i}", f"port{i}", self._switch)
            for i, name in enumerate(names)
        }
        self._watch: subprocess.Popen[bytes] | None = None

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __enter__(self) -> Self:
        namespaces = [host.namespace for host in self]
        # In a session of its own: Ctrl-C in the terminal is not for it.
        command = [sys.executable, "-m", "tests.servers.hosts", str(self._folder), *namespaces, self._switch]
        self._watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            _run("unshare", "--mount", "--pid", "--fork", "--net", "true")
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for host in self:
                self._plug_in(host)
        except subprocess.CalledProcessError as error:
            self._end()
            raise NotPermittedError(f"namespaces cannot be made here: {error.stderr.strip()}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _plug_in(self, host: Host) -> None:
        _ip("netns", "add", host.namespace)
        port = host._port
        _ip("-n", host.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")
        # It leads nowhere; Ray takes its own address from the default route.
        _ip("-n", host.namespace, "route", "add", "default", "via", f"{_NETWORK}.1")
        _ip("-n", self._switch, "link", "set", port, "master", "br0")
        _ip("-n", self._switch, "link", "set", port, "up")

    def _end(self) -> None:
        assert self._watch is not None
        assert self._watch.stdin is not None
        self._watch.stdin.close()
        self._watch.wait(30)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


def _enter(namespace: Any) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _pids(namespace: str) -> list[int]:
    """Processes in a namespace, but for this one, which only visits."""
    path = _NAMESPACES / namespace
    if not path.exists():
        return []
    found, inode = [], path.stat().st_ino
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended while we looked
                if (entry / "ns" / "net").stat().st_ino == inode:
                    found.append(int(entry.name))
    return found


def _title(pid: int) -> str:
    """What a process calls itself; a zombie has no name any more."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _kill_all(namespace: str) -> None:
    deadline = time.monotonic() + 20
    while pids := [pid for pid in _pids(namespace) if _title(pid)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{namespace}: processes {pids} do not end")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _watch(folder: Path, namespaces: list[str]) -> None:
    sys.stdin.buffer.read()
    for namespace in namespaces:
        _kill_all(namespace)
    for namespace in namespaces:
        if (_NAMESPACES / namespace).exists():
            _ip("netns", "del", namespace)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _watch(Path(sys.argv[1]), sys.argv[2:])
