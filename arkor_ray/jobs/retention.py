"""What may go from storage: a pure function of a folder's objects and what the database says about their job.

Whoever writes to storage is younger than the ages below, or belongs to a job that has not ended. So nothing that is being
written is ever taken for garbage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from arkor_ray.storage import ObjectInfo
from arkor_ray.storage.layout import Folder, Kind

# Younger objects are never touched, whatever the database says.
SAFETY_AGE = timedelta(hours=1)
# What nobody finished is nobody's work any more.
LEFTOVER_AGE = timedelta(days=1)


class Garbage(StrEnum):
    """Why something may go, as it is shown."""

    RESUME_STATE = "resume states of ended jobs"
    DATASET = "data of ended jobs"
    ADAPTER = "old adapters of ended jobs"
    UNCOMMITTED = "checkpoints never finished"
    UPLOAD = "uploads never finished"
    LOG = "old logs of ended jobs"
    PROBE = "leftovers of checks"
    UNKNOWN_JOB = "folders of unknown jobs"


@dataclass(frozen=True)
class Limits:
    """How long an ended job's things are kept; `adapter_age` is for its logs too, None: for ever."""

    resume_age: timedelta
    adapter_age: timedelta | None = None


@dataclass(frozen=True)
class Facts:
    """What is known about a folder besides its objects.

    `known`: the database has its job. `standalone`: the job was run without the service. `ended`: when it ended for good
    (`db.jobs.ends`). `committed`: its checkpoint has a manifest. `pinned`: its adapter stays whatever its age
    (`db.checkpoints.kept`).
    """

    known: bool
    standalone: bool = False
    ended: datetime | None = None
    committed: bool = False
    pinned: bool = False


def decide(
    folder: Folder, objects: Sequence[ObjectInfo], facts: Facts, now: datetime, limits: Limits
) -> Garbage | None:
    """Why the whole folder may go, None if it stays. `now` is by the clock of the store; there is at least one object."""
    idle = now - max(info.modified for info in objects)
    if idle < SAFETY_AGE:
        return None
    if folder.kind is Kind.PROBE:
        return Garbage.PROBE if idle >= LEFTOVER_AGE else None
    if folder.kind is Kind.JOB or facts.standalone:
        return None
    if not facts.known:
        return Garbage.UNKNOWN_JOB if idle >= LEFTOVER_AGE else None
    if facts.ended is None:
        return None
    age = now - facts.ended
    if folder.kind is Kind.DATASET:
        return Garbage.DATASET if age >= limits.resume_age else None
    if folder.kind is Kind.LOG:
        return Garbage.LOG if limits.adapter_age is not None and age >= limits.adapter_age else None
    if not facts.committed:
        return Garbage.UNCOMMITTED if idle >= LEFTOVER_AGE else None
    if folder.kind is Kind.RESUME:
        return Garbage.RESUME_STATE if age >= limits.resume_age else None
    if folder.step is None or facts.pinned or limits.adapter_age is None:
        return None
    return Garbage.ADAPTER if age >= limits.adapter_age else None
