from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from arkor_ray.doctor import clocks
from arkor_ray.doctor.clocks import Skew, check_clocks, measure, measure_clocks
from arkor_ray.doctor.findings import Status
from tests.servers.s3 import S3Endpoint


def skew(seconds: float, margin: float = 0.01) -> Skew:
    return Skew(timedelta(seconds=seconds), timedelta(seconds=margin))


@pytest.mark.parametrize(
    ("ahead", "margin", "status"),
    [
        (0.2, 0, Status.OK),
        (-4.9, 0, Status.OK),
        (-7, 0, Status.WARNING),
        (7, 3, Status.OK),  # it may have been the network
        (899, 0, Status.WARNING),
        (-901, 0, Status.FAIL),
    ],
)
def test_skew_is_told_by_what_it_breaks(ahead: float, margin: float, status: Status):
    (finding,) = check_clocks({"storage": skew(ahead, margin)})
    assert finding.status is status
    assert ("behind" in finding.found) is (ahead < 0 and status is not Status.OK)


def test_a_clock_that_is_wrong_leaves_the_others_well():
    found = list(check_clocks({"database": skew(60), "storage": skew(0)}))
    assert [(f.status, f.found.split()[0]) for f in found] == [(Status.WARNING, "that"), (Status.OK, "storage")]


def test_half_of_the_way_there_and_back_is_the_margin():
    measured = measure(lambda: datetime.now(UTC) + timedelta(hours=1))
    assert abs(measured.ahead - timedelta(hours=1)) <= measured.margin + timedelta(seconds=1)
    assert measured.margin >= timedelta()


def test_real_clocks_are_read(postgres_url: str, s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3_endpoint.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_endpoint.make_bucket()}/x"
    (finding,) = measure_clocks(postgres_url, url, s3_endpoint.endpoint_url)
    assert finding.status is Status.OK
    assert "database" in finding.found and "storage" in finding.found


def test_what_is_away_or_here_has_no_clock(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def away(url: str) -> Skew:
        raise OSError("refused")

    monkeypatch.setattr(clocks, "_of_database", away)
    assert list(measure_clocks("postgresql://x/y", tmp_path.as_uri(), None)) == []
    assert list(measure_clocks("sqlite:////x", tmp_path.as_uri(), None)) == []
