from __future__ import annotations

import json
from typing import Any

import pytest

from arkor_ray.doctor.children import Said, ask, ask_module
from arkor_ray.doctor.findings import Finding, Status
from arkor_ray.doctor.gpu import Driver, check_gpus, check_loading, parse_driver

GIB = 2**30
TWO = Driver("550.54", ("NVIDIA H200", "NVIDIA H200"))


def facts(count: int = 2, **changed: Any) -> dict[str, Any]:
    device = {"name": "NVIDIA H200", "capability": [9, 0], "free_bytes": 138 * GIB, "total_bytes": 139 * GIB}
    device |= changed.pop("device", {})
    given = {
        "torch": "2.13.0",
        "cuda": "12.8",
        "devices": [device] * count,
        "nccl": "2.27.3",
        "bitsandbytes_cuda": True,
    }
    return {**given, "toolkit": "12.8", **changed}


def problems(driver: Driver | None, known: dict[str, Any] | None, precision: str = "auto") -> list[tuple[str, str]]:
    return [(f.status, f.found) for f in check_gpus(driver, known, precision) if f.status is not Status.OK]


def test_a_machine_without_a_gpu_trains_on_its_cpu():
    (finding,) = check_gpus(None, facts(0, cuda=None), "auto")
    assert (finding.status, finding.found) == (Status.OK, "no GPU: CPU training")


def test_gpus_that_torch_can_use_are_shown():
    (finding,) = check_gpus(TWO, facts(), "auto")
    assert finding.status is Status.OK
    assert (
        "138 of 139 GiB free" in finding.found and "driver 550.54" in finding.found and "NCCL 2.27.3" in finding.found
    )


@pytest.mark.parametrize(
    ("known", "status", "word"),
    [
        (facts(0, cuda=None, torch="2.13.0+cpu"), Status.FAIL, "build for CPUs"),
        (facts(0), Status.FAIL, "sees none of 2 GPUs"),
        (facts(1), Status.WARNING, "sees 1 of 2 GPUs"),
        (facts(device={"capability": [7, 5]}), Status.WARNING, "no bf16"),
        (facts(device={"free_bytes": GIB}), Status.WARNING, "memory is taken"),
        (facts(nccl=None), Status.FAIL, "no NCCL"),
        (facts(bitsandbytes_cuda=False), Status.FAIL, "load_in_4bit"),
        (facts(toolkit="11.8"), Status.WARNING, "ops are not compiled"),
    ],
)
def test_what_keeps_gpus_from_being_used_is_told(known, status, word):
    (problem,) = problems(TWO, known)
    assert problem[0] is status
    assert word in problem[1]


def test_no_toolkit_and_another_precision_are_no_problem():
    assert problems(TWO, facts(toolkit=None)) == []
    assert problems(TWO, facts(device={"capability": [7, 5]}), precision="fp16") == []


def test_the_driver_tells_version_and_names():
    said = Said("NVIDIA H200, 550.54, 143771 MiB\nNVIDIA H200, 550.54, 143771 MiB\n", "", 0)
    assert parse_driver(said) == TWO
    assert parse_driver(Said("No devices were found\n", "", 6)) is None


@pytest.mark.parametrize("said", [Said("", "NVML: Driver/library version mismatch", 18), Said("", "", None)])
def test_a_driver_that_does_not_work_fails(said):
    finding = parse_driver(said)
    assert isinstance(finding, Finding)
    assert finding.status is Status.FAIL


def test_an_import_that_hangs_dies_or_raises_is_named():
    def of(*lines: dict[str, Any], code: int | None) -> list[tuple[str, str]]:
        said = Said("\n".join(map(json.dumps, lines)), "", code)
        return [(f.status, f.found) for f in check_loading(["ray", "torch"], said)]

    ray = ({"begins": "ray"}, {"package": "ray", "version": "2.60.0", "seconds": 0.7})
    assert of(*ray, {"begins": "torch"}, code=None) == [
        ("fail", "import torch does not end"), ("ok", "ray 2.60.0 (0.7 s)")
    ]  # fmt: skip
    assert of({"begins": "ray"}, code=-11) == [("fail", "import ray ends the process with code -11")]
    assert of({"begins": "ray"}, {"package": "ray", "error": "ImportError: no libffi"}, code=0) == [
        ("fail", "import ray fails: ImportError: no libffi")
    ]


def test_imports_run_in_a_child_which_tells_one_by_one():
    said = ask_module("arkor_ray.doctor.loading", "json", "arkor_ray.nonesuch", limit_s=60)
    findings = list(check_loading(["json", "arkor_ray.nonesuch"], said))
    assert [(f.status, f.found.split(":")[0]) for f in findings] == [
        (Status.FAIL, "import arkor_ray.nonesuch fails"), (Status.OK, findings[1].found)
    ]  # fmt: skip
    assert findings[1].found.startswith("json ")


def test_a_child_that_hangs_is_ended_and_what_it_said_is_kept():
    said = ask(["sh", "-c", "echo '{\"begins\": 1}'; exec sleep 60"], 0.5)
    assert said is not None
    assert (said.code, said.objects()) == (None, [{"begins": 1}])
    assert ask(["arkor-no-such-program"], 1) is None
