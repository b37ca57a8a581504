"""A whole arkor-ray on this machine, as its users start it, with verbs for what happens to services in the field."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arkor_ray.client.client import Client
from arkor_ray.embedded import free_ports
from arkor_ray.schemas.event import Event

START_TIMEOUT_S = 400  # the first start on a machine makes the demo base model

# Parts of the service, by what their processes call themselves.
PARTS: dict[str, Callable[[str], bool]] = {
    "worker": lambda title: title.startswith("ray::") and "TrainWorker" in title,
    "driver": lambda title: "arkor_ray.training.main" in title and "-c" not in title.split()[:2],
    "recorder": lambda title: title.startswith("ray::Recorder"),
    "replica": lambda title: title.startswith("ray::ServeReplica:inference"),
    "api": lambda title: title.startswith("ray::ServeReplica:arkor"),
    "controller": lambda title: title.startswith("ray::Controller"),
}


class RunningService:
    """`arkor-ray up` with a data directory, port and home of its own.

    Args:
        models: further catalogue entries, name to directory.
        environment: further variables, such as those of an S3 service.
    """

    def __init__(
        self, folder: Path, *, models: dict[str, Path] | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.data_dir = folder / "data"
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.home = folder / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        self._log = folder / "up.log"
        self._models = models or {}
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "arkor-ray"
        self.environment = {
            **os.environ,
            "HOME": str(self.home),
            "ARKOR_RAY_CACHE_DIR": str(cache),
            "ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS": "1",
            "ARKOR_RAY_DATASETS_ALLOW_PRIVATE_HOSTS": "1",
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and returns when it says that it is ready."""
        aliases = [f"--alias={name}={path}" for name, path in self._models.items()]
        command = [
            sys.executable,
            "-m",
            "arkor_ray.cli.main",
            "up",
            f"--port={self.port}",
            f"--data-dir={self.data_dir}",
        ]
        with self._log.open("ab") as log:
            start = log.tell()
            self._process = subprocess.Popen(
                [*command, *aliases], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(lambda: self._is_ready(start), START_TIMEOUT_S, "arkor-ray did not say that it is ready", self.log)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it as a user does; returns its exit code. Raises if it takes longer than the promised 20 s."""
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(20)
        assert not self.processes(), f"left behind: {self.processes()}"
        return code

    def crash(self) -> None:
        """SIGKILL to every process of the instance at once, as when the machine loses power."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        while found := self.processes():
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def kill(self, part: str, timeout_s: float = 60) -> int:
        """SIGKILL to the one process that is `part`; returns its pid."""
        pids: list[int] = []

        def found() -> bool:
            pids[:] = [pid for pid, title in self.processes().items() if PARTS[part](title)]
            return bool(pids)

        wait_for(found, timeout_s, f"there is no {part}", lambda: "\n".join(self.processes().values()))
        os.kill(pids[0], signal.SIGKILL)
        return pids[0]

    def processes(self) -> dict[int, str]:
        """Living processes of this instance but for `up` itself: pid and title."""
        marker = f"ARKOR_RAY_DATA_DIR={self.data_dir}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if title:  # a zombie has none
                        found[int(entry.name)] = title
        return found

    def client(self) -> Client:
        """A client with an anonymous identity of its own, kept for the life of the service; it shows every failure."""
        return Client(self.url, home=self.home / ".arkor", project_dir=self.home, max_retries=0)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def _is_ready(self, start: int) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"arkor-ray ended with code {self._process.returncode}:\n{self.log()}")
        return f"arkor-ray is ready at {self.url}".encode() in self._log.read_bytes()[start:]


@contextlib.contextmanager
def running_service(folder: Path, **arguments: Any) -> Iterator[RunningService]:
    service = RunningService(folder, **arguments)
    service.start()
    try:
        yield service
    finally:
        service.crash()


class Follower:
    """Follows a job's events in a thread, as a client that was there all the time; reconnects by itself."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self._client, self._job_id = client, job_id
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the stream goes on."""
        return self._thread.is_alive()

    def wait_for(self, what: Callable[[Event], bool], timeout_s: float = 240) -> Event:
        """The first event for which `what` holds, waiting for it if need be."""
        found: list[Event] = []

        def seen() -> bool:
            found[:] = [e for e in list(self.events) if what(e)][:1]
            if not found and not self._thread.is_alive():
                raise AssertionError(f"the stream ended: {self.error!r}\n{self._told()}")
            return bool(found)

        wait_for(seen, timeout_s, "the event did not come", self._told)
        return found[0]

    def join(self, timeout_s: float = 300) -> list[Event]:
        """All events, after the stream's end."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the stream has not ended\n{self._told()}"
        if self.error is not None:
            raise self.error
        return self.events

    def _follow(self) -> None:
        try:
            for each in self._client.events(self._job_id):
                self.events.append(each)
        except BaseException as error:
            self.error = error

    def _told(self) -> str:
        return "\n".join(json.dumps(e.data)[:300] for e in self.events[-12:])


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str, detail: Callable[[], str] = str) -> None:
    """Returns once `condition()` holds. Raises AssertionError with `what` and `detail()` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} within {timeout_s:g} s:\n{detail()}")
        time.sleep(0.1)
