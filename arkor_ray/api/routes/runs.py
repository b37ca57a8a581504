"""What an endpoint was asked and what it answered: to look at, and to train on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from arkor_ray.api.bodies import RunList
from arkor_ray.api.deps import ProjectScope, ScopeDep, Services, ServicesDep
from arkor_ray.db import endpoints, runs
from arkor_ray.db.tables import RunRow
from arkor_ray.schemas.run import ConversationRow, Run

router = APIRouter(prefix="/v1/endpoints/{endpoint_id}/runs", tags=["runs"])

Limit = Annotated[int, Query(ge=1, le=200)]
Before = Annotated[str | None, Query(description="The id of the last run of the page before.")]


@router.get("", summary="List an endpoint's runs, newest first")
def list_runs(
    services: ServicesDep, scope: ScopeDep, endpoint_id: str, limit: Limit = 50, before: Before = None
) -> RunList:
    with services.db.read() as session:
        endpoint = endpoints.get(session, scope.project.id, endpoint_id)
        rows = runs.list_runs(session, endpoint.id, limit=limit, before=before)
        return RunList(runs=[_to_wire(row) for row in rows])


@router.get(
    "/export",
    summary="All runs as JSONL, oldest first: one conversation a line, as a job's data set has them",
    responses={200: {"content": {"application/jsonl": {}}}},
    response_class=Response,
)
def export_runs(services: ServicesDep, scope: ScopeDep, endpoint_id: str) -> Response:
    return StreamingResponse(
        _lines(services, _endpoint_id(services, scope, endpoint_id)), media_type="application/jsonl"
    )


def _endpoint_id(services: Services, scope: ProjectScope, endpoint_id: str) -> str:
    with services.db.read() as session:
        return endpoints.get(session, scope.project.id, endpoint_id).id


def _lines(services: Services, endpoint_id: str) -> Iterator[bytes]:
    for row in runs.every_run(services.db, endpoint_id):
        conversation = ConversationRow(messages=[*row.messages, row.answer])
        if row.tools:
            conversation.tools = row.tools
        yield json.dumps(conversation.to_wire(), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _to_wire(row: RunRow) -> Run:
    return Run(
        id=row.id,
        endpoint_id=row.endpoint_id,
        key_id=row.key_id,
        model=row.model,
        created_at=row.created_at,
        messages=row.messages,
        tools=row.tools,
        answer=row.answer,
        finish_reason=row.finish_reason,
        usage={
            "prompt_tokens": row.prompt_tokens,
            "completion_tokens": row.completion_tokens,
            "total_tokens": row.prompt_tokens + row.completion_tokens,
        },
        latency_ms=row.latency_ms,
        first_token_ms=row.first_token_ms,
        system_fingerprint=row.system_fingerprint,
    )
