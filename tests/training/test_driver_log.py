"""The copy of what a driver printed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from arkor_ray.errors import ObjectNotFoundError, StorageError
from arkor_ray.storage.local import LocalStore
from arkor_ray.training import driver_log
from arkor_ray.training.driver_log import DriverLog

KEY = "logs/job/attempt-1.log"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "driver.log"
    path.write_text("one\n")
    return path


def test_it_is_copied_now_and_then_and_at_the_end(store, file, monkeypatch):
    monkeypatch.setattr(driver_log, "PERIOD_S", 0.01)
    with DriverLog(store, KEY, file):
        for text in ("one\n", "one\ntwo\n"):
            file.write_text(text)
            deadline = time.monotonic() + 60
            while _copied(store) != text.encode():
                assert time.monotonic() < deadline, "it was not copied"
                time.sleep(0.01)
        monkeypatch.setattr(driver_log, "PERIOD_S", 60)
        file.write_text("one\ntwo\nlast\n")
    assert _copied(store) == b"one\ntwo\nlast\n"


def test_of_a_long_one_the_newest_lines_are_kept(store, file, monkeypatch):
    monkeypatch.setattr(driver_log, "KEPT_BYTES", 10)
    file.write_text("first\nsecond\nthird\n")
    with DriverLog(store, KEY, file):
        pass
    assert _copied(store) == b"... the first 13 bytes are left out\nthird\n"


def test_an_error_of_the_job_does_not_keep_its_log_from_being_stored(store, file):
    with pytest.raises(RuntimeError), DriverLog(store, KEY, file):
        raise RuntimeError("lost")
    assert _copied(store) == b"one\n"


def test_storage_that_is_away_disturbs_nobody(store, file, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise StorageError("storage is down")

    monkeypatch.setattr(store, "put", refuse)
    with DriverLog(store, KEY, file):
        pass
    assert "storage is down" in caplog.text


def test_the_file_is_the_one_that_standard_output_goes_to(tmp_path):
    program = "from arkor_ray.training import driver_log; print(driver_log._stdout_file())"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, timeout=60)
    assert (tmp_path / "out").read_text().strip() == str(tmp_path / "out")
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert piped.stdout.strip() == "None"


def _copied(store: LocalStore) -> bytes | None:
    try:
        return store.get(KEY)
    except ObjectNotFoundError:
        return None
