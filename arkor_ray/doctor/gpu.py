"""GPUs: what the driver has, what torch sees of it, and whether the packages that were imported can use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from arkor_ray.doctor.children import Said, ask
from arkor_ray.doctor.findings import Finding, fail, ok, warning

BF16_CAPABILITY = (8, 0)
SMI_LIMIT_S = 20.0
_QUERY = "--query-gpu=name,driver_version,memory.total"
_GIB = 2**30


@dataclass(frozen=True)
class Driver:
    version: str
    names: tuple[str, ...]


def read_driver() -> Driver | Finding | None:
    """None on a machine without NVIDIA's driver; a finding where it is there and does not work."""
    said = ask(["nvidia-smi", _QUERY, "--format=csv,noheader"], SMI_LIMIT_S)
    return None if said is None else parse_driver(said)


def parse_driver(said: Said) -> Driver | Finding | None:
    rows = [[cell.strip() for cell in line.split(",")] for line in said.output.splitlines() if line.count(",") >= 2]
    if said.code == 0 and rows:
        return Driver(rows[0][1], tuple(row[0] for row in rows))
    if "No devices were found" in said.output + said.errors:
        return None
    reason = "does not end" if said.code is None else (said.output + said.errors).strip()[-200:]
    return fail(
        "gpu", f"nvidia-smi fails: {reason}", "repair the NVIDIA driver; in a container, start it with --gpus all"
    )


def check_loading(names: Sequence[str], said: Said) -> Iterator[Finding]:
    """What `loading` said about these packages."""
    lines = said.objects()
    ended = {line["package"] for line in lines if "package" in line}
    for line in lines:
        if "error" in line:
            yield fail("imports", f"import {line['package']} fails: {line['error']}", _reinstall(line["package"]))
    begun = [line["begins"] for line in lines if "begins" in line]
    if begun and begun[-1] not in ended:
        how = "does not end" if said.code is None else f"ends the process with code {said.code}"
        yield fail("imports", f"import {begun[-1]} {how}", _reinstall(begun[-1]))
    good = [f"{line['package']} {line['version']} ({line['seconds']} s)" for line in lines if "seconds" in line]
    if good:
        yield ok("imports", ", ".join(good))
    elif not begun:
        yield fail("imports", f"{', '.join(names)} could not be tried: {said.errors.strip()[-300:]}", "pip check")


def check_gpus(driver: Driver | None, facts: dict[str, Any] | None, precision: str) -> Iterator[Finding]:
    """`facts` is what `loading` found out about accelerators, None without torch; `precision` the setting's value."""
    count = len(driver.names) if driver else 0
    if facts is None:
        what = f"{count} x {driver.names[0]}" if driver else "no NVIDIA GPU"
        yield ok("gpu", f"{what}; torch is not installed")
        return
    devices = facts["devices"]
    if not devices and driver is None:
        yield ok("gpu", "no GPU: CPU training")
        return
    if facts["cuda"] is None:
        version = facts["torch"]
        yield fail(
            "gpu", f"{count} GPUs, but torch {version} is a build for CPUs",
            "pip install --force-reinstall torch, without constraints.txt",
        )  # fmt: skip
        return
    if not devices:
        version = driver.version if driver else "?"
        yield fail(
            "gpu", f"torch for CUDA {facts['cuda']} sees none of {count} GPUs (driver {version})",
            "update the NVIDIA driver, or install a torch for an older CUDA; look at CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
        return
    yield from _check_devices(driver, facts, precision)
    yield from _check_libraries(facts)


def _check_devices(driver: Driver | None, facts: dict[str, Any], precision: str) -> Iterator[Finding]:
    devices = facts["devices"]
    shown = ", ".join(
        f"{d['name']} ({'.'.join(map(str, d['capability']))}, {d['free_bytes'] / _GIB:.0f} of "
        f"{d['total_bytes'] / _GIB:.0f} GiB free)"
        for d in devices
    )
    yield ok("gpu", f"{shown}; driver {driver.version if driver else '?'}, CUDA {facts['cuda']}, NCCL {facts['nccl']}")
    if driver and len(devices) < len(driver.names):
        yield warning(
            "gpu", f"torch sees {len(devices)} of {len(driver.names)} GPUs", "unset CUDA_VISIBLE_DEVICES to use all"
        )
    if precision in ("auto", "bf16") and any(tuple(d["capability"]) < BF16_CAPABILITY for d in devices):
        yield warning("gpu", "a GPU that has no bf16", "set ARKOR_RAY_DEFAULT_PRECISION=fp16")
    if any(d["free_bytes"] < d["total_bytes"] / 2 for d in devices):
        yield warning("gpu", "more than half of a GPU's memory is taken", "nvidia-smi tells by which process")
    if len(devices) > 1 and facts["nccl"] is None:
        yield fail("gpu", "this torch has no NCCL, which jobs of several workers need", "pip install torch from PyPI")


def _check_libraries(facts: dict[str, Any]) -> Iterator[Finding]:
    if facts.get("bitsandbytes_cuda") is False:
        yield fail(
            "bitsandbytes", f"has no library for CUDA {facts['cuda']}, so load_in_4bit and 8-bit optimizers fail",
            "pip install --upgrade bitsandbytes; `python -m bitsandbytes` says more",
        )  # fmt: skip
    toolkit = facts.get("toolkit")
    if toolkit is not None and toolkit != ".".join(facts["cuda"].split(".")[:2]):
        yield warning(
            "deepspeed", f"the CUDA toolkit is {toolkit} and torch is built for {facts['cuda']}: ops are not compiled",
            f"install the toolkit {facts['cuda']}, or set DS_SKIP_CUDA_CHECK=1 where the major version is the same",
        )  # fmt: skip


def _reinstall(package: str) -> str:
    return f"pip install --force-reinstall {package}; `python -c 'import {package}'` says more"
