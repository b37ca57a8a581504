"""cluster/local_nodes.py with real Ray nodes, as somebody who tries a cluster out starts and ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.arkor import wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="addresses such as 127.0.0.3 are there by themselves on Linux"),
]

SCRIPT = Path(__file__).parents[2] / "cluster" / "local_nodes.py"
LOOK = """
import json, ray
ray.init(address="{address}", log_to_driver=False, logging_level="error")
nodes = {{n["NodeManagerAddress"]: [n["Resources"].get("CPU", 0), n["Labels"]["arkor-ray/role"]] for n in ray.nodes()}}
print(json.dumps(nodes))

from arkor_ray import joined_ray
from arkor_ray.errors import InvalidRequestError
from arkor_ray.settings import Settings
joined_ray.check_ray(Settings.load())
joined_ray.check_settings(Settings.load())
try:
    joined_ray.check_settings(Settings.load(public_url="https://elsewhere.example.com"))
except InvalidRequestError as error:
    print(error.message)
"""


def test_nodes_start_with_roles_and_end_with_all_they_started(tmp_path):
    directory, log = tmp_path / "nodes", tmp_path / "log"
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(SCRIPT.parents[1])}
    call = [sys.executable, str(SCRIPT)]
    with log.open("wb") as output:
        up = subprocess.Popen(
            [*call, "up", "--num-nodes=4", "--cpus=1", "--roles", "--no-demo-model", f"--directory={directory}"],
            env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        wait_for(lambda: "--ray-address" in log.read_text() or up.poll() is not None, 240, "no nodes", log.read_text)
        address = log.read_text().rpartition("--ray-address ")[2].split(")")[0]
        command = [sys.executable, "-c", LOOK.format(address=address)]
        token = dict(line.split("=", 1) for line in (directory / "environment").read_text().splitlines())
        joined = {**environment, **{name: value.strip("'") for name, value in token.items()}}
        seen = subprocess.run(command, env=joined, capture_output=True, text=True, timeout=120)
        nodes, refused = seen.stdout.splitlines()[-2:]
        assert json.loads(nodes) == {
            "127.0.0.2": [0, "control-plane"],
            "127.0.0.3": [1, "control-plane"],
            "127.0.0.4": [1, "training"],
            "127.0.0.5": [1, "serving"],
        }, seen.stderr
        assert "ARKOR_RAY_PUBLIC_URL: the processes of node 127.0.0." in refused
        raylet = [b"--node_ip_address=127.0.0.4", f"--gcs-address={address}".encode()]
        (worker,) = (pid for pid, line in processes().items() if all(part in line.split(b"\0") for part in raylet))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: "Node 127.0.0.4 has ended" in log.read_text(), 60, "no word of the node", log.read_text)
        assert up.poll() is None, "the others go on"
        subprocess.run([*call, "down", f"--directory={directory}"], env=environment, check=True, timeout=60)
        assert up.wait(10) == 0
    finally:
        up.kill()
        up.wait()
    assert [line for line in processes().values() if address.encode() in line] == []


def processes() -> dict[int, bytes]:
    """Command lines by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "cmdline").exists():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:  # it ended while we looked
                continue
    return found
