"""Publishing adapters and base models as endpoints, and the keys that open them. The wire says deployment."""

from __future__ import annotations

from fastapi import APIRouter

from arkor_ray.api import endpoint_service as service
from arkor_ray.api.bodies import EndpointAnswer, EndpointKeyAnswer, EndpointKeyList, EndpointList
from arkor_ray.api.deps import ScopeDep, ServicesDep
from arkor_ray.api.request_body import StrictJsonRoute
from arkor_ray.schemas.endpoint import EndpointCreate, EndpointKeyCreate, EndpointPatch

router = APIRouter(prefix="/v1/endpoints", tags=["endpoints"], route_class=StrictJsonRoute)


@router.get("", summary="List all endpoints of a project, newest first")
def list_endpoints(services: ServicesDep, scope: ScopeDep) -> EndpointList:
    return EndpointList(endpoints=service.list_endpoints(services, scope))


@router.post("", status_code=201, summary="Publish an adapter or a base model; answers once serving has it")
async def create_endpoint(services: ServicesDep, scope: ScopeDep, body: EndpointCreate) -> EndpointAnswer:
    return EndpointAnswer(endpoint=await service.create(services, scope, body))


@router.get("/{endpoint_id}", summary="Get an endpoint")
def get_endpoint(services: ServicesDep, scope: ScopeDep, endpoint_id: str) -> EndpointAnswer:
    return EndpointAnswer(endpoint=service.get(services, scope, endpoint_id))


@router.patch("/{endpoint_id}", summary="Change what is given; a new target is loaded before it takes over")
async def update_endpoint(
    services: ServicesDep, scope: ScopeDep, endpoint_id: str, body: EndpointPatch
) -> EndpointAnswer:
    return EndpointAnswer(endpoint=await service.update(services, scope, endpoint_id, body))


@router.delete("/{endpoint_id}", status_code=204, summary="Delete an endpoint, its keys and its runs")
def delete_endpoint(services: ServicesDep, scope: ScopeDep, endpoint_id: str) -> None:
    service.delete(services, scope, endpoint_id)


@router.get("/{endpoint_id}/keys", summary="List an endpoint's keys, revoked ones too, without their secrets")
def list_endpoint_keys(services: ServicesDep, scope: ScopeDep, endpoint_id: str) -> EndpointKeyList:
    return EndpointKeyList(keys=service.list_keys(services, scope, endpoint_id))


@router.post(
    "/{endpoint_id}/keys", status_code=201, summary="Create a key; its plaintext is in this answer and nowhere else"
)
def create_endpoint_key(
    services: ServicesDep, scope: ScopeDep, endpoint_id: str, body: EndpointKeyCreate
) -> EndpointKeyAnswer:
    return EndpointKeyAnswer(key=service.create_key(services, scope, endpoint_id, body.label))


@router.delete("/{endpoint_id}/keys/{key_id}", status_code=204, summary="Revoke a key at once; it stays listed")
def revoke_endpoint_key(services: ServicesDep, scope: ScopeDep, endpoint_id: str, key_id: str) -> None:
    service.revoke_key(services, scope, endpoint_id, key_id)
