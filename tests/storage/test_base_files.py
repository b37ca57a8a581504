"""A base model out of S3 comes to a node once and whole, or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from arkor_ray.errors import ModelError, StorageError
from arkor_ray.storage import base_files as module
from arkor_ray.storage.base_files import BaseFiles, base_files
from arkor_ray.storage.object_store import open_store
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.s3 import S3Endpoint

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[1]",
    "chat/template.jinja": b"{{ x }}",
    "model-1.safetensors": b"w" * 1000,
}
NOT_NEEDED = {"pytorch_model.bin": b"p", "original/consolidated.00.pth": b"o"}

Fetch = Callable[..., BaseFiles]


@pytest.fixture
def url(moto_s3: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model under a prefix of a bucket, with what tools leave beside the files."""
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{moto_s3.make_bucket()}/models/Qwen3-8B"
    store = open_store(url, endpoint_url=moto_s3.endpoint_url)
    for key, data in (FILES | NOT_NEEDED).items():
        store.put(key, data)
    import boto3

    bucket = url.split("/")[2]
    client = boto3.client("s3", endpoint_url=moto_s3.endpoint_url, region_name="us-east-1")
    client.put_object(Bucket=bucket, Key="models/Qwen3-8B/chat/", Body=b"")
    client.put_object(Bucket=bucket, Key="models/Qwen3-8B/.gitattributes", Body=b"x")
    client.put_object(Bucket=bucket, Key="models/Qwen3-8B-other/config.json", Body=b"a neighbour")
    return url


@pytest.fixture
def proxy(moto_s3: S3Endpoint):
    with FaultyProxy(moto_s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def fetch(url: str, proxy: FaultyProxy, tmp_path: Path) -> Fetch:
    def call(source: str = url, **options: bool) -> BaseFiles:
        return base_files(source, tmp_path / "cache", name="qwen", endpoint_url=proxy.url, **options)

    return call


def content(folder: str | Path) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("reference", ["owner/name", "/models/base"])
def test_models_elsewhere_are_left_where_they_are(reference, tmp_path):
    files = base_files(reference, tmp_path / "cache", name="x")
    assert (files.source, files.path) == (reference, reference)
    assert not (tmp_path / "cache").exists()


def test_a_revision_is_told_apart_from_the_repository(tmp_path):
    files = base_files("owner/name@v1", tmp_path, name="x", trust_remote_code=True)
    assert (files.source, files.path) == ("owner/name", "owner/name")
    assert files.options == {"revision": "v1", "trust_remote_code": True, "name": "x"}


def test_a_model_is_fetched_once_and_without_what_is_not_needed(fetch, url, proxy, tmp_path):
    files = fetch()
    assert content(files.path) == FILES
    assert files.source == url and files.options["revision"] is None
    asked = len(proxy.requests)
    assert fetch() == files == fetch(weights=False)
    assert len(proxy.requests) == asked, "what is here is not asked for again"
    assert folders(tmp_path / "cache") == [Path(files.path)]


def test_a_driver_fetches_no_weights_and_workers_still_do(fetch):
    small = fetch(weights=False)
    assert set(content(small.path)) == {"config.json", "tokenizer.json", "chat/template.jinja"}
    assert content(fetch().path) == FILES


def test_processes_of_one_node_share_one_download(fetch, url, proxy, tmp_path):
    program = (
        "import sys, pathlib; from arkor_ray.storage.base_files import base_files;"
        "print(base_files(sys.argv[1], pathlib.Path(sys.argv[2]), name='qwen', endpoint_url=sys.argv[3]).path)"
    )
    command = [sys.executable, "-c", program, url, str(tmp_path / "cache"), proxy.url]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(paths) == 1 and content(paths.pop()) == FILES
    assert sum("model-1.safetensors" in path for _, path in proxy.requests) == 1


def test_what_a_killed_process_left_is_not_taken_for_the_model(fetch, tmp_path):
    whole = Path(fetch().path)
    whole.rename(whole.with_name(f".{whole.name}.incoming"))
    (whole.with_name(f".{whole.name}.incoming") / "half-a-file").write_bytes(b"x")
    assert content(fetch().path) == FILES
    assert folders(tmp_path / "cache") == [whole]


def test_a_file_of_another_size_than_listed_is_refused_and_nothing_stays(fetch, url, tmp_path, monkeypatch):
    def open_short(*arguments, **options):
        store = open_store(*arguments, **options)
        return SimpleNamespace(
            url=store.url, list=store.list, get_file=lambda key, path: path.parent.mkdir(exist_ok=True) or path.touch()
        )

    monkeypatch.setattr(module, "open_store", open_short)
    with pytest.raises(StorageError, match="got 0 bytes, but it was listed with"):
        fetch()
    assert folders(tmp_path / "cache") == []


def test_a_prefix_without_a_model_is_named(fetch, url):
    with pytest.raises(ModelError, match=rf"'qwen': there is no {url}-none/config\.json"):
        fetch(f"{url}-none")


def test_a_disk_that_is_too_small_is_said_before_it_is_filled(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(StorageError, match="ARKOR_RAY_CACHE_DIR"):
        fetch()
    assert folders(tmp_path / "cache") == []
