"""Writes that were begun and not finished, and the store's own clock, on every backend."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from arkor_ray.errors import StorageError
from arkor_ray.storage.local import LocalStore
from arkor_ray.storage.object_store import ObjectStore, Upload
from arkor_ray.storage.s3 import S3Store
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.s3 import S3Endpoint
from tests.storage.conftest import OpenS3


def begin_upload(store: ObjectStore, key: str) -> None:
    """What a writer leaves behind that is killed in the middle."""
    if isinstance(store, LocalStore):
        (store.root / ".incoming").mkdir(parents=True, exist_ok=True)
        (store.root / ".incoming" / key.replace("/", "-")).write_bytes(b"half of it")
        return
    assert isinstance(store, S3Store)
    store._requests.client.create_multipart_upload(Bucket=store._bucket, Key=store._name(key))


def test_an_upload_under_way_is_told_and_can_be_aborted(store: ObjectStore) -> None:
    assert list(store.uploads()) == []
    for name in ("one", "two"):
        begin_upload(store, f"adapters/{name}")
    first, second = store.uploads()
    assert list(store.list("")) == []
    store.abort(first)
    assert list(store.uploads()) == [second]
    store.abort(first)  # it has ended: nothing happens


def test_an_upload_tells_when_it_began_by_the_clock_of_its_store(
    tmp_path: Path, open_s3: OpenS3, ceph_s3: S3Endpoint
) -> None:
    for store in (LocalStore(tmp_path / "store"), open_s3(ceph_s3)):  # moto's began in 2010, all of them
        begin_upload(store, "adapters/one")
        (upload,) = store.uploads()
        assert abs(upload.begun - store.now()) < timedelta(minutes=1)


def test_uploads_of_others_in_the_bucket_are_not_ours(open_s3: OpenS3, s3_endpoint: S3Endpoint) -> None:
    store = open_s3(s3_endpoint)
    neighbour = S3Store(store._bucket, "some/prefix-2", endpoint_url=s3_endpoint.endpoint_url)
    begin_upload(neighbour, "large")
    assert list(store.uploads()) == []
    assert [upload.key for upload in neighbour.uploads()] == ["large"]


def test_the_list_of_uploads_goes_on_after_a_page(
    open_s3: OpenS3, s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_s3(s3_endpoint)
    for number in range(5):
        begin_upload(store, f"key-{number // 2}")  # two of one key on both sides of a page's end
    whole = store._requests.client.list_multipart_uploads
    monkeypatch.setattr(store._requests.client, "list_multipart_uploads", lambda **given: whole(**given, MaxUploads=1))
    assert sorted(upload.key for upload in store.uploads()) == ["key-0", "key-0", "key-1", "key-1", "key-2"]


def test_a_local_upload_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (tmp_path / "other").write_bytes(b"x")
    store.abort(Upload("", "../../other", datetime.now(UTC)))
    assert (tmp_path / "other").exists()


def test_the_time_is_told_even_by_a_service_that_refuses(
    open_s3: OpenS3, s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_s3(s3_endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert abs(store.now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_service_that_is_away_tells_no_time(open_s3: OpenS3, moto_s3: S3Endpoint) -> None:
    from arkor_ray.storage.retry import RetryPolicy

    with FaultyProxy(moto_s3.endpoint_url) as proxy:
        store = open_s3(moto_s3, url=proxy.url, retry=RetryPolicy(budget_seconds=0.2))
        proxy.fail_for(30)
        with pytest.raises(StorageError):
            store.now()


def test_many_are_deleted_at_once_and_missing_ones_are_no_fault(store: ObjectStore) -> None:
    keys = [f"a/{number}" for number in range(10)]
    for key in [*keys, "b/0"]:
        store.put(key, b"x")
    store.delete_all([*keys, "a/missing"])
    assert [info.key for info in store.list("")] == ["b/0"]
