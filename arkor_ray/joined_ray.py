"""A Ray that somebody else started: whether it is there, and whether the service can be safe and whole on it."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from arkor_ray.errors import InvalidRequestError, ServiceUnavailableError, last_line
from arkor_ray.schemas.address import is_loopback

if TYPE_CHECKING:  # pydantic-settings is not in the base install, where `arkor-ray doctor` imports this
    from arkor_ray.settings import Settings

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
LOOK_EVERY_S = 3.0
GONE_S = 30.0  # a head that was started again is back by then; after 60 s Ray ends us, in words of its own
ASK_TIMEOUT_S = 60.0  # for all nodes together; each has to start a process

DASHBOARD_REMEDY = "start the head with --dashboard-host=0.0.0.0"

# What every process of one service must agree on.
SHARED_SETTINGS = tuple(
    f"ARKOR_RAY_{name}"
    for name in (
        "DATABASE_URL",
        "STORAGE_URL",
        "S3_ENDPOINT_URL",
        "MODELS",
        "CATALOGUE",
        "MODELS_ALLOW_LOCAL_PATHS",
        "DATASETS_ALLOW_PRIVATE_HOSTS",
        "DATASETS_ALLOW_LOCAL_PATHS",
        "DATASETS_MAX_BYTES",
        "DATASETS_TIMEOUT_S",
        "DEFAULT_PRECISION",
        "TRAINING_CPUS_PER_WORKER",
        "SERVING_SLOTS",
        "SERVING_ROWS",
        "SERVING_MAX_LENGTH",
        "SERVING_REPLICAS",
        "CHECKPOINT_READY_TIMEOUT_S",
        "PUBLIC_URL",
        "CLUSTER",
        "NODE_ROLES",
    )
)


def check_answers(address: str) -> None:
    """Ray itself tries for minutes, without a word, to reach one that is not there."""
    _, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()):
        raise InvalidRequestError(f"--ray-address {address}: write HOST:PORT, as `ray start --head` prints it")
    try:
        _knock(address)
    except OSError as error:
        raise ServiceUnavailableError(
            f"--ray-address {address}: no Ray answers there ({error.strerror or error}); start one with "
            f"`ray start --head --port {port}`, or leave the option out to have one started"
        ) from error


def answers(address: str) -> bool:
    """Whether anything listens at HOST:PORT; asking Ray itself would wait for it."""
    try:
        _knock(address)
    except OSError:
        return False
    return True


def wait_while_answering(address: str) -> None:
    """Returns once nothing has listened at HOST:PORT for `GONE_S`. A head whose state is kept (GCS fault tolerance) may be
    away for less than that."""
    last = time.monotonic()
    while time.monotonic() - last < GONE_S:
        time.sleep(LOOK_EVERY_S)
        if answers(address):
            last = time.monotonic()


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def check_ray(settings: Settings) -> None:
    """What the service needs of the Ray that this process is connected to.

    Raises InvalidRequestError where it would not be safe, or where jobs could not be launched.
    """
    _check_token(settings)
    _check_dashboard()


def check_settings(settings: Settings) -> None:
    """The processes of each node read that node's environment, and it must say the same as ours.

    Raises InvalidRequestError that names node and variables. They are not handed over with the jobs, where Ray would show
    their secrets.
    """
    import ray

    asked = {node["NodeManagerAddress"]: on_node(node, _settings_here) for node in ray.nodes() if node["Alive"]}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ASK_TIMEOUT_S)
    for node, answer in asked.items():
        try:
            theirs = ray.get(answer, timeout=0)
        except ray.exceptions.RayError as error:
            reason = last_line(str(error)) or type(error).__name__
            raise ServiceUnavailableError(
                f"Node {node} of this Ray did not say its settings: {reason}; every node needs the same arkor-ray and "
                "valid ARKOR_RAY_* variables"
            ) from error
        if other := differing_settings(settings.environment(), theirs):
            raise InvalidRequestError(
                f"{', '.join(other)}: the processes of node {node} have other values than this command, or none; start "
                "Ray there with the same ARKOR_RAY_* variables"
            )


def on_node(node: dict[str, Any], function: Callable[[], Any]) -> Any:
    """The reference to what `function` answers on that node, one of `ray.nodes()`. It takes no CPU, and is not tried again."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    return ray.remote(**options)(function).remote()


def differing_settings(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The variables that every process of a service must agree on and these two environments do not."""
    return [name for name in SHARED_SETTINGS if ours.get(name) != theirs.get(name)]


def _settings_here() -> dict[str, str]:
    from arkor_ray.settings import Settings

    return Settings.load().environment()


def dashboard_out_of_reach() -> str | None:
    """Where the dashboard is, if that is a place which only one of several machines reaches, as by Ray's default.

    Jobs are submitted through it, from whichever node the controller runs on.
    """
    import ray
    from ray.dashboard.utils import ray_address_to_api_server_url

    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 or all(is_loopback(node) for node in nodes):
        return None
    url = ray_address_to_api_server_url(ray.get_runtime_context().gcs_address)
    return url if is_loopback(urlsplit(url).hostname or "") else None


def _check_token(settings: Settings) -> None:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if is_token_auth_enabled():
        return
    found = (
        "This Ray asks nobody for a token: whoever reaches its ports runs code on its nodes. Start its nodes, and what "
        "joins it, with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN"
    )
    if settings.cluster and not settings.allow_ray_without_token:
        raise InvalidRequestError(
            f"{found}, or set ARKOR_RAY_ALLOW_RAY_WITHOUT_TOKEN=1 where nobody else reaches them",
            param="RAY_AUTH_MODE",
        )
    logger.warning("%s", found)


def _check_dashboard() -> None:
    if url := dashboard_out_of_reach():
        raise InvalidRequestError(
            f"The dashboard of this Ray listens at {url}, where no other node reaches it, and jobs are submitted through it: "
            f"{DASHBOARD_REMEDY}",
            param="--dashboard-host",
        )
