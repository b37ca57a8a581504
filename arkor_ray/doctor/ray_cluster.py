"""A Ray that is joined: whether it answers, and whether all of its nodes are alike and reach what they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from arkor_ray.doctor.children import Said, ask_module
from arkor_ray.doctor.clocks import Skew, check_clocks
from arkor_ray.doctor.findings import Finding, fail, ok, warning
from arkor_ray.joined_ray import DASHBOARD_REMEDY
from arkor_ray.schemas.address import is_loopback

NAME = "ray"
NODE_LIMIT_S = 40.0
VERSIONS = ("ray", "python", "arkor_ray")


def probe(address: str, environment: Mapping[str, str], limit_s: float) -> Iterator[Finding]:
    """`environment`: the settings as variables."""
    said = ask_module(
        "arkor_ray.doctor.ray_probe", address, str(NODE_LIMIT_S), limit_s=limit_s, environment=environment
    )
    answers = said.objects()
    yield from check_ray(address, answers[-1]) if answers else [_without_answer(address, said, limit_s)]


def check_ray(address: str, answer: Mapping[str, Any]) -> Iterator[Finding]:
    """`answer` is what `ray_probe` printed."""
    if "error" in answer:
        yield fail(
            NAME, f"{address} cannot be joined: {answer['error']}",
            "look whether `ray status` works there; use the same Ray and Python version on both sides, and the same "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN",
        )  # fmt: skip
        return
    nodes = answer["nodes"]
    gpus = sum(node["gpus"] for node in nodes)
    said = f"Ray {answer['ray']} at {address}: {len(nodes)} nodes, {answer['cpus']:g} CPUs, {gpus:g} GPUs"
    yield ok(NAME, said)
    if len(nodes) > 1 and answer["of_one_machine"]:
        places = " and ".join(answer["of_one_machine"])
        remedy = "set them to postgresql://… and s3://BUCKET/PREFIX, and ARKOR_RAY_CLUSTER=1"
        if all(is_loopback(node["address"]) for node in nodes):
            yield warning(
                NAME, f"{places}: all nodes are on this machine, and only such nodes reach a place on it",
                f"for nodes on several machines {remedy}",
            )  # fmt: skip
        else:
            yield fail(NAME, f"{places}: the other nodes cannot reach a place on one of them", remedy)
    if url := answer["dashboard_out_of_reach"]:
        yield fail(NAME, f"the dashboard listens at {url}, and jobs are submitted through it", DASHBOARD_REMEDY)
    good = [node for node in nodes if "error" not in node]
    for node in nodes:
        yield from _check_node(node, answer)
    if any(node["auth"] != "token" for node in good):
        yield warning(
            "ray authentication", "off: whoever reaches Ray's ports runs code on its nodes",
            "start every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN, and keep the ports inside",
        )  # fmt: skip
    skews = {
        f"node {node['address']}": Skew(timedelta(seconds=node["ahead_s"]), timedelta(seconds=node["margin_s"]))
        for node in good
    }
    yield from check_clocks(skews)


def _check_node(node: Mapping[str, Any], driver: Mapping[str, Any]) -> Iterator[Finding]:
    name = f"node {node['address']}"
    if "error" in node:
        yield fail(
            name, f"did not run a task: {node['error']}",
            "install the same arkor-ray on every node; `ray logs` there says more",
        )  # fmt: skip
        return
    different = [f"{what} {node[what]} (here {driver[what]})" for what in VERSIONS if node[what] != driver[what]]
    if different:
        yield fail(name, ", ".join(different), "use the same image or environment on every node")
    if node["differing"]:
        yield fail(
            name, f"has other values of {', '.join(node['differing'])}",
            "start Ray on every node with the same ARKOR_RAY_* variables",
        )  # fmt: skip
    if node["unreachable"]:
        yield fail(name, node["unreachable"], "let this node's network and variables reach it too")
    if not (different or node["differing"] or node["unreachable"]):
        reaches = "" if driver["of_one_machine"] else ", reaches database and storage"
        yield ok(name, f"{node['gpus']:g} GPUs, the same versions and settings{reaches}")


def _without_answer(address: str, said: Said, limit_s: float) -> Finding:
    if said.code is None:
        found = f"{address}: joining it took more than {limit_s:g} s"
    else:
        found = f"{address} cannot be joined: {said.errors.strip()[-300:]}"
    return fail(NAME, found, "look whether `ray status` works there, and whether all of Ray's ports are open to here")
