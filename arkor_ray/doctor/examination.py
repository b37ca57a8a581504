"""The whole examination: which checks there are for this installation and these settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from arkor_ray.doctor import clocks, database, gpu, machine, packages, ray_cluster, service, storage
from arkor_ray.doctor.children import ask_module
from arkor_ray.doctor.findings import (
    Check,
    Examination,
    Finding,
    fail,
    known_secrets,
    ok,
    run_all,
    warning,
    without_secrets,
)
from arkor_ray.errors import InvalidRequestError

if TYPE_CHECKING:
    from arkor_ray.settings import Settings

HEAVY = ("ray", "torch", "bitsandbytes", "deepspeed")  # the later ones load the earlier ones anyway
DATABASE_S, STORAGE_S, IMPORTS_S, RAY_S, API_S = 20.0, 60.0, 150.0, 120.0, 15.0


@dataclass(frozen=True)
class Subject:
    """What is examined: `ray_address` is HOST:PORT of a Ray to join, None for the one that `arkor-ray up` starts."""

    data_dir: Path
    ray_address: str | None = None


def examine(subject: Subject) -> Examination:
    """All of it, without secrets. Takes as long as the slowest check, and none takes longer than its limit."""
    settings, told = _settings(subject.data_dir)
    examined = run_all(checks_of(subject, settings))
    secrets = known_secrets(
        settings.database_url if settings is not None else os.environ.get("ARKOR_RAY_DATABASE_URL", "")
    )
    findings = [
        replace(each, found=without_secrets(each.found, secrets), remedy=without_secrets(each.remedy, secrets))
        for each in [*told, *examined.findings]
    ]
    return replace(examined, findings=findings)


def checks_of(subject: Subject, settings: Settings | None) -> list[Check]:
    """Without settings, those that need none."""
    precision = settings.default_precision if settings is not None else "auto"
    folders = {"the system's temporary files": Path("/tmp")}
    if settings is not None:
        folders |= {"the data directory": settings.data_dir, "the cache": settings.cache_dir}
    checks = [
        Check("packages", packages.check_installation, 20.0, "pip check"),
        Check("imports", lambda: _check_loading(precision), IMPORTS_S + 30, "pip check"),
        Check(
            "machine", lambda: machine.check_machine(machine.read_machine(folders)), 20.0, "look for a hanging mount"
        ),
    ]
    if settings is None:
        return checks
    urls = (settings.storage_url, settings.s3_endpoint_url)
    hanging_database = "ARKOR_RAY_DATABASE_URL: check the host, the firewall and locks of other clients"
    checks += [
        Check("database", lambda: database.check_database(settings.database_url), DATABASE_S, hanging_database),
        Check("storage", lambda: storage.check_storage(*urls), STORAGE_S, storage.CHECK_SETTINGS),
        Check("clock", lambda: clocks.measure_clocks(settings.database_url, *urls), DATABASE_S, clocks.REMEDY),
        Check("api", lambda: _check_service(settings), API_S, "look at the service's log, or restart it"),
    ]
    address = subject.ray_address
    if address is not None and packages.installed_version("ray") is not None:
        environment = settings.environment()
        run = lambda: ray_cluster.probe(address, environment, RAY_S - 10)  # noqa: E731
        checks.append(Check("ray", run, RAY_S, "look whether `ray status` works there"))
    return checks


def _settings(data_dir: Path) -> tuple[Settings | None, list[Finding]]:
    try:
        from arkor_ray.settings import Settings
    except ModuleNotFoundError as error:
        said = f"not looked at, nor what they lead to: {error.name} is not installed"
        return None, [warning("settings", said, "pip install 'arkor-ray[all]'")]
    try:
        settings = Settings.load(data_dir=data_dir)
    except InvalidRequestError as error:
        return None, [fail("settings", error.message, "correct or unset that variable")]
    given = sorted(name for name in os.environ if name.startswith("ARKOR_RAY_"))
    return settings, [ok("settings", f"data in {settings.data_dir}" + (f"; set: {', '.join(given)}" if given else ""))]


def _check_loading(precision: str) -> Iterator[Finding]:
    driver = gpu.read_driver()
    if isinstance(driver, Finding):
        yield driver
        driver = None
    installed = [name for name in HEAVY if packages.installed_version(name) is not None]
    facts = None
    if installed:
        said = ask_module("arkor_ray.doctor.loading", *installed, limit_s=IMPORTS_S)
        yield from gpu.check_loading(installed, said)
        facts = next((line["accelerators"] for line in said.objects() if "accelerators" in line), None)
        if facts is None and "torch" in installed:
            return  # why is told
    yield from gpu.check_gpus(driver, facts, precision)


def _check_service(settings: Settings) -> Iterator[Finding]:
    from arkor_ray.embedded import read_instance

    instance = read_instance(settings.data_dir)
    yield service.check_exposure(settings.host, bool(settings.anonymous))
    yield from service.check_api(settings, instance)
