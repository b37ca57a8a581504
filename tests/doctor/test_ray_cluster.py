"""What is said about a Ray that is joined; one real one is asked in tests/integration/test_doctor.py."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from arkor_ray.doctor.findings import Finding, Status
from arkor_ray.doctor.ray_cluster import check_ray, probe
from arkor_ray.doctor.ray_probe import hear
from arkor_ray.embedded import free_ports


def node(address: str = "10.0.0.1", **changed: Any) -> dict[str, Any]:
    well = {"address": address, "gpus": 1, "ray": "2.60.0", "python": "3.11.7", "arkor_ray": "0.1.0", "auth": "token",
            "differing": [], "unreachable": "", "ahead_s": 0.01, "margin_s": 0.01}  # fmt: skip
    return {**well, **changed}


def problems(
    *nodes: dict[str, Any], of_one_machine: tuple[str, ...] = (), dashboard: str | None = None
) -> list[Finding]:
    versions = {"ray": "2.60.0", "python": "3.11.7", "arkor_ray": "0.1.0"}
    answer = {**versions, "cpus": 16, "of_one_machine": list(of_one_machine), "nodes": nodes,
              "dashboard_out_of_reach": dashboard}  # fmt: skip
    return [finding for finding in check_ray("10.0.0.1:6379", answer) if finding.status is not Status.OK]


def test_a_cluster_of_like_nodes_is_well():
    assert problems(node(), node("10.0.0.2")) == []


@pytest.mark.parametrize(
    ("changed", "status", "word"),
    [
        ({"python": "3.12.1"}, Status.FAIL, "python 3.12.1 (here 3.11.7)"),
        ({"ray": "2.61.0"}, Status.FAIL, "ray 2.61.0"),
        ({"arkor_ray": "0.0.9"}, Status.FAIL, "arkor_ray 0.0.9 (here 0.1.0)"),
        ({"differing": ["ARKOR_RAY_STORAGE_URL"]}, Status.FAIL, "other values of ARKOR_RAY_STORAGE_URL"),
        ({"unreachable": "ARKOR_RAY_DATABASE_URL: refused"}, Status.FAIL, "ARKOR_RAY_DATABASE_URL: refused"),
        ({"auth": ""}, Status.WARNING, "runs code"),
        ({"ahead_s": 30.0}, Status.WARNING, "node 10.0.0.2"),
    ],
)
def test_a_node_unlike_the_others_is_named_with_what_to_do(changed: dict[str, Any], status: Status, word: str):
    (problem,) = problems(node(), node("10.0.0.2", **changed))
    assert (problem.status, word in problem.found) == (status, True)
    assert problem.remedy


def test_a_dashboard_that_other_nodes_cannot_reach_fails():
    (problem,) = problems(node(), node("10.0.0.2"), dashboard="http://127.0.0.1:8265")
    assert problem.status is Status.FAIL
    assert "--dashboard-host=0.0.0.0" in problem.remedy


def test_a_node_that_does_not_run_a_task_fails_and_the_others_are_told():
    (problem,) = problems(node(), {"address": "10.0.0.2", "gpus": 0, "error": "ModuleNotFoundError: arkor_ray"})
    assert (problem.name, "ModuleNotFoundError" in problem.found) == ("node 10.0.0.2", True)


def said_by_a_node(ask_time: Callable[[], datetime]) -> dict[str, Any]:
    answer = {"ray": "2.60.0", "settings": {"ARKOR_RAY_STORAGE_URL": "s3://other"}}
    return hear(lambda: answer, ask_time, lambda settings: sorted(settings))


def test_what_a_node_says_comes_with_how_it_differs_and_without_its_settings():
    said = said_by_a_node(lambda: datetime.now(UTC) + timedelta(seconds=30))
    assert abs(said.pop("ahead_s") - 30) <= said.pop("margin_s") + 0.1
    assert said == {"ray": "2.60.0", "differing": ["ARKOR_RAY_STORAGE_URL"]}


@pytest.mark.parametrize(("words", "told"), [("died\nits node is gone", "its node is gone"), ("", "RuntimeError")])
def test_a_node_that_dies_while_it_is_asked_for_the_time_is_told_alone(words: str, told: str):
    def die() -> datetime:
        raise RuntimeError(words)

    assert said_by_a_node(die) == {"error": told}


def test_places_on_one_machine_are_refused_for_several_nodes():
    local = ("ARKOR_RAY_DATABASE_URL", "ARKOR_RAY_STORAGE_URL")
    assert problems(node(), of_one_machine=local) == []
    (problem,) = problems(node(), node("10.0.0.2"), of_one_machine=local)
    assert "ARKOR_RAY_DATABASE_URL and ARKOR_RAY_STORAGE_URL" in problem.found
    assert "ARKOR_RAY_CLUSTER=1" in problem.remedy


def test_places_on_one_machine_do_while_all_nodes_are_on_it():
    (problem,) = problems(node("127.0.0.2"), node("127.0.0.3"), of_one_machine=("ARKOR_RAY_DATABASE_URL",))
    assert (problem.status, "all nodes are on this machine" in problem.found) == (Status.WARNING, True)
    (problem,) = problems(node("127.0.0.2"), node("10.0.0.2"), of_one_machine=("ARKOR_RAY_DATABASE_URL",))
    assert problem.status is Status.FAIL


def test_an_address_where_no_ray_answers_fails_at_once(tmp_path):
    (port,) = free_ports(1)
    environment = {"ARKOR_RAY_DATA_DIR": str(tmp_path)}
    (finding,) = probe(f"127.0.0.1:{port}", environment, limit_s=90)
    assert (finding.status, "no Ray answers there" in finding.found) == (Status.FAIL, True)
