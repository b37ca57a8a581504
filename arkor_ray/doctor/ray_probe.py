"""The program that joins a Ray and asks each of its nodes, in a process of its own: joining can hang for minutes.

python -m arkor_ray.doctor.ray_probe ADDRESS SECONDS

Prints one line of JSON: what joining failed with, or what every node said. Settings come from the environment.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    address, limit_s = sys.argv[1], float(sys.argv[2])
    try:
        answer = _ask_nodes(address, limit_s)
    except Exception as error:  # Ray's own reasons are many, and each is the finding
        answer = {"error": f"{type(error).__name__}: {error}"[:600]}
    print(json.dumps(answer), flush=True)


def _ask_nodes(address: str, limit_s: float) -> dict[str, Any]:
    from arkor_ray.embedded import check_answers, differing_settings
    from arkor_ray.settings import Settings

    if address != "auto":
        check_answers(address)

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address=address, namespace="arkor-doctor", log_to_driver=False, configure_logging=False)
    alive = [node for node in ray.nodes() if node["Alive"]]

    def on(node: dict[str, Any], function: Callable[[], Any]) -> Any:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
        return ray.remote(**options)(function).remote()

    asked = {on(node, look_from_here): node for node in alive}
    ray.wait(list(asked), num_returns=len(asked), timeout=limit_s)
    settings = Settings.load()
    ours = settings.environment()
    nodes = []
    for task, node in asked.items():
        said: dict[str, Any] = {"address": node["NodeManagerAddress"], "gpus": node["Resources"].get("GPU", 0)}
        try:
            said |= ray.get(task, timeout=0)
        except Exception as error:  # of this node; the others have said theirs
            said["error"] = str(error).strip().splitlines()[-1][:300] or type(error).__name__
        else:
            said["differing"] = differing_settings(ours, said.pop("settings"))  # names only: values hold secrets
            begun = time.time()
            theirs = ray.get(on(node, clock), timeout=limit_s)
            ended = time.time()
            said["ahead_s"], said["margin_s"] = theirs - (begun + ended) / 2, (ended - begun) / 2
        nodes.append(said)
    return {
        "ray": ray.__version__,
        "python": platform.python_version(),
        "of_one_machine": local_places(settings),
        "cpus": ray.cluster_resources().get("CPU", 0),
        "nodes": nodes,
    }


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


def clock() -> float:
    return time.time()


if __name__ == "__main__":
    main()
