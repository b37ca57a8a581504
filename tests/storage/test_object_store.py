"""The contract of `ObjectStore`, on every backend; and how URLs become stores."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from arkor_ray.errors import ObjectExistsError, ObjectNotFoundError
from arkor_ray.storage import ObjectStore, open_store
from arkor_ray.storage.local import LocalStore
from arkor_ray.storage.s3 import S3Store

BAD_KEYS = [
    "",
    "/etc/passwd",
    "../outside",
    "a/../../outside",
    "a/..",
    "a/./b",
    "a//b",
    "a/",
    ".incoming/x",
    "a/.hidden",
    "a\\b",
    "a\nb",
    "a\0b",
    "a/" * 450 + "b",
    "n" * 300,
]


def test_what_was_put_can_be_got(store: ObjectStore) -> None:
    store.put("a/b.json", b"one")
    store.put("a/empty", b"")
    store.put("a/b.json", b"two")
    assert store.get("a/b.json") == b"two"
    assert store.get("a/empty") == b""


def test_keys_may_hold_any_ordinary_name(store: ObjectStore) -> None:
    keys = ["a b/c+é&=?#%20.bin", "x" * 200, "~tilde/日本語"]
    for key in keys:
        store.put(key, key.encode())
    assert [info.key for info in store.list("")] == sorted(keys)
    assert all(store.get(key) == key.encode() for key in keys)


def test_bad_keys_are_refused_by_every_method(store: ObjectStore, tmp_path: Path) -> None:
    calls: list[Callable[[str], object]] = [
        lambda key: store.put(key, b"x"),
        lambda key: store.put(key, b"x", if_absent=True),
        lambda key: store.put_file(key, Path(__file__)),
        lambda key: store.put_file(key, Path(__file__), if_absent=True),
        lambda key: store.get(key),
        lambda key: store.get_file(key, tmp_path / "target"),
        lambda key: store.head(key),
        lambda key: store.delete(key),
    ]
    for key in BAD_KEYS:
        for call in calls:
            with pytest.raises(ValueError, match="no object key"):
                call(key)
    assert not list(store.list(""))


def test_missing_keys(store: ObjectStore, tmp_path: Path) -> None:
    store.put("folder/object", b"x")
    for key in ("nothing", "folder", "folder/object/below"):
        with pytest.raises(ObjectNotFoundError, match=key):
            store.get(key)
        with pytest.raises(ObjectNotFoundError):
            store.get_file(key, tmp_path / "target")
        assert store.head(key) is None
        store.delete(key)
    assert not list(tmp_path.glob("*target*"))
    assert store.get("folder/object") == b"x"


def test_head_tells_size_and_time(store: ObjectStore) -> None:
    before = datetime.now(UTC)
    store.put("a", b"12345")
    info = store.head("a")
    assert info is not None
    assert (info.key, info.size) == ("a", 5)
    # S3 knows whole seconds only.
    assert timedelta(seconds=-2) < info.modified - before < timedelta(minutes=5)


def test_list_is_sorted_and_by_prefix(store: ObjectStore) -> None:
    keys = ["a/b/c", "a/b-1", "a/b.2", "a/bc", "a/b/d/e", "b"]
    for key in reversed(keys):
        store.put(key, b"x")
    assert [info.key for info in store.list("a/b")] == ["a/b-1", "a/b.2", "a/b/c", "a/b/d/e", "a/bc"]
    assert [info.key for info in store.list("a/b/")] == ["a/b/c", "a/b/d/e"]
    assert [info.key for info in store.list("a/b/d/e")] == ["a/b/d/e"]
    assert [(info.key, info.size) for info in store.list("b")] == [("b", 1)]
    assert not list(store.list("c"))
    assert not list(store.list("a/b/c/d"))
    with pytest.raises(ValueError, match="dot"):
        list(store.list("../"))


def test_more_keys_than_fit_on_a_page(store: ObjectStore) -> None:
    # S3 answers with 1000 at most.
    keys = [f"many/{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert [info.key for info in store.list("many/")] == keys
    store.delete_prefix("many/")
    assert not list(store.list(""))


def test_delete_prefix_takes_the_folder_and_nothing_else(store: ObjectStore) -> None:
    for key in ("job-step-1/a", "job-step-1/b/c", "job-step-10/a", "job-step-1x"):
        store.put(key, b"x")
    store.delete_prefix("job-step-1/")
    store.delete_prefix("nothing/")
    assert [info.key for info in store.list("")] == ["job-step-10/a", "job-step-1x"]
    for prefix in ("", "job-step-1", "../"):
        with pytest.raises(ValueError):
            store.delete_prefix(prefix)
    assert len(list(store.list(""))) == 2


def test_files_of_all_sizes_survive_the_round_trip(store: ObjectStore, backend: str, tmp_path: Path) -> None:
    largest = 50 << 20 if backend == "ceph" else 20 << 20
    for size in (0, 1, 16 << 20, (16 << 20) + 1, largest):
        source, target = tmp_path / "source", tmp_path / "new" / "folder" / "target"
        source.write_bytes(os.urandom(size))
        store.put_file("files/it", source)
        info = store.head("files/it")
        assert info is not None
        assert info.size == size
        store.get_file("files/it", target)
        assert sha256(target.read_bytes()) == sha256(source.read_bytes())
        assert sha256(store.get("files/it")) == sha256(source.read_bytes())
        assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_large_bytes_survive_the_round_trip(store: ObjectStore) -> None:
    data = os.urandom((17 << 20) + 3)
    store.put("large", data)
    assert sha256(store.get("large")) == sha256(data)


def test_file_that_is_not_there_is_the_callers_mistake(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put_file("a", tmp_path / "nothing")
    assert not list(store.list(""))


def test_conditional_put_never_replaces(store: ObjectStore) -> None:
    store.put("manifest", b"first", if_absent=True)
    for data in (b"second", b"first"):
        with pytest.raises(ObjectExistsError, match="manifest"):
            store.put("manifest", data, if_absent=True)
    assert store.get("manifest") == b"first"
    store.delete("manifest")
    store.put("manifest", b"third", if_absent=True)
    assert store.get("manifest") == b"third"


@pytest.mark.parametrize("size", [0, 1, (20 << 20) + 5])
def test_conditional_put_of_a_file_never_replaces(store: ObjectStore, tmp_path: Path, size: int) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(os.urandom(size))
    second.write_bytes(os.urandom(size + 1))
    store.put_file("weights", first, if_absent=True)
    for path in (second, first):
        with pytest.raises(ObjectExistsError, match="weights"):
            store.put_file("weights", path, if_absent=True)
    assert sha256(store.get("weights")) == sha256(first.read_bytes())
    store.put_file("weights", second)
    assert sha256(store.get("weights")) == sha256(second.read_bytes())


def test_conditional_put_of_a_file_has_one_winner(store: ObjectStore, backend: str, tmp_path: Path) -> None:
    if backend == "moto":
        pytest.skip("moto keeps no promise about large objects that are put at the same time")
    paths = [tmp_path / str(writer) for writer in range(4)]
    for path in paths:
        path.write_bytes(os.urandom(9 << 20))

    def won(path: Path, key: str) -> bool:
        try:
            store.put_file(key, path, if_absent=True)
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        for round_ in range(3):
            key = f"race/{round_}"
            winners = [p for p, did in zip(paths, pool.map(won, paths, [key] * 4), strict=True) if did]
            assert len(winners) == 1
            assert sha256(store.get(key)) == sha256(winners[0].read_bytes())


def test_conditional_put_has_one_winner_among_threads(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        for round_ in range(10):
            key = f"race/{round_}"
            won = list(pool.map(lambda writer, key=key: try_to_put(store, key, writer), range(8)))
            assert sum(won) == 1
            assert store.get(key) == content_of(won.index(True))


def test_conditional_put_has_one_winner_among_processes(store: ObjectStore) -> None:
    keys = [f"race/{round_}" for round_ in range(20)]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        won = pool.starmap(put_all, [(store, keys, writer) for writer in range(4)])
    for number, key in enumerate(keys):
        winners = [writer for writer in range(4) if won[writer][number]]
        assert len(winners) == 1
        assert store.get(key) == content_of(winners[0])


def test_readers_see_a_whole_object_or_none(store: ObjectStore) -> None:
    """While one writer replaces the object, every read is one of the contents written, never a mixture."""
    contents = [bytes([number]) * 300_000 for number in range(8)]
    store.put("shared", contents[0])
    with ThreadPoolExecutor(4) as pool:
        writer = pool.submit(put_in_turn, store, "shared", contents * 5)
        while not writer.done():
            for seen in pool.map(lambda _: store.get("shared"), range(3)):
                assert seen in contents
        writer.result()


def test_store_can_be_pickled(store: ObjectStore) -> None:
    store.put("a", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get("a") == b"x"
    assert copy.url == store.url


def test_open_store_by_url(tmp_path: Path) -> None:
    local = open_store(f"file://{tmp_path}/with%20space")
    assert isinstance(local, LocalStore)
    assert local.root == tmp_path / "with space"
    odd = LocalStore(tmp_path / "a#b?c%20d")
    reopened = open_store(odd.url)
    assert isinstance(reopened, LocalStore)
    assert reopened.root == odd.root
    assert open_store(local.url).url == local.url
    s3 = open_store("s3://bucket/some/prefix/", endpoint_url="http://127.0.0.1:9")
    assert isinstance(s3, S3Store)
    assert s3.url == "s3://bucket/some/prefix"
    assert open_store("s3://bucket").url == "s3://bucket"


@pytest.mark.parametrize(
    "url", ["", "/a/b", "file://relative/path", "file:relative", "s3:///prefix", "s3://bucket/../x", "gs://bucket/x"]
)
def test_open_store_refuses_other_urls(url: str) -> None:
    with pytest.raises(ValueError):
        open_store(url)


def test_storage_imports_without_boto3_and_says_how_to_get_it() -> None:
    script = """
import sys
import arkor_ray.storage
assert "boto3" not in sys.modules
sys.modules["boto3"] = None
arkor_ray.storage.open_store("file:///tmp/store")
try:
    arkor_ray.storage.open_store("s3://bucket/prefix")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'arkor-ray[s3]'" in done.stdout


def try_to_put(store: ObjectStore, key: str, writer: int) -> bool:
    try:
        store.put(key, content_of(writer), if_absent=True)
    except ObjectExistsError:
        return False
    return True


def put_in_turn(store: ObjectStore, key: str, contents: list[bytes]) -> None:
    for content in contents:
        store.put(key, content)


def put_all(store: ObjectStore, keys: list[str], writer: int) -> list[bool]:
    return [try_to_put(store, key, writer) for key in keys]


def content_of(writer: int) -> bytes:
    return bytes([writer]) * 100_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
