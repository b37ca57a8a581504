"""For load balancers and people: is the process alive, and can it serve."""

from __future__ import annotations

from fastapi import APIRouter, Response

from arkor_ray.api.bodies import Health
from arkor_ray.api.deps import ServicesDep
from arkor_ray.api.readiness import OK

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Whether the process answers at all")
async def healthz() -> Health:
    return Health(status=OK)


@router.get("/readyz", summary="Whether the parts it needs answer; 503 with reasons if not")
async def readyz(services: ServicesDep, response: Response) -> Health:
    checks = await services.readiness.report()
    ready = all(state == OK for state in checks.values())
    response.status_code = 200 if ready else 503
    return Health(status=OK if ready else "unavailable", checks=checks)
