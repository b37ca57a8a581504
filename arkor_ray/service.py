"""Starting the service's parts on a Ray that is already there: schema, Serve, controller, API."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import httpx
from sqlalchemy.exc import SQLAlchemyError

from arkor_ray.db.session import Database, reason
from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.jobs.controller import ensure_controller
from arkor_ray.placeholders import shown_database_url
from arkor_ray.placement import CONTROLLER, NAMESPACE
from arkor_ray.settings import Settings
from arkor_ray.storage import layout, open_store
from arkor_ray.storage.retry import RetryPolicy

logger = logging.getLogger(__name__)

APPLICATION = "arkor"  # the Serve application of the control plane
READY_TIMEOUT_S = 300.0
STORAGE_ANSWER_S = 20.0
DRAIN_S = 5.0  # for answers under way when the service ends with the terminal that it runs in


def check_reachable(settings: Settings) -> None:
    """Before anything is started: the database and the storage answer.

    Raises ServiceUnavailableError that names the setting. Both are given minutes while the service runs, which is no help to
    somebody who mistyped an address.
    """
    check_database(settings)
    # Tries that end before we do, so that there is a reason to tell; it is told once, below.
    retry = RetryPolicy(budget_seconds=STORAGE_ANSWER_S / 2, log_level=logging.DEBUG)
    store = open_store(settings.storage_url, endpoint_url=settings.s3_endpoint_url, retry=retry)
    outcome: list[str] = []

    def look() -> None:
        try:
            store.head(layout.probe_key())
            outcome.append("")
        except Exception as error:  # told below, whatever it is
            outcome.append(str(error))

    # A thread that nobody waits for: an endpoint that takes a request and is silent would hold us for minutes.
    looking = threading.Thread(target=look, name="storage-check", daemon=True)
    looking.start()
    looking.join(STORAGE_ANSWER_S)
    if outcome != [""]:
        where = settings.storage_url + (f" at {settings.s3_endpoint_url}" if settings.s3_endpoint_url else "")
        said = outcome[0].rstrip(".") if outcome else f"no answer within {STORAGE_ANSWER_S:g} s"
        raise ServiceUnavailableError(
            f"ARKOR_RAY_STORAGE_URL: {where} cannot be used: {said}; check the endpoint (ARKOR_RAY_S3_ENDPOINT_URL), the "
            "bucket and the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )


def check_database(settings: Settings) -> None:
    """The database can be opened. Raises ServiceUnavailableError that names the setting and shows no password."""
    try:
        with contextlib.closing(Database(settings.database_url)) as db:
            db.engine.connect().close()
    # Also what no waiting mends: a parameter of the URL that libpq does not know, a folder of SQLite's that cannot be made.
    except (SQLAlchemyError, OSError) as error:
        shown = shown_database_url(settings.database_url)
        raise ServiceUnavailableError(f"ARKOR_RAY_DATABASE_URL: {shown} cannot be opened: {reason(error)}") from error


def start(settings: Settings) -> None:
    """Brings every part up and returns when `GET /readyz` says so. This process must be connected to Ray.

    Raises ServiceUnavailableError if they do not answer within five minutes, with what /readyz last said.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    from arkor_ray.api.serve_app import build_api

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its progress is not this command's output
    db = Database(settings.database_url)
    db.migrate()
    db.close()
    controller = ensure_controller(settings)
    # On a cluster every node that runs a replica of the api answers, so that the head's death does not take it away.
    proxies = ProxyLocation.EveryNode if settings.cluster else ProxyLocation.HeadOnly
    serve.start(proxy_location=proxies, http_options=HTTPOptions(host=settings.host, port=settings.port))
    serve.run(build_api(settings, drain_s=DRAIN_S), name=APPLICATION, route_prefix="/")
    wait_until_ready(settings.local_url, controller)


def stop(*, ray_goes_on: bool = False) -> None:
    """Lets the controller give up its lease, so that the next start need not wait for it to expire.

    Where `ray_goes_on` without us, our Serve applications are deleted, and only ours. Jobs under way train on; the next
    start finds them.
    """
    import ray

    try:
        controller = ray.get_actor(CONTROLLER, NAMESPACE)
        ray.get(controller.stop.remote(), timeout=5)
        ray.kill(controller)
    except (ValueError, ray.exceptions.RayError):
        pass  # it is not there, or busy: the lease expires by itself
    if ray_goes_on:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        from arkor_ray.api.serve_app import DEPLOYMENT

        ours = [name for name in serve.status().applications if name == APPLICATION or name.startswith("inference-")]
        if APPLICATION in ours:  # one replica, whose streams would keep it for a while
            with contextlib.suppress(KeyError, RayServeException):  # it never came up
                serve.get_deployment_handle(DEPLOYMENT, APPLICATION).end_streams.remote()
        for name in ours:
            try:
                serve.delete(name)
            except TimeoutError as error:  # its end is under way, and needs nobody to wait for it
                logger.warning("%s has not ended yet: %s", name, error)
        if ours and not serve.status().applications:
            serve.shutdown()  # its proxy would keep our host and port for whoever deploys next


def fold_journal(settings: Settings) -> None:
    """After the last process of a service has ended: its database, if a file, is whole without the journal beside it."""
    with contextlib.closing(Database(settings.database_url)) as db:
        db.fold_journal()


def wait_until_ready(api_url: str, controller: Any, timeout_s: float = READY_TIMEOUT_S) -> None:
    import ray

    if not ray.get(controller.ping.remote(), timeout=timeout_s):
        raise ServiceUnavailableError("The controller's loop has ended; see the Ray logs")
    deadline, said = time.monotonic() + timeout_s, "nothing"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{api_url}/readyz", timeout=10)
            if answer.status_code == 200:
                return
            said = answer.text[:500]
        except httpx.HTTPError as error:
            said = f"{type(error).__name__}: {error}"
        time.sleep(0.2)
    raise ServiceUnavailableError(f"{api_url}/readyz did not become ready within {timeout_s:g} s; it last said: {said}")
