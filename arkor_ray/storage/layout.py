"""Every key of the service. Nobody else puts a key together.

adapters/<job_id>-step-<n>/       a PEFT folder for each checkpoint; manifest.json comes last and makes it one
adapters/<job_id>-final/          the same for the finished job
resume/<job_id>/step-<00000000>/  what training needs to go on from that step
datasets/<job_id>/                rows that came with the job
jobs/<job_id>/config.json         what a job that no database knows was asked for

Keys are made of ids, never of names that a user chose. An id that is not made of letters, digits and dashes raises
`ValueError`.
"""

from __future__ import annotations

import re

MANIFEST_NAME = "manifest.json"

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


def _checked_id(value: str) -> str:
    if not _ID.fullmatch(value):
        raise ValueError(f"{value!r} is no id: only letters, digits and dashes may stand in a key.")
    return value


def _checked_step(step: int) -> int:
    if step < 0:
        raise ValueError(f"{step} is no step: steps count from 0.")
    return step
