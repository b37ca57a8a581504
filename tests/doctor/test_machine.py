from __future__ import annotations

import resource
from pathlib import Path

import pytest

from arkor_ray.doctor.findings import Status
from arkor_ray.doctor.machine import GIB, Machine, check_machine, read_machine

WELL = {"shared_memory": 8 * GIB, "disks": {"the cache": 100 * GIB}, "open_files": (65536, 65536)}


@pytest.mark.parametrize(
    ("changed", "status", "name"),
    [
        ({}, None, ""),
        ({"shared_memory": None}, None, ""),
        ({"open_files": (resource.RLIM_INFINITY, resource.RLIM_INFINITY)}, None, ""),
        ({"shared_memory": 64 * 2**20}, Status.WARNING, "shared memory"),
        ({"disks": {"the cache": 5 * GIB}}, Status.WARNING, "disk"),
        ({"disks": {"the cache": GIB // 2}}, Status.FAIL, "disk"),
        ({"open_files": (1024, 4096)}, Status.WARNING, "open files"),
    ],
)
def test_what_is_too_little_is_told_with_a_remedy(changed, status, name):
    bad = [f for f in check_machine(Machine(**{**WELL, **changed})) if f.status is not Status.OK]
    assert [(f.status, f.name) for f in bad] == ([(status, name)] if status else [])
    assert all(f.remedy for f in bad)


def test_this_machine_can_be_read_before_anything_was_made(tmp_path: Path):
    machine = read_machine({"data": tmp_path / "not" / "there"})
    (free,) = machine.disks.values()
    assert free > 0
    assert machine.open_files[0] > 0
    assert list(tmp_path.iterdir()) == []
