"""cluster/local_nodes.py without starting Ray."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from arkor_ray.embedded import Instance
from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.settings import Settings
from tests.deploy.files import CLUSTER


@pytest.fixture(scope="module")
def local_nodes():
    spec = importlib.util.spec_from_file_location("local_nodes", CLUSTER / "local_nodes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_nodes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["local_nodes"]


def test_the_head_listens_and_the_others_join_it_by_addresses_of_their_own(local_nodes, tmp_path):
    head = local_nodes._start_command(local_nodes.Node("127.0.0.2", 0), "127.0.0.2:7000", tmp_path, head=True)
    assert {"--head", "--port=7000", "--num-cpus=0", "--dashboard-host=127.0.0.2"} <= set(head)
    assert not any(argument.startswith("--labels") for argument in head)
    node = local_nodes.Node("127.0.0.3", 2, "training")
    worker = local_nodes._start_command(node, "127.0.0.2:7000", tmp_path, head=False)
    wanted = {
        "--address=127.0.0.2:7000",
        "--node-ip-address=127.0.0.3",
        "--num-cpus=2",
        "--labels=arkor-ray/role=training",
    }
    assert wanted <= set(worker)
    assert "--head" not in worker


def test_the_token_is_new_each_time_and_for_its_owner_alone(local_nodes, tmp_path):
    first, second = (local_nodes._environment(tmp_path, with_roles=False) for _ in range(2))
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert first["RAY_AUTH_MODE"] == "token"
    file = local_nodes._write_environment(tmp_path, first)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first.items() <= sourced_environment(file).items()


def test_a_node_that_does_not_start_is_told_with_what_it_said_and_nothing_is_left(local_nodes, tmp_path, monkeypatch):
    program = "import sys, time; print('no such option'); sys.exit(2)"
    monkeypatch.setattr(local_nodes, "_start_command", lambda *a, **k: [sys.executable, "-c", program])
    nodes = [local_nodes.Node("127.0.0.2", 0)]
    with (
        pytest.raises(ServiceUnavailableError, match=r"(?s)127\.0\.0\.2\.log ends with:.*no such option"),
        local_nodes.running_nodes(tmp_path, nodes, 7000, {}),
    ):
        pass


def test_every_node_is_ended_also_one_that_ignores_it(local_nodes, tmp_path, monkeypatch):
    def command(node, gcs, temp_dir, *, head):
        deaf = "" if head else "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        program = f"import signal, time; {deaf} print('Ray runtime started', flush=True); time.sleep(60)"
        return [sys.executable, "-c", program, str(temp_dir)]

    monkeypatch.setattr(local_nodes, "_start_command", command)
    monkeypatch.setattr(local_nodes, "STOP_TIMEOUT_S", 0.5)
    nodes = [local_nodes.Node(f"127.0.0.{i}", 1) for i in (2, 3)]
    with local_nodes.running_nodes(tmp_path, nodes, 7000, {}) as processes:
        assert all(process.poll() is None for process in processes)
    assert [process.wait(10) for process in processes] == [-15, -9]


def test_a_fresh_terminal_gets_every_setting_that_the_nodes_were_started_with(local_nodes, tmp_path, monkeypatch):
    settings = {"ARKOR_RAY_DATABASE_URL": "postgresql://me:it's a $secret@host/db", "ARKOR_RAY_NODE_ROLES": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    file = local_nodes._write_environment(tmp_path, local_nodes._environment(tmp_path, with_roles=False))
    sourced = sourced_environment(file)
    assert sourced["ARKOR_RAY_DATABASE_URL"] == settings["ARKOR_RAY_DATABASE_URL"]
    assert sourced["ARKOR_RAY_NODE_ROLES"] == "0", "what the command line says goes before it"


def sourced_environment(file: Path) -> dict[str, str]:
    """The variables of a new shell that has read the file."""
    command = ["bash", "-c", f"set -a; . {file}; env"]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


class FakeProcess:
    """Of a node; runs until it is told otherwise."""

    args = ("ray", "start", "--temp-dir=/tmp/a b")
    returncode: int | None = None

    def end(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int | None:
        return self.returncode


def test_the_others_go_on_when_a_node_ends_and_end_with_the_head(local_nodes, tmp_path, monkeypatch, capsys):
    running = {local_nodes.Node(f"127.0.0.{i}", 1): FakeProcess() for i in (2, 3, 4)}
    head, first, second = running.values()
    story = iter([lambda: first.end(1), lambda: None, lambda: second.end(-9), lambda: head.end(-15)])
    monkeypatch.setattr(local_nodes.time, "sleep", lambda seconds: next(story)())
    with pytest.raises(
        ServiceUnavailableError, match=r"The head 127\.0\.0\.2 has ended \(signal SIGTERM\); its log is"
    ):
        local_nodes._watch(tmp_path, running)
    told = capsys.readouterr().out
    assert told.count("has ended") == 2
    assert f"Node 127.0.0.3 has ended (exit code 1); its log is {tmp_path}/127.0.0.3.log" in told
    assert f"(set -a; . {tmp_path}/environment; ray start '--temp-dir=/tmp/a b')" in told
    assert "Node 127.0.0.4 has ended (signal SIGKILL)" in told


def test_the_service_gets_the_demo_base_model_where_nobody_names_others(local_nodes, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "demo-base"
    monkeypatch.setattr(local_nodes, "find_demo_base", lambda cache: folder if folder.exists() else None)
    monkeypatch.setattr(local_nodes, "ensure_demo_base", lambda cache: folder.mkdir(exist_ok=True) or folder)
    monkeypatch.delenv("ARKOR_RAY_CATALOGUE", raising=False)
    monkeypatch.setenv("ARKOR_RAY_MODELS", "")
    for made_before in (False, True):
        assert local_nodes._demo_model(Settings.load()) == {"ARKOR_RAY_MODELS": f"arkor-ray/demo-base={folder}"}
        told = capsys.readouterr().out
        assert ("Making the demo base model" in told) is not made_before
        assert "The service gets the base model arkor-ray/demo-base" in told
    monkeypatch.setenv("ARKOR_RAY_MODELS", "house=owner/base")
    assert local_nodes._demo_model(Settings.load()) == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["up", "--num-nodes", "1"], "--num-nodes must be 2"), (["up", "--num-nodes", "3", "--roles"], "must be 4")],
)
def test_too_few_nodes_are_refused(local_nodes, arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local_nodes.py", *arguments])
    with pytest.raises(SystemExit):
        local_nodes.main()
    assert sentence in capsys.readouterr().err


def test_down_says_when_there_is_nothing_and_when_it_cannot_yet(local_nodes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local_nodes.py", "down", "--directory", str(tmp_path)])
    assert local_nodes.main() == 0
    assert "No nodes run" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["local_nodes.py", "up", "--directory", str(tmp_path)])
    with Instance(tmp_path):
        assert local_nodes.main() == 1
    assert "already runs" in capsys.readouterr().err
