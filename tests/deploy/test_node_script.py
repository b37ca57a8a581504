"""node.sh against programs that only write down how they were called."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.files import CLUSTER, variables

FILLED = {
    "RAY_AUTH_TOKEN": "0123",
    "ARKOR_RAY_DATABASE_URL": "postgresql://me:$(touch harm)&'\"@db/arkor",
    "ARKOR_RAY_STORAGE_URL": "s3://bucket/arkor",
    "ARKOR_RAY_MODELS": "Qwen/Qwen3-0.6B",
}


class Node:
    """node.sh with stand-ins for `ray`, `serve` and `python`, which are taken from the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program("python", "cat >/dev/null")
        self.program("ray", "sleep 0.5; exit 3")
        self.program("serve", "")

    def program(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(
            f'#!/bin/bash\necho "{name} $*" >>"{self.folder}/calls"\nenv >"{self.folder}/{name}.env"\n{body}\n'
        )
        path.chmod(0o755)

    def environment_file(self, **values: str) -> None:
        text = "# a comment\n\n" + "".join(f"{name}={value}\n" for name, value in (FILLED | values).items())
        (self.folder / "arkor.env").write_text(text)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        base = {"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(self.folder)}
        files = f"{self.folder}/arkor.env {self.folder}/none.env"
        return subprocess.run(
            [CLUSTER / "node.sh", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=60,
            env={**base, "ENVIRONMENT_FILES": files, **environment},
        )  # fmt: skip

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def seen_by(self, name: str) -> dict[str, str]:
        return dict(
            line.split("=", 1) for line in (self.folder / f"{name}.env").read_text().splitlines() if "=" in line
        )


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    node.environment_file()
    return node


@pytest.mark.parametrize("name", FILLED)
def test_what_is_not_filled_in_ends_the_start_with_its_name(node, name):
    node.environment_file(**{name: ""})
    ended = node.run("head")
    assert (ended.returncode, node.calls()) == (78, [])
    assert f"{name} is empty" in ended.stderr


def test_a_catalogue_may_take_the_place_of_models(node):
    node.environment_file(ARKOR_RAY_MODELS="", ARKOR_RAY_CATALOGUE="/etc/arkor/catalogue.yaml")
    assert node.run("worker", RAY_HEAD_IP="10.0.0.1").returncode == 3


def test_the_example_as_it_is_starts_nothing(node):
    node.environment_file(**variables(CLUSTER / "arkor.env.example"))
    assert node.run("head").returncode == 78


def test_settings_that_cannot_work_end_the_start(node):
    node.program("python", "echo sentence >&2; exit 1")
    ended = node.run("worker", RAY_HEAD_IP="10.0.0.1")
    assert ended.returncode == 78
    assert "sentence" in ended.stderr
    assert [call.split()[0] for call in node.calls()] == ["python"]


def test_values_are_taken_as_they_are_written(node):
    node.run("head")
    seen = node.seen_by("ray")
    assert seen["ARKOR_RAY_DATABASE_URL"] == FILLED["ARKOR_RAY_DATABASE_URL"]
    assert (seen["RAY_AUTH_MODE"], seen["ARKOR_RAY_CLUSTER"], seen["ARKOR_RAY_ANONYMOUS"]) == ("token", "1", "0")
    assert Path(seen["ARKOR_RAY_DATA_DIR"]).is_absolute()
    assert not (node.folder / "harm").exists()


def test_the_head_deploys_the_service_and_ends_with_ray(node):
    node.program("serve", f"cd {node.folder}; [ -e tried ] && touch deployed || {{ touch tried; exit 1; }}")
    node.program("ray", f"until [ -e {node.folder}/deployed ]; do sleep 0.1; done; exit 3")
    ended = node.run("head", "--num-cpus=0", SERVE_CONFIG="/some/config.yaml")
    assert ended.returncode == 3, ended.stderr
    ray = "ray start --head --block --port=6379 --dashboard-host=0.0.0.0 --metrics-export-port=8080 --num-cpus=0"
    serve = "serve deploy /some/config.yaml --address http://127.0.0.1:8265"
    assert sorted(node.calls()[1:]) == [ray, serve, serve], "once more, as it failed the first time"


def test_a_head_without_ray_does_not_go_on_deploying(node):
    node.program("ray", "exit 1")
    node.program("serve", "exit 1")
    ended = node.run("head")
    assert ended.returncode == 78
    assert "serving/config.yaml could not be deployed" in ended.stderr


def test_a_worker_joins_the_head_and_must_be_told_where_it_is(node):
    assert "RAY_HEAD_IP" in node.run("worker").stderr
    assert node.run("worker", RAY_HEAD_IP="10.0.0.1").returncode == 3
    assert node.calls()[-1] == "ray start --block --address=10.0.0.1:6379 --metrics-export-port=8080"


def test_it_asks_for_a_role(node):
    ended = node.run()
    assert ended.returncode == 78
    assert "say head, worker or exec" in ended.stderr


def test_a_command_is_given_the_settings_of_the_node(node):
    (node.folder / "arkor-venv" / "bin").mkdir(parents=True)
    (node.folder / "arkor-venv" / "bin" / "arkor-ray").symlink_to("/usr/bin/env")
    said = node.run("exec", "arkor-ray").stdout.splitlines()
    assert f"ARKOR_RAY_DATABASE_URL={FILLED['ARKOR_RAY_DATABASE_URL']}" in said
    assert "ARKOR_RAY_CLUSTER=1" in said
