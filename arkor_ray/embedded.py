"""The embedded default: one Ray of our own on this machine, for one data directory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from arkor_ray import joined_ray
from arkor_ray.errors import ConflictError, InvalidRequestError, ServiceUnavailableError
from arkor_ray.settings import Settings

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
OTHER_RAYS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
MIN_CPUS = 4  # logical CPUs for Ray's bookkeeping: two workers and a second job fit on the smallest laptop

# Ray has one node here. Told that there will never be others (which it takes for granted on macOS, hence the name), it calls
# that node 127.0.0.1 and listens on loopback alone, where it would otherwise listen on every interface. The workers of a job
# find each other by torch's and NCCL's own ways.
LOOPBACK_ONLY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    **({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
}


class Instance:
    """Holds a data directory for this process: `instance.json` says who runs there, a lock says that it still does."""

    def __init__(self, data_dir: Path) -> None:
        make_data_dir(data_dir)
        self._path = data_dir / "instance.json"
        self._file = self._path.open("a+")

    def __enter__(self) -> Instance:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running = read_instance(self._path.parent) or {}
            raise ConflictError(
                f"An arkor-ray (pid {running.get('pid', '?')}) already runs in {self._path.parent}; "
                "end it with `arkor-ray down`, or choose another --data-dir"
            ) from None
        self.announce(None)
        return self

    def announce(self, url: str | None, *, metrics_url: str | None = None) -> None:
        """Writes who runs here; `url` once every part answers."""
        self._file.seek(0)
        self._file.truncate()
        json.dump({"pid": os.getpid(), "url": url, "metrics_url": metrics_url}, self._file)
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.close()


def make_data_dir(data_dir: Path) -> None:
    """Makes it where there is none. Raises InvalidRequestError where nothing can be written there.

    For its owner alone: it holds users' data, and the data sets' tokens of jobs that have not begun.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    except OSError as error:
        raise InvalidRequestError(
            f"--data-dir {data_dir}: nothing can be kept there ({error.strerror}); give another directory with --data-dir "
            "or ARKOR_RAY_DATA_DIR",
            param="data_dir",
        ) from error


def read_instance(data_dir: Path) -> dict[str, Any] | None:
    """Who runs in a data directory, or None. A file left behind by a killed process counts as nobody."""
    try:
        file = (data_dir / "instance.json").open()
    except (FileNotFoundError, NotADirectoryError):
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read()
            return json.loads(text) if text else {"pid": 0, "url": None}
    return None


class LocalRay:
    """A Ray head of our own, or a connection to a given one. As a context manager it starts, connects, and ends it.

    Attributes:
        settings: with what depends on the machine filled in (workers per job).
        metrics_url: where Prometheus finds this machine's metrics; None for a Ray that was given, which says it itself.
    """

    def __init__(self, settings: Settings, address: str | None = None) -> None:
        if settings.node_roles and address is None:
            raise InvalidRequestError(
                "ARKOR_RAY_NODE_ROLES=1: a Ray of one node has no node for each role; unset it, or join a cluster with "
                "--ray-address",
                param="ARKOR_RAY_NODE_ROLES",
            )
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self.metrics_url: str | None = None
        cpus = max(MIN_CPUS, os.cpu_count() or 1)
        self._cpus = cpus
        if "ARKOR_RAY_MAX_WORKERS_PER_JOB" not in os.environ and address is None:
            settings = settings.model_copy(update={"max_workers_per_job": cpus})
        self.settings = settings

    def __enter__(self) -> LocalRay:
        # Every process of this Ray inherits these: workers, drivers and replicas read the same settings.
        os.environ.update(self.settings.environment())
        check_free(self.settings.host, self.settings.port)
        try:
            address = self._address or self._start_head()
            self._connect(address)
        except BaseException:
            self._end()
            raise
        return self

    def wait(self) -> None:
        """Blocks while Ray runs. Raises ServiceUnavailableError when it ends by itself."""
        if self._process is None:
            assert self._address is not None
            joined_ray.wait_while_answering(self._address)
            raise ServiceUnavailableError(
                f"The Ray at {self._address} is gone: nothing has answered there for {joined_ray.GONE_S:g} s; start it "
                "and give this command again"
            )
        while self._process.poll() is None:
            time.sleep(0.5)
        raise ServiceUnavailableError(
            f"Ray ended with code {self._process.returncode}; its logs are in {self._log_path()}"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None and self._address is not None and not joined_ray.answers(self._address):
            return  # whatever we would ask of it waits until Ray ends us, and there is nothing left to end
        from arkor_ray import service

        _hush_ray()
        ray_goes_on = self._process is None
        service.stop(ray_goes_on=ray_goes_on)
        self._end()
        if not ray_goes_on:  # nobody uses the database any more
            service.fold_journal(self.settings)

    def _start_head(self) -> str:
        """Starts `ray start --head --block` as a child; returns its GCS address."""
        gcs, dashboard, agent, client, metrics = free_ports(5)
        self.metrics_url = f"http://127.0.0.1:{metrics}/metrics"
        self._clear_last()
        # Not under data_dir: Ray's socket paths must stay below 107 characters. And one further down than the folder that only
        # we may enter, as Ray lets everybody read and write its own.
        private_dir = Path(tempfile.mkdtemp(prefix="arkor-ray-"))
        self._temp_dir_note.write_text(str(private_dir))
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing to drain: all state is in the database and storage
            # Ray's default is 15: whatever else runs on this machine would take the core from the thread that trains.
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one actor less for each job: nobody drains the only node
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **LOOPBACK_ONLY,
        }
        for name in OTHER_RAYS:  # Ray Jobs would take the one that they name for ours
            environment.pop(name, None)
            os.environ.pop(name, None)
        # Before Ray is imported here: it reads them once.
        ours = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", *LOOPBACK_ONLY)
        os.environ.update({name: environment[name] for name in ours})
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--metrics-export-port={metrics}"]
        command += [
            f"--num-cpus={self._cpus}",
            f"--temp-dir={private_dir / 'ray'}",
            f"--ray-client-server-port={client}",
        ]
        command += ["--min-worker-port=0", "--max-worker-port=0"]  # any free one: two instances must not share a range
        if not _torch_uses_gpus():
            command.append("--num-gpus=0")  # Ray would give out those that it finds, and whoever got one would fail
        with self._log_path().open("wb") as log:
            # A session of its own: Ctrl-C in the terminal is for us, and we end Ray in our order.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        host = _own_address()
        self._await_port(host, gcs)
        return f"{host}:{gcs}"

    def _await_port(self, host: str, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if "Ray runtime started" in self._log_path().read_text(errors="replace"):
                return
            time.sleep(0.1)
        tail = "\n".join(self._log_path().read_text(errors="replace").splitlines()[-15:])
        raise ServiceUnavailableError(f"Ray did not start at {host}:{port}; {self._log_path()} ends with:\n{tail}")

    def _connect(self, address: str) -> None:
        import ray

        from arkor_ray.placement import NAMESPACE

        if self._address is not None:
            joined_ray.check_answers(self._address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        if self._address is not None:
            joined_ray.check_ray(self.settings)
            joined_ray.check_settings(self.settings)

    def _end(self) -> None:
        """Disconnects and ends the Ray we started: politely, then every process that is left of it."""
        import ray

        with contextlib.suppress(Exception):  # Ray may be gone already, which is what we want
            ray.shutdown()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._clear_last()

    def _clear_last(self) -> None:
        """Ends what is left of the Ray that ran last for this data directory, which nobody else may use while we do."""
        if not self._temp_dir_note.exists():
            return
        last = Path(self._temp_dir_note.read_text())
        if last.name.startswith("arkor-ray-"):
            kill_processes_of(last)
            shutil.rmtree(last, ignore_errors=True)
        self._temp_dir_note.unlink()

    @property
    def _temp_dir_note(self) -> Path:
        """Says where the Ray of this data directory keeps its files, also when this process is killed."""
        return self.settings.data_dir / "ray-temp-dir"

    def _log_path(self) -> Path:
        return self.settings.data_dir / "ray.log"


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def check_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConflictError(f"--port {port} on {host}: {error.strerror}; choose another port") from error


def _torch_uses_gpus(devices: Path = Path("/dev")) -> bool:
    """Whether torch can use this machine's GPUs; True also where there is none."""
    if not any(devices.glob("nvidia[0-9]*")):
        return True
    import torch

    if torch.cuda.is_available():
        return True
    logger.warning(
        "This machine has a GPU that torch %s cannot use, so everything runs on the CPU; install torch's build for CUDA, "
        "and see whether `nvidia-smi` finds the driver",
        torch.__version__,
    )
    return False


def _hush_ray() -> None:
    """Ray prints here what its nodes report as errors, whatever `log_to_driver` says; that actors which we end are gone is
    no news. As Ray's own disconnecting does it, which may do it again."""
    from ray._private.worker import global_worker

    if global_worker.connected:
        global_worker.threads_stopped.set()
        global_worker.gcs_error_subscriber.close()  # type: ignore[attr-defined]  # it has one once it is connected


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def die_with_parent() -> None:
    """In the child: SIGTERM when the parent dies, so that a killed `up` leaves no Ray behind. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def kill_processes_of(temp_dir: Path) -> None:
    """Kills processes whose command line names our Ray's own directory: only ours ever do."""
    if sys.platform != "linux":
        return
    marker = str(temp_dir).encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended while we looked
            if marker in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
