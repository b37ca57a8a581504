"""Who holds a data directory, and what a killed instance leaves behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from arkor_ray import embedded
from arkor_ray.embedded import Instance, LocalRay, free_ports, read_instance
from arkor_ray.errors import ConflictError, InvalidRequestError, ServiceUnavailableError
from arkor_ray.settings import Settings


@pytest.fixture(autouse=True)
def environment_as_before():
    """LocalRay hands its settings on through this process's own variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_of_two_instances_in_one_data_directory_the_second_is_told_who_runs(tmp_path):
    with Instance(tmp_path) as first:
        first.announce("http://127.0.0.1:8000", metrics_url="http://127.0.0.1:8001/metrics")
        found = read_instance(tmp_path)
        assert (found["url"], found["metrics_url"]) == ("http://127.0.0.1:8000", "http://127.0.0.1:8001/metrics")
        with pytest.raises(ConflictError, match=r"arkor-ray down"), Instance(tmp_path):
            pass
    assert read_instance(tmp_path) is None


def test_the_file_of_a_killed_instance_counts_as_nobody(tmp_path):
    (tmp_path / "instance.json").write_text('{"pid": 1, "url": "http://127.0.0.1:8000"}')
    assert read_instance(tmp_path) is None
    with Instance(tmp_path):
        assert read_instance(tmp_path)["url"] is None


def test_a_taken_port_is_refused_before_anything_is_started(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match=f"--port {port}"):
            LocalRay(Settings.load(data_dir=tmp_path, port=port)).__enter__()


def test_free_ports_are_distinct_and_can_be_bound():
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_the_next_start_ends_what_a_killed_instance_left_and_nothing_else(tmp_path):
    last = Path(tempfile.mkdtemp(prefix="arkor-ray-"))
    other = Path(tempfile.mkdtemp(prefix="arkor-ray-"))
    left = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(d)]) for d in (last, other)]
    try:
        local = LocalRay(Settings.load(data_dir=tmp_path))
        (tmp_path / "ray-temp-dir").write_text(str(last))
        local._clear_last()
        assert left[0].wait(10) == -9
        assert left[1].poll() is None
        assert not last.exists()
        assert other.exists()
        assert not (tmp_path / "ray-temp-dir").exists()
        local._clear_last()  # nothing is left to clear
    finally:
        for process in left:
            process.kill()
            process.wait()
        other.rmdir()


def test_a_note_that_names_no_directory_of_ours_removes_nothing(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / "ray-temp-dir").write_text(str(precious))
    LocalRay(Settings.load(data_dir=tmp_path))._clear_last()
    assert precious.exists()


def test_roles_need_a_cluster(tmp_path):
    settings = Settings.load(data_dir=tmp_path, node_roles=True)
    with pytest.raises(InvalidRequestError, match="--ray-address"):
        LocalRay(settings)
    LocalRay(settings, address="127.0.0.1:1")


@pytest.mark.parametrize(
    ("address", "sentence"), [("nowhere", "write HOST:PORT"), ("127.0.0.1:{port}", "no Ray answers there")]
)
def test_a_ray_that_is_not_there_is_said_at_once(tmp_path, address, sentence):
    (port,) = free_ports(1)
    address = address.format(port=port)
    (own,) = free_ports(1)
    with pytest.raises((InvalidRequestError, ServiceUnavailableError), match=sentence):
        LocalRay(Settings.load(data_dir=tmp_path, port=own), address=address).__enter__()


def test_a_torch_for_cpus_leaves_the_gpus_out_and_says_so(tmp_path, monkeypatch, caplog):
    assert embedded._torch_uses_gpus(tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert embedded._torch_uses_gpus(tmp_path)
    assert not caplog.text
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not embedded._torch_uses_gpus(tmp_path)
    assert "everything runs on the CPU" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_is_told_before_anything_starts(host):
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match=f"--port {port} on {host}: "):
            embedded.check_free(host, port)
    embedded.check_free(host, port)


def test_leaving_a_ray_that_is_gone_asks_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("arkor_ray.service.stop", lambda **_: pytest.fail("it was asked to stop"))
    (port,) = free_ports(1)
    LocalRay(Settings.load(data_dir=tmp_path), address=f"127.0.0.1:{port}").__exit__(None, None, None)
