"""The control plane as a Ray Serve application."""

from __future__ import annotations

import asyncio
import logging
import os
import time

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from arkor_ray.api.app import create_app
from arkor_ray.api.ray_gateway import RayDriverLogs, RayInferenceGateway
from arkor_ray.db.session import DATABASE_AWAY, Database, reason
from arkor_ray.events.stream import EventTail
from arkor_ray.jobs.controller import ensure_controller
from arkor_ray.joined_ray import check_ray
from arkor_ray.placement import HARDLY_A_CPU, nodes_for
from arkor_ray.settings import Settings
from arkor_ray.telemetry import process
from arkor_ray.telemetry.export import each_second
from arkor_ray.telemetry.metrics import API_EVENT_STREAMS

logger = logging.getLogger(__name__)

DEPLOYMENT = "Api"
MAX_ONGOING_REQUESTS = 20_000  # event streams stay open for as long as their jobs run
HEALTH_CHECK_S = 5.0
# Serve asks replicas that serve how they are, and no longer those that are to end. That is all it tells them.
UNASKED_S = 4 * HEALTH_CHECK_S
WATCH_S = 1.0
DRAIN_S = 90.0  # for answers under way when a replica is to end; event streams end once it notices
DATABASE_PATIENCE_S = 300.0
DATABASE_AGAIN_S = 2.0


def build_api(
    settings: Settings,
    *,
    num_replicas: int = 1,
    max_replicas_per_node: int | None = None,
    drain_s: float = DRAIN_S,
) -> serve.Application:
    """The application to run with the route prefix "/". Everything it holds is made on the replica, which has `drain_s` for
    answers under way when it is to end."""

    def build() -> FastAPI:
        process.begin()
        db = Database(settings.database_url)
        if settings.database_file is None:
            migrate_when_there(db)
        else:
            db.migrate()
        tail = EventTail(db)
        each_second(lambda: API_EVENT_STREAMS.set(tail.followers))
        return create_app(settings, db, RayInferenceGateway(settings), tail, logs=RayDriverLogs(), behind_serve=True)

    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=num_replicas,
        max_replicas_per_node=max_replicas_per_node,  # type: ignore[arg-type]  # None is what Serve keeps for no limit
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": HARDLY_A_CPU, "label_selector": nodes_for(settings, "control-plane")},
        health_check_period_s=HEALTH_CHECK_S,
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        # The next replica answers before the last one takes no more, unless it would wait for that one's place.
        max_surge_percent=100 if max_replicas_per_node is None else 0,
    )
    return deployment(serve.ingress(build)(Api)).bind()


class ApiArgs(BaseModel):
    """What a config for `serve deploy` may say of the control plane. Serve takes strings, and so does this."""

    model_config = ConfigDict(extra="forbid")

    num_replicas: int = Field(default=1, ge=1)
    max_replicas_per_node: int | None = Field(
        default=None,
        ge=1,
        description="With 1 the API outlives a node, and a replica that finds no node to itself waits for one.",
    )
    release: str | None = Field(
        default=None,
        description="Any text: another one replaces all replicas, one after another, where the code is new.",
    )


def application(args: dict[str, str]) -> serve.Application:
    """For `serve deploy`, whose config names this function: settings come from ARKOR_RAY_* of the environment.

    `args` are those of ApiArgs; others, and counts below 1, raise pydantic's ValidationError, which names them. Also makes sure
    that the controller runs, which `arkor-ray up` does by itself. Anonymous tokens are for ARKOR_RAY_ANONYMOUS=1 alone: it is
    Serve's config that says who reaches the API. Raises InvalidRequestError for a Ray on which it would not be safe, or could
    launch no job.
    """
    spread = ApiArgs.model_validate(args)
    said = {} if os.environ.get("ARKOR_RAY_ANONYMOUS") else {"anonymous": False}
    settings = Settings.load(**said)
    check_ray(settings)
    ensure_controller(settings)
    return build_api(settings, num_replicas=spread.num_replicas, max_replicas_per_node=spread.max_replicas_per_node)


def migrate_when_there(db: Database, patience_s: float = DATABASE_PATIENCE_S) -> None:
    """Brings the schema to the newest revision, once there is a database: a cluster's parts come up in any order.

    A replica that failed instead would be tried some times within seconds, and then Serve gives the application up. Raises
    what the database said last after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            db.migrate()
            return
        except DATABASE_AWAY as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("The database is away, and the API waits for it: %s", reason(error))
            time.sleep(DATABASE_AGAIN_S)


class Api:
    """One replica. Its routes are the FastAPI application's; `app` is what Serve made of it."""

    app: FastAPI
    _watch: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Fails when this process cannot use its database although it is there: a restart cures that.

        A database that is away is not this replica's fault; restarting would only cut its streams. `/readyz` tells.
        """
        self._asked_at = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_streams_when_unasked())
        db = self.app.state.services.db
        try:
            await asyncio.to_thread(_ask, db)
        except PoolTimeoutError:
            raise
        except DATABASE_AWAY:
            logger.warning("The database is away", exc_info=True)

    async def end_streams(self) -> None:
        """Event streams would hold up the end of a replica for as long as jobs run; their readers go on at another one."""
        self.app.state.services.tail.interrupt()

    async def _end_streams_when_unasked(self) -> None:
        """If it is Serve's controller that is away instead, the readers come back here, once."""
        ended_at = 0.0
        while True:
            await asyncio.sleep(WATCH_S)
            if time.monotonic() - self._asked_at > UNASKED_S and ended_at < self._asked_at:
                ended_at = time.monotonic()
                await self.end_streams()


def _ask(db: Database) -> None:
    with db.read() as session:
        session.execute(text("SELECT 1"))
