"""Where checkpoints lie on a node's disk on their way to storage, and what dead processes left of them.

<scratch>/checkpoints/<job_id>.<random>/<adapter_id>/     one folder for each process that writes checkpoints
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

# What a failed job could not store is told with its place; after a weekend and a holiday it should still be there.
KEPT_SECONDS = 7 * 24 * 3600


class Spool:
    """A folder of this process alone, `path`, until it is left or the process ends; then it goes if it is empty.

    A lock tells that it is in use. An age would not: a process may stand still for hours and go on.
    """

    def __init__(self, scratch: Path, job_id: str) -> None:
        lock = None
        while lock is None:  # else a sweep came between
            self.path = _root(scratch) / f"{job_id}.{uuid.uuid4().hex[:12]}"
            self.path.mkdir(parents=True)
            lock = _lock(self.path)
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # not empty: kept
            self.path.rmdir()
        os.close(self._lock)


def remove_leftovers(scratch: Path, job_id: str) -> None:
    """Removes from this node what no process uses: all of `job_id`, which goes on from storage, and what is old of others."""
    oldest = time.time() - KEPT_SECONDS
    for folder in _root(scratch).glob("*.*"):
        try:
            if folder.name.split(".")[0] == job_id or folder.stat().st_mtime < oldest:
                _remove_unused(folder)
        except FileNotFoundError:
            continue  # another worker of the node came first
        except OSError as error:  # such as another user's: no reason not to train
            logger.warning("%s stays behind: %s", folder, error)


def _remove_unused(folder: Path) -> None:
    lock = _lock(folder)
    if lock is not None:
        logger.info("Removing %s, whose process is gone", folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _root(scratch: Path) -> Path:
    return scratch / "checkpoints"


def _lock(folder: Path) -> int | None:
    """The folder's lock, which lasts until it is closed; None when somebody else has it, or the folder is gone."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            return fd
    os.close(fd)
    return None
