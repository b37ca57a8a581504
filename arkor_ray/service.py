"""Starting the service's parts on a Ray that is already there: schema, Serve, controller, API."""

from __future__ import annotations

import logging
import time
from typing import Any

import httpx

from arkor_ray.db.session import Database
from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.jobs.controller import ensure_controller
from arkor_ray.settings import Settings

APPLICATION = "arkor"  # the Serve application of the control plane
READY_TIMEOUT_S = 300.0


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
    controller = ensure_controller()
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=settings.host, port=settings.port))
    serve.run(build_api(settings), name=APPLICATION, route_prefix="/")
    wait_until_ready(settings.local_url, controller)


def stop(*, ray_goes_on: bool = False) -> None:
    """Lets the controller give up its lease, so that the next start need not wait for it to expire.

    Where `ray_goes_on` without us, our Serve applications are deleted, and only ours. Jobs under way train on; the next
    start finds them.
    """
    import ray

    from arkor_ray.jobs.controller import NAME, NAMESPACE

    try:
        controller = ray.get_actor(NAME, NAMESPACE)
        ray.get(controller.stop.remote(), timeout=5)
        ray.kill(controller)
    except (ValueError, ray.exceptions.RayError):
        pass  # it is not there, or busy: the lease expires by itself
    if ray_goes_on:
        from ray import serve

        for name in serve.status().applications:
            if name == APPLICATION or name.startswith("inference-"):
                serve.delete(name)


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
