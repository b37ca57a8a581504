"""The HTTP application of the control plane. It knows no Ray: what it needs of the cluster is handed in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute

from arkor_ray.api import error_handlers, readiness
from arkor_ray.api.bodies import ErrorBody
from arkor_ray.api.deps import Services
from arkor_ray.api.endpoint_directory import EndpointDirectory
from arkor_ray.api.endpoint_hosts import EndpointHosts
from arkor_ray.api.inference_gateway import DriverLogs, InferenceGateway
from arkor_ray.api.known_hosts import KnownHosts
from arkor_ray.api.last_used import LastUsed
from arkor_ray.api.observe import Observe
from arkor_ray.api.request_body import BodyLimit
from arkor_ray.api.routes import ROUTERS
from arkor_ray.api.run_store import RunStore
from arkor_ray.db import identities
from arkor_ray.db.session import Database
from arkor_ray.events.stream import EventTail
from arkor_ray.settings import Settings
from arkor_ray.storage import ObjectStore, open_store


def create_app(
    settings: Settings,
    db: Database,
    inference: InferenceGateway,
    tail: EventTail | None = None,
    *,
    store: ObjectStore | None = None,
    logs: DriverLogs | None = None,
    behind_serve: bool = False,
) -> FastAPI:
    """The application. `db` must be migrated; it and the others stay the caller's to close.

    Args:
        inference: the way to the inference replicas.
        tail: reads event logs for all streams of this process.
        store: where adapters lie; by default the one of the settings.
        logs: the way to what drivers printed.
        behind_serve: Ray Serve's proxy is in front, and answers with request ids by itself.
    """
    store = store or open_store(settings.storage_url, endpoint_url=settings.s3_endpoint_url)
    services = Services(
        settings=settings,
        db=db,
        store=store,
        tail=tail or EventTail(db),
        inference=inference,
        logs=logs,
        last_used=LastUsed(db, identities.touch_token),
        endpoints=EndpointDirectory(db, settings),
        runs=RunStore(db),
        readiness=readiness.of_parts(db, store),
    )
    app = FastAPI(
        title="arkor-ray",
        summary="LoRA fine-tuning jobs, their events, and chat with every checkpoint",
        version=version("arkor-ray"),
        redirect_slashes=False,  # a redirect would lose the body and, at some clients, the token
        strict_content_type=False,
        responses=error_handlers.described(ErrorBody),
        generate_unique_id_function=_operation_id,
        lifespan=_lifespan,
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    error_handlers.install(app)
    app.add_middleware(Observe, answers_id=not behind_serve)
    app.add_middleware(EndpointHosts, settings=settings)  # outside of those above: they go by the path that it makes
    app.add_middleware(KnownHosts, settings=settings)  # the outermost: who it refuses reaches nothing
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    services: Services = app.state.services
    services.endpoints.close()
    services.runs.close()
    services.last_used.close()


def _operation_id(route: APIRoute) -> str:
    return route.name
