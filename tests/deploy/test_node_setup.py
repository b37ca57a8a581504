"""What `ray up` runs on a machine, against programs that only write down how they were called."""

from __future__ import annotations

import configparser
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.deploy.files import CLUSTER, ROOT

AUTOSCALER = {
    "RAY_HEAD_IP": "10.0.0.1",
    "RAY_OVERRIDE_RESOURCES": '{"CPU":48,"GPU":4}',
    "RAY_OVERRIDE_LABELS": '{"arkor-ray/role":"training"}',
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": "i-0123",
}


@pytest.fixture
def home(tmp_path):
    for name, body in {
        "uv": "",
        "sudo": f'if [ "$1" = tee ]; then cat >"{tmp_path}/unit"; fi',
        "python": "cat >/dev/null",
        "ray": f'env >"{tmp_path}/ray.env"',
    }.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/calls"\n{body}\n')
        program.chmod(0o755)
    (tmp_path / "arkor.env").write_text(
        "RAY_AUTH_TOKEN=0123\nARKOR_RAY_DATABASE_URL=postgresql://db/arkor\nARKOR_RAY_STORAGE_URL=s3://b/p\n"
        "ARKOR_RAY_MODELS=Qwen/Qwen3-0.6B\n"
    )
    return tmp_path


def run(home: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(home)}
    command = [CLUSTER / script, *arguments]
    return subprocess.run(command, env=path | environment, cwd=home, capture_output=True, text=True, timeout=60)


def test_a_machine_gets_the_extras_of_its_role_in_the_tested_versions_and_the_unit(home):
    done = run(home, "setup_node.sh", "server,train", "google-api-python-client")
    assert done.returncode == 0, done.stderr
    calls = (home / "calls").read_text().splitlines()
    assert f"uv venv --python 3.11 {home}/arkor-venv" in calls
    install = f"uv pip install --python {home}/arkor-venv --constraint {ROOT}/constraints.txt {ROOT}[server,train]"
    assert f"{install} google-api-python-client" in calls
    assert calls[-2:] == ["sudo systemctl daemon-reload", "sudo systemctl enable arkor-ray"]
    assert stat.S_IMODE((home / "arkor.env").stat().st_mode) == 0o600
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string((home / "unit").read_text())
    assert "@" not in (home / "unit").read_text()
    assert unit["Service"]["WorkingDirectory"] == str(home)
    assert unit["Service"]["Restart"] == "always"


def test_a_machine_without_settings_is_not_set_up(home):
    (home / "arkor.env").unlink()
    done = run(home, "setup_node.sh", "all")
    assert done.returncode == 78
    assert "arkor.env is missing" in done.stderr
    assert not (home / "calls").exists()


def test_what_the_autoscaler_says_reaches_ray_also_after_a_reboot(home):
    done = run(home, "start_node.sh", "worker", "--num-gpus=4", **AUTOSCALER, ARKOR_RAY_NODE_ROLES="1", OTHER="x")
    assert done.returncode == 0, done.stderr
    assert (home / "calls").read_text() == "sudo systemctl restart arkor-ray\n"
    assert "OTHER" not in (home / "node.env").read_text()
    assert stat.S_IMODE((home / "node.env").stat().st_mode) == 0o600
    # As the unit does, which has none of these variables.
    run(home, "node.sh", *(home / "node.args").read_text().split())
    seen = dict(line.split("=", 1) for line in (home / "ray.env").read_text().splitlines() if "=" in line)
    assert AUTOSCALER.items() <= seen.items()
    assert seen["ARKOR_RAY_NODE_ROLES"] == "1"
    assert (
        "ray start --block --address=10.0.0.1:6379 --metrics-export-port=8080 --num-gpus=4"
        in (home / "calls").read_text()
    )


def test_the_scripts_can_be_run():
    for script in ("node.sh", "setup_node.sh", "start_node.sh"):
        assert os.access(CLUSTER / script, os.X_OK)
