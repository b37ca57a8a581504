"""Folders of processes that live, stand still, or were killed; two of them are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arkor_ray.training.spool import KEPT_SECONDS, Spool, remove_leftovers

WRITER = """
import sys, time
from pathlib import Path
from arkor_ray.training.spool import Spool

spool = Spool(Path(sys.argv[1]), "job-1")
(spool.path / "job-1-step-2").mkdir()
print(spool.path, flush=True)
time.sleep(600)
"""


class Writer:
    """A process that has a checkpoint on its disk."""

    def __init__(self, scratch: Path) -> None:
        command = [sys.executable, "-c", WRITER, str(scratch)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.path = Path(self.process.stdout.readline().strip())

    def stand_still(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(tmp_path)
    yield made
    made.kill()
    assert made.process.stdout is not None
    made.process.stdout.close()


def leave_behind(scratch: Path, job_id: str, age: float = 0) -> Path:
    """What a process left that is gone since `age` seconds."""
    with Spool(scratch, job_id) as spool:
        (spool.path / "adapter").mkdir()
        (spool.path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    os.utime(spool.path, times=(time.time() - age,) * 2)
    return spool.path


def test_a_folder_that_was_emptied_goes_with_its_process_and_another_stays(tmp_path: Path) -> None:
    with Spool(tmp_path, "job-1") as empty, Spool(tmp_path, "job-1") as full:
        (full.path / "adapter").mkdir()
        assert empty.path != full.path
    assert not empty.path.exists()
    assert full.path.exists()


def test_what_earlier_attempts_of_the_job_left_is_removed(tmp_path: Path) -> None:
    left = [leave_behind(tmp_path, "job-1"), leave_behind(tmp_path, "job-1")]
    remove_leftovers(tmp_path, "job-1")
    assert not any(path.exists() for path in left)


def test_of_other_jobs_only_what_is_old_is_removed(tmp_path: Path) -> None:
    old, new = leave_behind(tmp_path, "job-2", KEPT_SECONDS + 60), leave_behind(tmp_path, "job-2", KEPT_SECONDS - 60)
    namesake = leave_behind(tmp_path, "job-1-b")
    remove_leftovers(tmp_path, "job-1")
    assert not old.exists()
    assert new.exists() and namesake.exists()


def test_a_folder_in_use_stays_however_old(tmp_path: Path) -> None:
    with Spool(tmp_path, "job-1") as ours, Spool(tmp_path, "job-2") as theirs:
        for spool in (ours, theirs):
            (spool.path / "adapter").mkdir()
            os.utime(spool.path, times=(1, 1))
        remove_leftovers(tmp_path, "job-1")
        assert ours.path.exists() and theirs.path.exists()
    remove_leftovers(tmp_path, "job-1")
    assert not ours.path.exists() and not theirs.path.exists()


def test_an_attempt_that_stands_still_keeps_its_folder_until_it_is_killed(tmp_path: Path, writer: Writer) -> None:
    writer.stand_still()
    remove_leftovers(tmp_path, "job-1")
    assert (writer.path / "job-1-step-2").exists()
    writer.kill()
    remove_leftovers(tmp_path, "job-1")
    assert not writer.path.exists()


def test_where_nothing_was_ever_spooled_there_is_nothing_to_remove(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "nothing", "job-1")
    assert not (tmp_path / "nothing").exists()
