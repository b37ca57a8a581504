from __future__ import annotations

import subprocess
import sys

import pytest

from arkor_ray.cli.child_service import ChildService
from arkor_ray.errors import ServiceUnavailableError

READY = "import sys, time; print('making the base'); print('arkor-ray is ready at http://127.0.0.1:1', flush=True); "


def child(tmp_path, code):
    service = ChildService(tmp_path / "data", aliases=["a=b"], environment={"X": "1"})
    assert service._command[2:4] == ["arkor_ray.cli.main", "up"] and service._command[-2:] == ["--alias", "a=b"]
    service._command = [sys.executable, "-c", code]
    return service


def test_it_is_there_while_the_block_runs_and_ended_after_it(tmp_path, capsys):
    with child(tmp_path, READY + "print('noise', flush=True); time.sleep(600)") as service:
        assert service.url == "http://127.0.0.1:1"
        assert service._process.poll() is None
    assert service._process.returncode is not None
    assert "making the base" in capsys.readouterr().out


def test_one_that_ends_at_once_is_an_error_with_its_last_words(tmp_path):
    with (
        pytest.raises(ServiceUnavailableError, match="port is taken"),
        child(tmp_path, "raise SystemExit('port is taken')"),
    ):
        pass


def test_one_that_ignores_the_signal_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("arkor_ray.cli.child_service.STOP_TIMEOUT_S", 0.2)
    with child(tmp_path, "import signal; signal.signal(15, signal.SIG_IGN); " + READY + "time.sleep(600)") as service:
        pass
    assert service._process.returncode == -9


def test_an_error_in_the_block_ends_it_too(tmp_path):
    with pytest.raises(KeyError), child(tmp_path, READY + "time.sleep(600)") as service:
        raise KeyError
    assert isinstance(service._process, subprocess.Popen) and service._process.returncode is not None
