"""The check of the storage, on real ones, on ones that forbid this or that, and on ones that break their promises."""

# ruff: noqa: F811 - fixtures of another folder are imported, and asked for by their names
from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path

import pytest

from arkor_ray.doctor import storage
from arkor_ray.doctor.findings import Check, Finding, Status, run_all
from arkor_ray.doctor.storage import check_storage, check_store
from arkor_ray.errors import ObjectExistsError
from arkor_ray.storage import ObjectStore
from arkor_ray.storage.local import LocalStore
from arkor_ray.storage.retry import RetryPolicy
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.s3 import S3Endpoint
from tests.storage.conftest import OpenS3, backend, open_s3, store  # noqa: F401


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is about neither large transfers nor patience."""
    monkeypatch.setattr(storage, "LARGE_BYTES", 1000)
    monkeypatch.setattr(storage, "HASTY", QUICK)
    monkeypatch.setattr(storage, "ROUNDS", 1)
    monkeypatch.setattr(storage, "WRITERS", 3)


QUICK = RetryPolicy(budget_seconds=0.3, first_delay_seconds=0.05, longest_delay_seconds=0.1)


class RacyStore(LocalStore):
    """Looks whether the key is taken and then puts: one writer after the other, it is right; several at once all win."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        if if_absent:
            taken = self.head(key) is not None
            time.sleep(0.05)
            if taken:
                raise ObjectExistsError(key)
        super().put(key, data)


class LosingStore(LocalStore):
    """Tells nobody that they won: whoever comes first is told that another did."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        super().put(key, data, if_absent=if_absent)
        if if_absent:
            raise ObjectExistsError(key)


def failed(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found if finding.status is not Status.OK}


def test_a_good_store_passes_and_keeps_nothing(store: ObjectStore):
    found = list(check_store(store))
    assert failed(found) == {}
    assert [finding.name for finding in found] == ["storage", "conditional put"]
    assert (list(store.list("")), list(store.uploads())) == ([], [])


@pytest.mark.parametrize("broken", [RacyStore, LosingStore])
def test_a_conditional_put_that_is_none_is_caught(
    broken: type[LocalStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "LARGE_BYTES", 1000)
    found = failed(list(check_store(broken(tmp_path))))
    assert list(found) == ["conditional put"]
    assert (found["conditional put"].status, "not atomic" in found["conditional put"].found) == (Status.FAIL, True)
    assert list(LocalStore(tmp_path).list("")) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("permission", "names"),
    [
        ("s3:PutObject", {"storage put"}),
        ("s3:GetObject", {"storage get"}),
        ("s3:ListBucket", {"storage list"}),
        ("s3:DeleteObject", {"storage delete"}),
        ("s3:AbortMultipartUpload", {"storage abort of an upload"}),
        ("s3:ListBucketMultipartUploads", {"storage uploads"}),
    ],
)
def test_the_permission_that_is_missing_is_named(
    open_s3: OpenS3,
    ceph_s3: S3Endpoint,
    permission: str,
    names: set[str],
):
    found = failed(list(check_store(forbidding(open_s3, ceph_s3, permission))))
    assert set(found) == names
    (finding,) = found.values()
    assert permission in finding.remedy
    assert (finding.status is Status.WARNING) is (permission == "s3:ListBucketMultipartUploads")


@pytest.mark.usefixtures("quick")
def test_a_user_who_may_only_read_learns_all_that_is_missing(open_s3: OpenS3, ceph_s3: S3Endpoint):
    writing = ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
    found = failed(list(check_store(forbidding(open_s3, ceph_s3, *writing))))
    said = " ".join(finding.remedy for finding in found.values())
    assert set(re.findall(r"s3:\w+", said)) == set(writing)


def forbidding(open_s3: OpenS3, endpoint: S3Endpoint, *permissions: str) -> ObjectStore:
    """A store in a bucket whose policy denies these."""
    store = open_s3(endpoint, retry=QUICK)
    bucket = f"arn:aws:s3:::{store._bucket}"
    denied = {"Effect": "Deny", "Principal": "*", "Action": list(permissions), "Resource": [bucket, f"{bucket}/*"]}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [denied]})
    store._requests.client.put_bucket_policy(Bucket=store._bucket, Policy=policy)
    return store


@pytest.mark.usefixtures("quick")
def test_wrong_keys_and_missing_buckets_name_the_settings(ceph_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch):
    for name, value in ceph_s3.environment.items():
        monkeypatch.setenv(name, value)
    (missing,) = check_storage("s3://nosuchbucket/x", ceph_s3.endpoint_url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    (refused,) = check_storage(f"s3://{ceph_s3.make_bucket()}/x", ceph_s3.endpoint_url)
    for finding, word in ((missing, "NoSuchBucket"), (refused, "SignatureDoesNotMatch")):
        assert (finding.status, word in finding.found) == (Status.FAIL, True), finding
        assert "AWS_SECRET_ACCESS_KEY" in finding.remedy and "another-secret" not in finding.found


@pytest.mark.usefixtures("quick")
def test_a_service_that_comes_and_goes_fails_within_seconds(moto_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch):
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    with FaultyProxy(moto_s3.endpoint_url) as proxy:
        proxy.fail_for(60)
        (finding,) = check_storage(f"s3://{moto_s3.make_bucket()}/x", proxy.url)
    assert (finding.status, finding.name) == (Status.FAIL, "storage put")


def test_a_server_that_takes_connections_and_never_answers_hangs_nobody(monkeypatch: pytest.MonkeyPatch):
    for name, value in S3Endpoint("http://x").environment.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (finding,) = run_all([Check("storage", lambda: check_storage("s3://bucket/x", url), 1.0, "look")]).findings
    assert (finding.status, finding.found) == (Status.FAIL, "no answer within 1 s")


def test_a_folder_is_made_with_the_first_object_and_not_before(tmp_path: Path):
    (finding,) = check_storage((tmp_path / "store").as_uri(), None)
    assert finding.status is Status.OK
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_fails(tmp_path: Path):
    (tmp_path / "store").write_text("")
    found = failed(list(check_storage((tmp_path / "store").as_uri(), None)))
    assert "storage put" in found
