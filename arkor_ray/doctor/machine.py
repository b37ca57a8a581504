"""The machine: shared memory, disks, open files."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from arkor_ray.doctor.findings import Finding, fail, ok, warning

GIB = 2**30
SHARED_MEMORY = 2 * GIB  # Ray's object store falls back to a disk below its own needs
DISK_WARNING, DISK_FAIL = 10 * GIB, 1 * GIB
OPEN_FILES = 8192


@dataclass(frozen=True)
class Machine:
    """`shared_memory` in bytes, None where the system has no /dev/shm; `disks`: free bytes by the folder's name;
    `open_files`: the limit of this process and the highest it may set."""

    shared_memory: int | None
    disks: Mapping[str, int]
    open_files: tuple[int, int]


def read_machine(folders: Mapping[str, Path]) -> Machine:
    """`folders` need not exist yet."""
    shm = Path("/dev/shm")
    return Machine(
        shared_memory=shutil.disk_usage(shm).free if shm.is_dir() else None,
        disks={f"{name} ({path})": shutil.disk_usage(nearest_existing(path)).free for name, path in folders.items()},
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
    )


def check_machine(machine: Machine) -> Iterator[Finding]:
    shared = machine.shared_memory
    if shared is not None and shared < SHARED_MEMORY:
        yield warning(
            "shared memory", f"{shared / GIB:.1f} GiB free in /dev/shm, so Ray keeps objects on disk, which is slow",
            "in a container, start it with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm)",
        )  # fmt: skip
    elif shared is not None:
        yield ok("shared memory", f"{shared / GIB:.1f} GiB free in /dev/shm")
    for name, free in machine.disks.items():
        said = f"{free / GIB:.1f} GiB free for {name}"
        remedy = "make room, or set ARKOR_RAY_DATA_DIR and ARKOR_RAY_CACHE_DIR to a larger disk"
        if free < DISK_FAIL:
            yield fail("disk", said, remedy)
        elif free < DISK_WARNING:
            yield warning("disk", said, remedy)
        else:
            yield ok("disk", said)
    soft, hard = machine.open_files
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        highest = "" if hard == resource.RLIM_INFINITY else f" (at most {hard})"
        remedy = f"ulimit -n 65536{highest} before `arkor-ray up` or `ray start`"
        yield warning("open files", f"at most {soft} per process; many streams and Ray's workers need more", remedy)
    else:
        yield ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft} per process")


def nearest_existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())
