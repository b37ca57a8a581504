"""Every key of the service. Nobody else puts a key together.

adapters/<job_id>-step-<n>/       a PEFT folder for each checkpoint; manifest.json comes last and makes it one
adapters/<job_id>-final/          the same for the finished job
resume/<job_id>/step-<00000000>/  what training needs to go on from that step; state.json comes last
datasets/<job_id>/                rows that came with the job; index.json comes last
logs/<job_id>/attempt-<n>.log     what the attempt's driver and workers printed
doctor/<id>/                      what `arkor-ray doctor` writes and removes
jobs/<job_id>/config.json         what a job that no database knows was asked for

Keys are made of ids, never of names that a user chose. An id that is not made of letters, digits and dashes raises
`ValueError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

# Written last and deleted first: without it the rest of its folder counts for nothing.
MANIFEST_NAME = "manifest.json"
RESUME_INDEX_NAME = "state.json"
DATASET_INDEX_NAME = "index.json"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}")
_ADAPTER_ID = re.compile(r"(?P<job_id>[A-Za-z0-9][A-Za-z0-9-]{0,99}?)-(?:step-(?P<step>0|[1-9][0-9]*)|final)")


def adapter_id(job_id: str, step: int) -> str:
    """The adapter of the checkpoint after update `step`, which counts from 1 (0: before training)."""
    return f"{_checked_id(job_id)}-step-{_checked_step(step)}"


def final_adapter_id(job_id: str) -> str:
    return f"{_checked_id(job_id)}-final"


def parse_adapter_id(adapter_id: str) -> tuple[str, int | None]:
    """The job and the step of an adapter, None for the final one."""
    match = _ADAPTER_ID.fullmatch(adapter_id)
    if match is None:
        raise ValueError(f"{adapter_id!r} is no adapter id: write <job_id>-step-<n> or <job_id>-final.")
    return match["job_id"], None if match["step"] is None else int(match["step"])


def adapter_prefix(adapter_id: str) -> str:
    parse_adapter_id(adapter_id)
    return f"adapters/{adapter_id}/"


def manifest_key(adapter_id: str) -> str:
    return adapter_prefix(adapter_id) + MANIFEST_NAME


def probe_key() -> str:
    """Of no job. Whether it is there does not matter: asking shows that the store answers."""
    return manifest_key(final_adapter_id("readyz"))


def job_adapters_prefix(job_id: str) -> str:
    """Begins the keys of all adapters of a job, and of no other job as long as ids are of one length."""
    return f"adapters/{_checked_id(job_id)}-"


def resume_root(job_id: str) -> str:
    return f"resume/{_checked_id(job_id)}/"


def resume_prefix(job_id: str, step: int) -> str:
    """Steps are padded so that a listing is in their order."""
    return f"{resume_root(job_id)}step-{_checked_step(step):08d}/"


def dataset_prefix(job_id: str) -> str:
    return f"datasets/{_checked_id(job_id)}/"


def job_config_key(job_id: str) -> str:
    return f"jobs/{_checked_id(job_id)}/config.json"


def shared_probe_key(token: str) -> str:
    """Of no job: written by one node for the others to look for."""
    return f"probes/{_checked_id(token)}"


def log_key(job_id: str, attempt: int) -> str:
    return f"logs/{_checked_id(job_id)}/attempt-{_checked_step(attempt)}.log"


def doctor_prefix(run_id: str) -> str:
    return f"doctor/{_checked_id(run_id)}/"


class Kind(StrEnum):
    ADAPTER = "adapter"
    RESUME = "resume"
    DATASET = "dataset"
    LOG = "log"
    JOB = "job"
    PROBE = "probe"


@dataclass(frozen=True)
class Folder:
    """What a key belongs to. `step` is None for a final adapter, and for what has none."""

    prefix: str
    kind: Kind
    job_id: str  # "" for what is of no job
    step: int | None
    last_written: str  # a name, "" where the order does not matter


_FOLDERS = (
    (Kind.ADAPTER, rf"adapters/{_ADAPTER_ID.pattern}/", MANIFEST_NAME),
    (Kind.RESUME, rf"resume/(?P<job_id>{_ID.pattern})/step-(?P<step>[0-9]{{8,}})/", RESUME_INDEX_NAME),
    (Kind.DATASET, rf"datasets/(?P<job_id>{_ID.pattern})/", DATASET_INDEX_NAME),
    (Kind.LOG, rf"logs/(?P<job_id>{_ID.pattern})/", ""),
    (Kind.JOB, rf"jobs/(?P<job_id>{_ID.pattern})/", ""),
    (Kind.PROBE, rf"doctor/{_ID.pattern}/", ""),
    (Kind.PROBE, r"probes/", ""),
)


def folder_of(key: str) -> Folder | None:
    """The folder that a key of ours is in, at any depth; None for a key that this module did not make."""
    for kind, pattern, last_written in _FOLDERS:
        match = re.match(pattern, key)
        if match is not None and match.end() < len(key):
            found = match.groupdict()
            step = found.get("step")
            return Folder(match[0], kind, found.get("job_id", ""), None if step is None else int(step), last_written)
    return None


def _checked_id(value: str) -> str:
    if not _ID.fullmatch(value):
        raise ValueError(f"{value!r} is no id: only letters, digits and dashes may stand in a key.")
    return value


def _checked_step(step: int) -> int:
    if step < 0:
        raise ValueError(f"{step} is no step: steps count from 0.")
    return step
