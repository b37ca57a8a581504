"""The program that joins a Ray and asks each of its nodes, in a process of its own: joining can hang for minutes.

python -m arkor_ray.doctor.ray_probe ADDRESS SECONDS

Prints one line of JSON: what joining failed with, or what every node said. Settings come from the environment.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from arkor_ray import __version__
from arkor_ray.doctor.clocks import measure
from arkor_ray.errors import last_line

CLOCK_S = 10.0  # for a node that has just answered


def main() -> None:
    address, limit_s = sys.argv[1], float(sys.argv[2])
    try:
        answer = _ask_nodes(address, limit_s)
    except Exception as error:  # Ray's own reasons are many, and each is the finding
        answer = {"error": f"{type(error).__name__}: {error}"[:600]}
    print(json.dumps(answer), flush=True)


def _ask_nodes(address: str, limit_s: float) -> dict[str, Any]:
    from arkor_ray.joined_ray import check_answers, dashboard_out_of_reach, differing_settings, on_node
    from arkor_ray.settings import Settings

    if address != "auto":
        check_answers(address)

    import ray

    ray.init(address=address, namespace="arkor-doctor", log_to_driver=False, configure_logging=False)
    alive = [node for node in ray.nodes() if node["Alive"]]

    def answer_of(task: Any) -> dict[str, Any]:
        return ray.get(task, timeout=0)

    def time_of(node: dict[str, Any]) -> datetime:
        return ray.get(on_node(node, clock), timeout=CLOCK_S)

    asked = {on_node(node, look_from_here): node for node in alive}
    ray.wait(list(asked), num_returns=len(asked), timeout=limit_s)
    settings = Settings.load()
    ours = settings.environment()
    nodes = []
    for task, node in asked.items():
        said = hear(partial(answer_of, task), partial(time_of, node), partial(differing_settings, ours))
        nodes.append({"address": node["NodeManagerAddress"], "gpus": node["Resources"].get("GPU", 0), **said})
    return {
        "ray": ray.__version__,
        "python": platform.python_version(),
        "arkor_ray": __version__,
        "of_one_machine": local_places(settings),
        "dashboard_out_of_reach": dashboard_out_of_reach(),
        "cpus": ray.cluster_resources().get("CPU", 0),
        "nodes": nodes,
    }


def hear(
    answer: Callable[[], dict[str, Any]],
    ask_time: Callable[[], datetime],
    differing: Callable[[dict[str, str]], list[str]],
) -> dict[str, Any]:
    """What one node says (`look_from_here`), with how its settings and its clock differ; or the error of asking it."""
    try:
        said = answer()
        skew = measure(ask_time)
    except Exception as error:  # of this node; the others say theirs
        return {"error": last_line(str(error)) or type(error).__name__}
    said["differing"] = differing(said.pop("settings"))  # names only: values hold secrets
    return {**said, "ahead_s": skew.ahead.total_seconds(), "margin_s": skew.margin.total_seconds()}


def local_places(settings: Any) -> list[str]:
    """The settings that name a place which only processes of one machine reach."""
    places = {"ARKOR_RAY_DATABASE_URL": settings.database_url, "ARKOR_RAY_STORAGE_URL": settings.storage_url}
    return [name for name, url in places.items() if url.startswith(("sqlite:", "file:"))]


def look_from_here() -> dict[str, Any]:
    """Runs on each node: its versions, its settings, and whether it reaches what the service needs."""
    import ray
    from ray._private.authentication.authentication_utils import get_authentication_mode_name
    from ray._raylet import get_authentication_mode  # type: ignore[attr-defined]

    from arkor_ray import __version__, service
    from arkor_ray.errors import ArkorError
    from arkor_ray.settings import Settings

    answer: dict[str, Any] = {
        "ray": ray.__version__,
        "python": platform.python_version(),
        "arkor_ray": __version__,
        "auth": get_authentication_mode_name(get_authentication_mode()),  # there is no public way to ask
        "settings": {},
        "unreachable": "",
    }
    try:
        settings = Settings.load()
        answer["settings"] = settings.environment()
        if not local_places(settings):  # looking for a local database would make one
            service.check_reachable(settings)
    except ArkorError as error:
        answer["unreachable"] = error.message
    return answer


def clock() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
