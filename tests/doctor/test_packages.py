from __future__ import annotations

import sys

import pytest

from arkor_ray.doctor.findings import Status
from arkor_ray.doctor.packages import (
    EXTRAS,
    check_installation,
    check_packages,
    check_python,
    installed_requirements,
    parse_requirements,
)  # fmt: skip

LINES = [
    "httpx>=0.27",
    'ray[default,serve]>=2.60; extra == "server"',
    'torch>=2.6; extra == "train"',
    'peft>=0.14; extra == "serve"',
    'boto3>=1.36; extra == "s3"',
    'psycopg[binary]>=3.2; extra == "postgres"',
    'arkor-ray[postgres,s3,serve,server,train]; extra == "all"',
    'types-PyYAML; extra == "dev"',
]
ALL = {"httpx": "0.28", "ray": "2.60.0", "torch": "2.13.0+cpu", "peft": "0.14", "boto3": "1.44", "psycopg": "3.2.1"}


def found(installed: dict[str, str]):
    return list(check_packages(parse_requirements(LINES), installed.get))


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in ALL.items() if name not in names}


def test_a_whole_installation_is_well():
    assert [f.status for f in found(ALL)] == [Status.OK]


def test_extras_that_a_service_may_do_without_are_named_and_no_fault():
    (finding,) = found(without("boto3", "psycopg"))
    assert finding.status is Status.OK
    assert "s3 (lacks boto3), postgres (lacks psycopg)" in finding.found


def test_the_base_install_is_enough_for_a_client_and_says_what_a_service_needs():
    (finding,) = found({"httpx": "0.28"})
    assert finding.status is Status.WARNING
    assert all(f"{extra} (lacks" in finding.found for extra in EXTRAS)
    assert finding.remedy == "pip install 'arkor-ray[all]'"


@pytest.mark.parametrize(("version", "is_old"), [("2.59.9", True), ("2.60", False), ("2.60.0rc1", False), ("3", False)])
def test_what_is_below_its_bound_fails_by_name(version, is_old):
    old = [f for f in found({**ALL, "ray": version}) if f.name == "versions"]
    assert bool(old) is is_old
    if old:
        assert (old[0].status, "ray 2.59.9 (needs 2.60)" in old[0].found) == (Status.FAIL, True)


def test_an_old_python_fails():
    assert check_python((3, 10, 14), "3.11").status is Status.FAIL
    assert check_python((3, 11, 0), "3.11").status is Status.OK


def test_every_requirement_of_this_package_is_understood():
    requirements, lowest = installed_requirements()
    assert {each.extra for each in requirements} >= set(EXTRAS)
    assert ("torch", "2.6", "train") in {(each.name, each.lowest, each.extra) for each in requirements}
    assert sys.version_info[:2] >= tuple(map(int, lowest.split(".")))


def test_this_installation_meets_its_own_bounds():
    assert Status.FAIL not in {finding.status for finding in check_installation()}


def test_a_requirement_of_another_form_is_not_passed_over():
    with pytest.raises(ValueError, match="torch~=2"):
        parse_requirements(["torch~=2"])
