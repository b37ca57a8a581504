"""What only S3 can get wrong: outages, lost answers, half uploads, secrets in messages. Faults come from a proxy."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from arkor_ray.errors import ObjectExistsError, ObjectNotFoundError, StorageError
from arkor_ray.storage import s3
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.storage.s3 import S3Store
from tests.servers.faulty_proxy import Fault, FaultyProxy
from tests.servers.s3 import S3Endpoint
from tests.storage.conftest import OpenS3

PATIENT = RetryPolicy(budget_seconds=120, first_delay_seconds=0.05, longest_delay_seconds=0.3)
HASTY = RetryPolicy(budget_seconds=0.5, first_delay_seconds=0.05, longest_delay_seconds=0.1)
LARGE = (20 << 20) + 5

OUTAGES = [Fault.UNAVAILABLE, Fault.DROP_REQUEST, Fault.LOSE_ANSWER]


@pytest.fixture
def proxy(s3_endpoint: S3Endpoint) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_endpoint.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def patient(open_s3: OpenS3, s3_endpoint: S3Endpoint, proxy: FaultyProxy) -> S3Store:
    return open_s3(s3_endpoint, url=proxy.url, retry=PATIENT)


@pytest.fixture
def hasty(open_s3: OpenS3, s3_endpoint: S3Endpoint, proxy: FaultyProxy) -> S3Store:
    return open_s3(s3_endpoint, url=proxy.url, retry=HASTY)


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(LARGE))
    return path


@pytest.mark.parametrize("fault", OUTAGES)
def test_every_operation_survives_an_outage(
    patient: S3Store, proxy: FaultyProxy, large_file: Path, tmp_path: Path, fault: Fault
) -> None:
    target = tmp_path / "target"
    for operation in (
        lambda: patient.put("small", b"x"),
        lambda: patient.put("manifest", b"y", if_absent=True),
        lambda: patient.put_file("large", large_file),
        lambda: patient.put_file("weights", large_file, if_absent=True),
        lambda: patient.get_file("large", target),
        lambda: patient.head("small"),
        lambda: list(patient.list("")),
        lambda: patient.delete("nothing"),
    ):
        failed = proxy.failed
        proxy.fail_next(4, fault)
        operation()
        assert proxy.failed == failed + 4
    assert target.read_bytes() == large_file.read_bytes()
    assert (patient.get("small"), patient.get("manifest")) == (b"x", b"y")
    assert patient.get("weights") == large_file.read_bytes()
    assert [info.key for info in patient.list("")] == ["large", "manifest", "small", "weights"]


def test_outage_in_the_middle_of_an_upload_repeats_only_what_failed(
    patient: S3Store, proxy: FaultyProxy, large_file: Path
) -> None:
    proxy.fail_next(1, matching=lambda method, path: "partNumber=2" in path)
    patient.put_file("large", large_file)
    parts = [path for method, path in proxy.requests if method == "PUT"]
    assert len(parts) == 4
    assert sum("partNumber=2" in path for path in parts) == 2
    assert patient.get("large") == large_file.read_bytes()


def test_object_appears_only_when_its_upload_is_whole(patient: S3Store, proxy: FaultyProxy, large_file: Path) -> None:
    patient.put("before", b"x")
    with ThreadPoolExecutor(1) as pool:
        proxy.fail_for(60, matching=lambda method, path: "partNumber=3" in path)
        upload = pool.submit(patient.put_file, "large", large_file)
        while proxy.failed < 3:
            time.sleep(0.01)
            assert not upload.done()
        assert patient.head("large") is None
        with pytest.raises(ObjectNotFoundError):
            patient.get("large")
        assert [info.key for info in patient.list("")] == ["before"]
        proxy.heal()
        upload.result()
    assert patient.head("large") is not None


@pytest.mark.parametrize("fault", OUTAGES)
def test_outage_beyond_the_budget_is_a_storage_error(
    hasty: S3Store, proxy: FaultyProxy, large_file: Path, tmp_path: Path, fault: Fault
) -> None:
    hasty.put("old", b"x")
    target = tmp_path / "target"
    target.write_bytes(b"as it was")
    proxy.fail_for(600, fault)
    for action in (
        lambda: hasty.put_file("large", large_file),
        lambda: hasty.get("old"),
        lambda: hasty.get_file("old", target),
        lambda: hasty.head("old"),
        lambda: list(hasty.list("")),
    ):
        failed = proxy.failed
        with pytest.raises(StorageError, match=r"failed for 0\.5 s") as raised:
            action()
        assert proxy.url in str(raised.value)
        assert proxy.failed > failed + 1
    assert target.read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "target"]
    proxy.heal()
    assert [info.key for info in hasty.list("")] == ["old"]


def test_failed_upload_is_aborted(hasty: S3Store, proxy: FaultyProxy, large_file: Path) -> None:
    proxy.fail_for(600, matching=lambda method, path: "partNumber=2" in path)
    with pytest.raises(StorageError, match="part 2"):
        hasty.put_file("large", large_file)
    assert [method for method, _ in proxy.requests][-1] == "DELETE"
    client = hasty._requests.client
    assert not client.list_multipart_uploads(Bucket=hasty._requests.bucket).get("Uploads")
    assert hasty.head("large") is None


def test_conditional_put_whose_answer_is_lost_has_won(patient: S3Store, proxy: FaultyProxy) -> None:
    proxy.fail_next(1, Fault.LOSE_ANSWER)
    patient.put("manifest", b"mine", if_absent=True)
    assert patient.get("manifest") == b"mine"
    with pytest.raises(ObjectExistsError):
        patient.put("manifest", b"mine", if_absent=True)


def test_conditional_put_that_lost_while_its_answer_was_lost(patient: S3Store, proxy: FaultyProxy) -> None:
    patient.put("manifest", b"theirs", if_absent=True)
    for fault in OUTAGES:
        for data in (b"mine", b"longer than theirs"):
            proxy.fail_next(1, fault)
            with pytest.raises(ObjectExistsError):
                patient.put("manifest", data, if_absent=True)
    assert patient.get("manifest") == b"theirs"


def test_conditional_put_that_was_frozen_in_the_middle_replaces_nothing(
    open_s3: OpenS3, s3_endpoint: S3Endpoint, large_file: Path
) -> None:
    """As of a machine that was paused for minutes and is told of nothing."""
    store, late = open_s3(s3_endpoint), os.urandom(LARGE)
    url = store._requests.client.generate_presigned_url(
        "put_object", Params={"Bucket": store._bucket, "Key": store._name("weights"), "IfNoneMatch": "*"}
    )
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    with closing(connection):
        connection.putrequest("PUT", f"{address.path}?{address.query}")
        connection.putheader("If-None-Match", "*")
        connection.putheader("Content-Length", str(LARGE))
        connection.endheaders(late[: LARGE // 2])
        store.put_file("weights", large_file, if_absent=True)
        connection.send(late[LARGE // 2 :])
        assert connection.getresponse().status == 412
    assert store.get("weights") == large_file.read_bytes()


def test_conditional_put_of_more_than_one_request_may_carry(
    open_s3: OpenS3, moto_s3: S3Endpoint, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the service takes a condition at the end of an upload in parts, as AWS does."""
    monkeypatch.setattr(s3, "CONDITIONAL_BYTES", LARGE - 1)
    store = open_s3(moto_s3)
    store.put_file("weights", large_file, if_absent=True)
    assert store.get("weights") == large_file.read_bytes()
    with pytest.raises(ObjectExistsError):
        store.put_file("weights", large_file, if_absent=True)
    assert list(store.uploads()) == []


def test_conditional_put_has_one_winner_through_an_outage(patient: S3Store, proxy: FaultyProxy) -> None:
    """Every second answer is lost, so that nobody can be sure of the first send."""
    turn = iter(range(10_000))
    lock = threading.Lock()

    def every_second(method: str, path: str) -> bool:
        with lock:
            return method == "PUT" and next(turn) % 2 == 0

    proxy.fail_for(600, Fault.LOSE_ANSWER, matching=every_second)

    def won(writer: int, key: str) -> bool:
        try:
            patient.put(key, b"%d" % writer, if_absent=True)
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for round_ in range(5):
            key = f"race/{round_}"
            winners = [w for w, did in enumerate(pool.map(won, range(8), [key] * 8)) if did]
            assert len(winners) == 1
            assert patient.get(key) == b"%d" % winners[0]


def test_upload_whose_last_answer_is_lost_is_complete(patient: S3Store, proxy: FaultyProxy, large_file: Path) -> None:
    proxy.fail_next(1, Fault.LOSE_ANSWER, matching=lambda method, path: method == "POST" and "uploadId=" in path)
    patient.put_file("large", large_file)
    assert proxy.failed == 1
    assert patient.get("large") == large_file.read_bytes()


def test_answers_that_break_off_are_asked_again(
    patient: S3Store, proxy: FaultyProxy, large_file: Path, tmp_path: Path
) -> None:
    patient.put("small", b"x" * 100_000)
    patient.put_file("large", large_file)
    proxy.fail_next(2, Fault.CUT_ANSWER)
    assert patient.get("small") == b"x" * 100_000
    # The first answer tells the size and is not read; the parts after it are.
    proxy.fail_next(3, Fault.CUT_ANSWER)
    patient.get_file("large", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == large_file.read_bytes()


def test_object_replaced_during_a_parallel_get_is_noticed(
    patient: S3Store, proxy: FaultyProxy, large_file: Path, tmp_path: Path
) -> None:
    patient.put_file("large", large_file)
    with ThreadPoolExecutor(1) as pool:
        proxy.fail_for(60, matching=lambda method, path: method == "GET" and len(proxy.requests) > first + 1)
        first = len(proxy.requests)
        read = pool.submit(patient.get_file, "large", tmp_path / "target")
        while proxy.failed < 3:
            time.sleep(0.01)
        patient.put("large", os.urandom(LARGE))
        proxy.heal()
        with pytest.raises(StorageError, match="replaced while it was being read"):
            read.result()
    assert not (tmp_path / "target").exists()


def test_missing_bucket_is_not_a_missing_object(open_s3: OpenS3, s3_endpoint: S3Endpoint) -> None:
    open_s3(s3_endpoint)
    store = S3Store("no-such-bucket-here", endpoint_url=s3_endpoint.endpoint_url)
    for call in (
        lambda: store.get("a"),
        lambda: store.put("a", b"x"),
        lambda: list(store.list("")),
        lambda: store.head("a"),
    ):
        with pytest.raises(StorageError, match="NoSuchBucket") as raised:
            call()
        assert not isinstance(raised.value, ObjectNotFoundError)


def test_wrong_credentials_fail_at_once_and_are_not_shown(
    open_s3: OpenS3, ceph_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_s3(ceph_s3, retry=RetryPolicy(budget_seconds=1e6, first_delay_seconds=1e5, longest_delay_seconds=1e5))
    for name, value in (("AWS_SECRET_ACCESS_KEY", "wrong-secret"), ("AWS_ACCESS_KEY_ID", "wrong-access")):
        monkeypatch.setenv(name, value)
        store = S3Store(*store._arguments[:2], endpoint_url=ceph_s3.endpoint_url)
        with pytest.raises(StorageError, match="HTTP 403") as raised:
            store.put("a", b"x")
        for secret in (ceph_s3.access_key, ceph_s3.secret_key, "wrong-secret", "wrong-access"):
            assert secret not in str(raised.value)


def test_missing_credentials_say_what_to_set(
    s3_endpoint: S3Endpoint, open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_s3(s3_endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="Set AWS_ACCESS_KEY_ID"):
        S3Store("bucket", endpoint_url=s3_endpoint.endpoint_url).get("a")


@pytest.mark.parametrize(
    "endpoint_url", ["http://user:secret@host", "https://user@host:1", "host:9000", "ftp://host", ""]
)
def test_bad_endpoints_are_refused_without_showing_them(endpoint_url: str) -> None:
    with pytest.raises(ValueError) as raised:
        S3Store("bucket", endpoint_url=endpoint_url)
    assert "secret@" not in str(raised.value)
    assert "user" not in str(raised.value)


def test_server_that_is_not_there(open_s3: OpenS3, s3_endpoint: S3Endpoint) -> None:
    store = open_s3(s3_endpoint, url="http://127.0.0.1:9", retry=HASTY)
    with pytest.raises(StorageError, match=r"s3://test-\w+/some/prefix/a at http://127\.0\.0\.1:9 failed for 0\.5 s"):
        store.put("a", b"x")
