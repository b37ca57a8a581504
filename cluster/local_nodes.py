"""Several Ray nodes on one machine, to try a cluster out before there is one.

    python cluster/local_nodes.py up --num-nodes 3 --cpus 2      starts them and stays; Ctrl-C ends them
    python cluster/local_nodes.py down                           the same from another terminal

Each node has a loopback address of its own, 127.0.0.2 and up, which Linux has by itself. They share this machine's disk, so the
service on them may keep its SQLite database and local directory, and has the demo base model; ARKOR_RAY_* of the environment
reach every node. When a node ends, by itself or by your hand, the others go on, as long as the head is among them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arkor_ray.demo.base_model import ensure_demo_base, find_demo_base
from arkor_ray.embedded import Instance, die_with_parent, free_ports, kill_processes_of, read_instance
from arkor_ray.errors import ArkorError, ConflictError, ServiceUnavailableError
from arkor_ray.placement import ROLE_LABEL
from arkor_ray.settings import DEMO_BASE, Settings

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
DIRECTORY = Path(".arkor-ray-nodes")
ENVIRONMENT = "environment"


def main() -> int:
    parser = argparse.ArgumentParser(description="Several Ray nodes on one machine.")
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("--num-nodes", type=int, default=3, help="The head, which does no work, among them.")
    parser.add_argument("--cpus", type=int, default=2, help="Logical CPUs of each node but the head.")
    parser.add_argument("--roles", action="store_true", help="The last node serves, the second is for the API.")
    parser.add_argument("--no-demo-model", action="store_true", help="The service has no base model if none is given.")
    parser.add_argument("--port", type=int, default=0, help="Of the head's GCS; 0 takes a free one.")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="Logs, the token, and the service's data.")
    args = parser.parse_args()
    fewest = 4 if args.roles else 2
    if args.num_nodes < fewest or args.cpus < 1:
        parser.error(f"--num-nodes must be {fewest} or more, --cpus 1 or more")
    roles = [*["control-plane"] * 2, *["training"] * (args.num_nodes - 3), "serving"] if args.roles else []
    nodes = [Node(f"127.0.0.{i + 2}", args.cpus if i else 0, *roles[i : i + 1]) for i in range(args.num_nodes)]
    directory = args.directory.expanduser().absolute()
    try:
        if args.command == "down":
            down(directory)
        else:
            up(directory, nodes, args.port or free_ports(1)[0], demo_model=not args.no_demo_model)
    except KeyboardInterrupt:
        print("The nodes have stopped", flush=True)
    except ArkorError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True)
class Node:
    """What a node is started with; without a role, any part of the service may run on it."""

    address: str
    cpus: int
    role: str | None = None


def up(directory: Path, nodes: list[Node], port: int, *, demo_model: bool = True) -> None:
    """Starts the nodes and stays until a signal ends it.

    `demo_model`: where the environment names no base models, the service gets that of the demo. Raises
    ServiceUnavailableError when a node does not start, or when the head ends by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with Instance(directory):
        environment = _environment(directory, with_roles=nodes[0].role is not None)
        # What is wrong with them is said here, not by every node.
        settings = Settings.load(data_dir=environment["ARKOR_RAY_DATA_DIR"])
        environment |= _demo_model(settings) if demo_model else {}
        with running_nodes(directory, nodes, port, environment) as processes:
            print(f"{len(nodes)} nodes run, {nodes[0].address} to {nodes[-1].address}. The service on them:\n")
            file = _write_environment(directory, environment)
            print(
                f"  (set -a; . {shlex.quote(str(file))}; arkor-ray up --ray-address {nodes[0].address}:{port})\n",
                flush=True,
            )
            _watch(directory, dict(zip(nodes, processes, strict=True)))


def down(directory: Path) -> None:
    """Ends what `up` of the same directory runs, as Ctrl-C in its terminal would."""
    running = read_instance(directory)
    if running is None:
        print(f"No nodes run in {directory}")
        return
    if not running["pid"]:
        raise ConflictError(f"The nodes in {directory} are starting or stopping; try again")
    os.kill(running["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 2 * STOP_TIMEOUT_S
    while read_instance(directory) is not None:
        if time.monotonic() > deadline:
            raise ServiceUnavailableError(
                f"Process {running['pid']} has not ended {2 * STOP_TIMEOUT_S:g} s after SIGTERM"
            )
        time.sleep(0.1)
    print("The nodes have stopped")


def _watch(directory: Path, running: dict[Node, subprocess.Popen[bytes]]) -> None:
    """Says which node ends by itself. Raises ServiceUnavailableError when it is the head, without which there is no cluster."""
    head = next(iter(running))
    while True:
        for node, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[node]
            said = f"{node.address} has ended ({_ending(process.returncode)}); its log is {_log(directory, node)}"
            if node is head:
                raise ServiceUnavailableError(f"The head {said}. The other nodes end with it")
            print(f"Node {said}. The others go on. The same node once more, in another terminal:\n")
            file = shlex.quote(str(directory / ENVIRONMENT))
            print(f"  (set -a; . {file}; {shlex.join(process.args)})\n", flush=True)
        time.sleep(0.5)


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _log(directory: Path, node: Node) -> Path:
    return directory / f"{node.address}.log"


def _demo_model(settings: Settings) -> dict[str, str]:
    """ARKOR_RAY_MODELS with the demo's base model, where nobody names others; made first if need be.

    It is on this machine's disk and so on every node.
    """
    if settings.models or settings.catalogue.models:
        return {}
    cache = settings.demo_base_cache
    if find_demo_base(cache) is None:
        print("Making the demo base model, the first time only; --no-demo-model goes without it", flush=True)
    folder = ensure_demo_base(cache)
    print(f"The service gets the base model {DEMO_BASE}, since ARKOR_RAY_MODELS names none", flush=True)
    return {"ARKOR_RAY_MODELS": f"{DEMO_BASE}={folder}"}


@contextlib.contextmanager
def running_nodes(
    directory: Path, nodes: list[Node], port: int, environment: dict[str, str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of `ray start --block`, the head's first; all have ended, with all they started, when this returns."""
    # Not under `directory`: Ray's socket paths must stay below 107 characters.
    temp_dir = Path(tempfile.mkdtemp(prefix="arkor-ray-"))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for node in nodes:
            command = _start_command(node, f"{nodes[0].address}:{port}", temp_dir / node.address, head=node is nodes[0])
            log = _log(directory, node)
            processes.append(_start(command, log, environment))
            _await_start(processes[-1], log)
        yield processes
    finally:
        for process in reversed(processes):
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in reversed(processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        kill_processes_of(temp_dir)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _environment(directory: Path, *, with_roles: bool) -> dict[str, str]:
    """What the nodes and everybody who joins them have in common."""
    data_dir = Path(os.environ.get("ARKOR_RAY_DATA_DIR") or directory / "service")
    return {
        **{name: value for name, value in os.environ.items() if name.startswith("ARKOR_RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing to drain: all state is in the database and storage
        "ARKOR_RAY_DATA_DIR": str(data_dir.expanduser().absolute()),
        "ARKOR_RAY_NODE_ROLES": str(int(with_roles)),
    }


def _write_environment(directory: Path, environment: dict[str, str]) -> Path:
    """A file to source, readable for its owner only, since it holds the token and perhaps the database's password."""
    path = directory / ENVIRONMENT
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in environment.items()))
    return path


def _start_command(node: Node, gcs: str, temp_dir: Path, *, head: bool) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    dashboard, client, agent = free_ports(3)
    if head:
        command += ["--head", f"--port={gcs.rpartition(':')[2]}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-host={node.address}", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    else:
        command += [f"--address={gcs}"]
    command += [f"--node-ip-address={node.address}", f"--num-cpus={node.cpus}", f"--temp-dir={temp_dir}"]
    command += [f"--labels={ROLE_LABEL}={node.role}"] if node.role else []
    command += [f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"]
    command += [
        "--object-store-memory=200000000"
    ]  # bytes; each node would otherwise take a share of the machine's memory
    return command


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        # A session of its own: Ctrl-C in the terminal is for us, and we end the nodes in our order.
        return subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip


def _await_start(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if "Ray runtime started" in log.read_text(errors="replace"):
            return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ServiceUnavailableError(f"A node did not start; {log} ends with:\n{tail}")


def _interrupt(number: int, frame: object) -> None:
    # A second signal must not cut the end of the nodes short; it has its own time limit.
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
