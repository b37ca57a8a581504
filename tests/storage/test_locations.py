from __future__ import annotations

import pytest

from arkor_ray.errors import InvalidRequestError
from arkor_ray.storage.local import LocalStore
from arkor_ray.storage.locations import folder_url, open_file
from arkor_ray.storage.s3 import S3Store


@pytest.mark.parametrize("text", ["runs", "./runs", "http://host/runs", "ftp://x"])
def test_a_place_that_would_go_with_the_job_is_refused(text):
    with pytest.raises(InvalidRequestError, match=r"--output: .* must be an absolute path"):
        folder_url(text, param="--output")


def test_paths_and_urls_name_folders():
    assert folder_url("/data/my runs", param="x") == "file:///data/my%20runs"
    assert folder_url("file:///data/", param="x") == "file:///data"
    assert folder_url("s3://bucket/a/", param="x") == "s3://bucket/a"


def test_a_file_is_its_folder_and_its_name(tmp_path):
    store, name = open_file(str(tmp_path / "a" / "out.jsonl"), param="--output")
    assert isinstance(store, LocalStore) and (store.root, name) == (tmp_path / "a", "out.jsonl")
    store, name = open_file("s3://bucket/a/out.jsonl", param="--output")
    assert isinstance(store, S3Store) and (store.url, name) == ("s3://bucket/a", "out.jsonl")


@pytest.mark.parametrize("text", ["s3://bucket", "/data/.hidden", "/"])
def test_what_names_no_file_is_refused(text):
    with pytest.raises(InvalidRequestError, match="names no file"):
        open_file(text, param="--output")


def test_an_endpoint_that_is_no_url_is_refused_by_its_variable(monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_S3_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(
        InvalidRequestError, match=r"ARKOR_RAY_S3_ENDPOINT_URL: '127.0.0.1:9000' must begin with http://"
    ):
        open_file("s3://bucket/a/out.jsonl", param="--output")
