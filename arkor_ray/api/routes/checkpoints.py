"""Checkpoints of a job: which there are, what is in them, and their files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse

from arkor_ray.api.bodies import CheckpointDetail, CheckpointList
from arkor_ray.api.deps import CallerDep, ScopeDep, Services, ServicesDep
from arkor_ray.db import checkpoints, identities, projects
from arkor_ray.db.tables import CheckpointRow
from arkor_ray.errors import NotFoundError
from arkor_ray.jobs import service
from arkor_ray.jobs.artifacts import artifacts
from arkor_ray.schemas.checkpoint import Checkpoint, CheckpointManifest, ManifestFile
from arkor_ray.storage import layout

router = APIRouter(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"])

CHUNK_BYTES = 1 << 20


@router.get("", summary="List a job's checkpoints by step, the final adapter last")
def list_checkpoints(services: ServicesDep, scope: ScopeDep, job_id: str) -> CheckpointList:
    with services.db.read() as session:
        job = service.find(session, scope.project.id, job_id)
        rows = checkpoints.list_for_job(session, job.id)
        return CheckpointList(checkpoints=[_to_wire(services.settings.api_url, row) for row in rows])


@router.get("/{ref}", summary="Get a checkpoint and its manifest; ref is a step or `final`")
def get_checkpoint(services: ServicesDep, scope: ScopeDep, job_id: str, ref: str) -> CheckpointDetail:
    with services.db.read() as session:
        row = service.find_checkpoint(session, service.find(session, scope.project.id, job_id), ref)
        return CheckpointDetail(checkpoint=_to_wire(services.settings.api_url, row), manifest=_manifest(row))


def downloadable(
    services: ServicesDep,
    caller: CallerDep,
    job_id: str,
    ref: str,
    org_slug: Annotated[str | None, Query(alias="orgSlug")] = None,
    project_slug: Annotated[str | None, Query(alias="projectSlug")] = None,
) -> CheckpointManifest:
    """The manifest. The scope may be left out, since the URLs in events are those of the files alone."""
    with services.db.read() as session:
        if org_slug is None and project_slug is None:
            job = service.find_as_member(session, caller.identity_id, job_id)
        else:
            org = identities.member_org(session, caller.identity_id, org_slug or "")
            job = service.find(session, projects.find(session, org.id, project_slug or "").id, job_id)
        return _manifest(service.find_checkpoint(session, job, ref))


@router.get(
    "/{ref}/files/{path:path}",
    summary="Download one file of an adapter",
    responses={200: {"content": {"application/octet-stream": {}}}},
    response_class=Response,
)
def get_file(
    services: ServicesDep, manifest: Annotated[CheckpointManifest, Depends(downloadable)], path: str
) -> Response:
    file = next((file for file in manifest.files if file.path == path), None)
    if file is None:
        raise NotFoundError(f"The checkpoint has no file {path[:200]!r}; its manifest lists those it has")
    return StreamingResponse(
        _chunks(_fetch(services, manifest.adapter_id, file)),
        media_type="application/octet-stream",
        headers={"Content-Length": str(file.size_bytes), "ETag": f'"{file.sha256}"'},
    )


def _fetch(services: Services, adapter_id: str, file: ManifestFile) -> IO[bytes]:
    """The file's content, on local disk under no name: whatever ends the download also frees the space."""
    with tempfile.TemporaryDirectory(prefix="arkor-download-") as folder:
        local = Path(folder) / "file"
        services.store.get_file(layout.adapter_prefix(adapter_id) + file.path, local)
        return local.open("rb")


def _chunks(content: IO[bytes]) -> Iterator[bytes]:
    with content:
        while chunk := content.read(CHUNK_BYTES):
            yield chunk


def _manifest(row: CheckpointRow) -> CheckpointManifest:
    return CheckpointManifest.model_validate(row.manifest)


def _to_wire(api_url: str, row: CheckpointRow) -> Checkpoint:
    manifest = _manifest(row)
    return Checkpoint(
        job_id=row.job_id,
        step=row.step,
        kind="final" if row.final else "checkpoint",
        adapter_id=row.adapter_id,
        manifest_sha256=row.manifest_sha256,
        ready=row.ready,
        created_at=row.created_at,
        metrics=manifest.metrics,
        artifacts=artifacts(api_url, manifest),
    )
