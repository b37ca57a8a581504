"""The service that runs, if one does, and to whom it would open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx

from arkor_ray.doctor.findings import Finding, fail, ok, warning
from arkor_ray.schemas.address import is_loopback

if TYPE_CHECKING:
    from arkor_ray.settings import Settings

NAME = "api"
LIMIT_S = 10.0


def check_api(settings: Settings, instance: dict[str, Any] | None) -> Iterator[Finding]:
    """`instance`: what `embedded.read_instance` says about the data directory."""
    if instance is not None and not instance.get("url"):
        yield warning(
            NAME, f"an arkor-ray (pid {instance['pid']}) is starting or stopping", "try again when it is done"
        )
        return
    url = instance["url"] if instance is not None else settings.api_url
    try:
        answer = httpx.get(f"{url}/readyz", timeout=LIMIT_S)
    except httpx.ConnectError as error:
        if instance is None:
            yield ok(NAME, f"none runs at {url}")
        else:
            yield fail(
                NAME, f"{url} (pid {instance['pid']}) refuses connections: {error}", "arkor-ray down; arkor-ray up"
            )
        return
    except httpx.HTTPError as error:
        yield fail(NAME, f"{url}/readyz: {type(error).__name__}: {error}", "look at the service's log, or restart it")
        return
    checks = _checks(answer)
    if checks is None:
        yield warning(NAME, f"something else answers at {url}", "choose another port: --port, or ARKOR_RAY_PORT")
    elif answer.status_code == 200:
        yield ok(NAME, f"ready at {url}")
    else:
        bad = "; ".join(f"{part} {said}" for part, said in checks.items() if said != "ok")
        yield fail(NAME, f"{url} is not ready: {bad}", "mend that part; the API notices by itself")


def check_exposure(host: str, anonymous: bool) -> Finding:
    if anonymous and not is_loopback(host):
        return warning(
            "access", f"listens on {host} and gives a token to anybody who asks",
            "set ARKOR_RAY_ANONYMOUS=0 and make tokens with `arkor-ray tokens issue`",
        )  # fmt: skip
    return ok("access", "anonymous tokens, on this machine only" if anonymous else "with tokens of the operator only")


def _checks(answer: httpx.Response) -> dict[str, str] | None:
    """What /readyz says about the parts, None if that is not what answered."""
    try:
        checks = answer.json().get("checks")
    except (ValueError, AttributeError):
        return None
    return checks if isinstance(checks, dict) else None
