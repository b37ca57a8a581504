"""A Ray cluster of several hosts on this machine, with the servers that a service on it needs, each on a host of its own.

The head has no CPUs, so that nothing of the service's is lost with it but Ray's own bookkeeping, which Redis keeps. Of three
nodes one is too small to train; the service starts there before the others join, so that it serves there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from arkor_ray.client.client import Client
from tests.integration.stories import ask
from tests.servers.arkor import PARTS, wait_for
from tests.servers.ceph import running_ceph
from tests.servers.hosts import Host, Hosts
from tests.servers.load_balancer import LoadBalancer
from tests.servers.postgres import running_postgres
from tests.servers.redis import running_redis

HEAD, SERVING, TRAINING = "head", "serve", ("train-a", "train-b")
NODES = (HEAD, SERVING, *TRAINING)
GCS_PORT, DASHBOARD_PORT, API_PORT = 6379, 8265, 8000
TOKEN = "t" * 32
START_TIMEOUT_S = 120.0
ROOT = Path(__file__).parents[2]

# A node that hangs or is cut off is given up within seconds, not minutes. A node without its head waits for it.
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_worker_niceness": "0",
    "RAY_enable_metrics_collection": "0",
    "GLOO_SOCKET_IFNAME": "eth0",  # the name of this machine leads every host to itself
}

# Parts of the service besides those of tests.servers.arkor, by what their processes call themselves.
RAY_PARTS = {
    "raylet": lambda title: title.split()[0].endswith("/raylet"),
    "gcs": lambda title: title.split()[0].endswith("/gcs_server"),
    "serve controller": lambda title: title.startswith("ray::ServeController"),
    "proxy": lambda title: title.startswith("ray::ProxyActor"),
    "train controller": lambda title: title.startswith("ray::") and "TrainController" in title,
}
ALL_PARTS = {**PARTS, **RAY_PARTS}


@dataclass
class Node:
    """One node of the Ray cluster and the host that it is."""

    host: Host
    command: list[str]
    environment: dict[str, str]
    folder: Path
    starts: int = 0
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.log = self.folder / "start.log"

    def begin(self) -> subprocess.Popen[Any]:
        """Starts it as a kubelet or systemd would; the process ends when Ray runs. Each start has a folder of its own."""
        self.starts += 1
        with self.log.open("ab") as log:
            return self.host.popen(
                [*self.command, f"--temp-dir={self.folder / str(self.starts)}"],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip

    def finish(self, start: subprocess.Popen[Any]) -> None:
        if start.wait(START_TIMEOUT_S):
            raise RuntimeError(f"Ray did not start on {self.host.name}:\n{self.log.read_text()[-2000:]}")

    def start(self) -> None:
        self.finish(self.begin())

    def find(self, part: str) -> list[int]:
        """Pids on this node of the processes that are `part`."""
        return [pid for pid, title in self.host.processes().items() if ALL_PARTS[part](title)]

    def start_again_when_ended(self, timeout_s: float = 60) -> None:
        """For a node that Ray has given up: its raylet ends itself once it hears of that, and somebody starts it again."""
        wait_for(lambda: not self.find("raylet"), timeout_s, f"the raylet of {self.host.name} did not end itself")
        self.host.kill_all()  # as when the container that the raylet was the first process of ends with it
        self.start()


class RayHosts:
    """The cluster, once `running_cluster` has started it. The test itself stands on a host of its own."""

    def __init__(
        self, folder: Path, hosts: Hosts, environment: dict[str, str], redis: str | None, storage_processes: list[int]
    ) -> None:
        self.hosts = hosts
        self.folder = folder
        self.storage_processes = storage_processes
        self.nodes: dict[str, Node] = {}
        self._environment = {**_clean_environment(), **RAY, **environment, "PYTHONPATH": str(ROOT)}
        base = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--disable-usage-stats",
            "--include-log-monitor=false",
        ]
        base += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
        head = hosts[HEAD].address
        for name in NODES:
            command = [*base, f"--node-ip-address={hosts[name].address}"]
            of_node = {
                **self._environment,
                "HOME": str(folder / "home" / name),
                "ARKOR_RAY_DATA_DIR": str(folder / "data" / name),
            }
            if name == HEAD:
                command += ["--head", f"--port={GCS_PORT}", "--num-cpus=0", "--dashboard-host=0.0.0.0"]
                if redis is not None:
                    of_node |= {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "arkor"}
            else:
                command += [f"--address={head}:{GCS_PORT}", f"--num-cpus={1 if name == SERVING else 2}"]
            Path(of_node["HOME"]).mkdir(parents=True)
            self.nodes[name] = Node(hosts[name], command, of_node, folder / name)
        self.load_balancer = LoadBalancer([(hosts[name].address, API_PORT) for name in (SERVING, *TRAINING)])

    def start(self, names: tuple[str, ...]) -> None:
        starts = [(self.nodes[name], self.nodes[name].begin()) for name in names]
        for node, start in starts:
            node.finish(start)

    def deploy(self, release: str = "1") -> None:
        """The documented command with the documented configuration, on the head. Another `release` replaces the api."""
        config = yaml.safe_load((ROOT / "serving" / "config.yaml").read_text())
        config["applications"][0]["args"]["release"] = release
        path = self.folder / f"config-{release}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(path)]
        address = f"http://{self.hosts[HEAD].address}:{DASHBOARD_PORT}"
        environment = {**self.nodes[HEAD].environment, "RAY_DASHBOARD_ADDRESS": address}
        done = self.hosts[HEAD].run(command, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"serve deploy: {done.stdout[-1000:]}{done.stderr[-2000:]}")

    def client(self) -> Client:
        home = self.folder / "home" / "client"
        home.mkdir(parents=True, exist_ok=True)
        return Client(self.load_balancer.url, home=home / ".arkor", project_dir=home, max_retries=0)

    def find(self, part: str) -> list[tuple[str, int]]:
        """(node, pid) of every process that is `part`."""
        return [(name, pid) for name, node in self.nodes.items() for pid in node.find(part)]

    def python(self, script: str, timeout_s: float = 60, node: str = HEAD) -> str:
        """What `script` prints, run on a node beside Ray."""
        done = self.hosts[node].run(
            [sys.executable, "-c", script],
            env={**self.nodes[node].environment, "RAY_ADDRESS": f"{self.hosts[HEAD].address}:{GCS_PORT}"},
            capture_output=True, text=True, timeout=timeout_s, cwd=self.folder,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return str(done.stdout)


@contextlib.contextmanager
def running_cluster(
    models: dict[str, Path],
    *,
    fault_tolerant: bool = True,
    environment: dict[str, str] | None = None,
    keep: Path | None = None,
) -> Iterator[RayHosts]:
    """The cluster with the service on it, and this thread standing on the clients' host until it ends.

    Args:
        models: the catalogue, name to directory.
        fault_tolerant: Redis keeps what the head knows.
        environment: further variables of every node.
        keep: where logs are copied to at the end.
    """
    # Not a folder of pytest's: the paths of Ray's sockets must stay below 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="arkor-"))
    folder.chmod(0o755)  # PostgreSQL runs as another user
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(Hosts(folder, *NODES, "database", "storage", "redis", "clients"))

        def at(name: str, server: Any) -> Any:
            with hosts[name].standing_here():
                return stack.enter_context(server(folder / name, hosts[name].address))

        database = at("database", running_postgres)
        storage = at("storage", running_ceph)
        redis = at("redis", running_redis) if fault_tolerant else None
        with hosts["storage"].standing_here():
            bucket = storage.make_bucket()
        variables = {
            **storage.environment,
            "ARKOR_RAY_CLUSTER": "1",
            "ARKOR_RAY_ANONYMOUS": "1",  # clients get their tokens by themselves; nobody else is in this network
            "ARKOR_RAY_DATABASE_URL": database,
            "ARKOR_RAY_STORAGE_URL": f"s3://{bucket}/arkor",
            "ARKOR_RAY_MODELS": ",".join(f"{name}={path}" for name, path in models.items()),
            "ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS": "1",
            "ARKOR_RAY_TRAINING_CPUS_PER_WORKER": "1.5",  # one to a node, and none on the small one
            "ARKOR_RAY_CACHE_DIR": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        cluster = RayHosts(folder, hosts, variables, redis, list(hosts["storage"].processes()))
        stack.enter_context(hosts["clients"].standing_here())
        stack.enter_context(cluster.load_balancer)
        stack.callback(_keep_logs, folder, keep)
        yield cluster


def start_service(cluster: RayHosts, base_model: str) -> None:
    """Head and serving node, the service on them, then, when it serves this model, the nodes that train."""
    cluster.start((HEAD, SERVING))
    cluster.deploy()
    wait_until_ready(cluster)
    with cluster.client() as client:
        ask(client, base_model=base_model)
    cluster.start(TRAINING)


def wait_until_ready(cluster: RayHosts, timeout_s: float = 120) -> None:
    import httpx

    def ready() -> bool:
        try:
            return httpx.get(f"{cluster.load_balancer.url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    wait_for(ready, timeout_s, "the service is not ready")


def restart(host: Host, pid: int) -> subprocess.Popen[Any]:
    """SIGKILL to a server's process, and the same command again, as its supervisor would."""
    process = Path(f"/proc/{pid}")
    command = [part.decode() for part in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
    environment = dict(
        entry.decode().split("=", 1) for entry in (process / "environ").read_bytes().split(b"\0") if b"=" in entry
    )
    folder = (process / "cwd").readlink()
    os.kill(pid, signal.SIGKILL)
    while _alive(pid):
        time.sleep(0.02)
    return host.popen(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL,
                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def _alive(pid: int) -> bool:
    """False also for a zombie, whose parent has not looked yet."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ARKOR_RAY_", "AWS_"))}


def _keep_logs(folder: Path, keep: Path | None) -> None:
    if keep is None:
        return
    for logs in folder.glob("*/*/session_*/logs"):
        if not logs.parent.is_symlink():
            target = keep / logs.relative_to(folder)
            shutil.copytree(logs, target, ignore=shutil.ignore_patterns("*.sock"), dirs_exist_ok=True)
