from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from arkor_ray.serving.blob_cache import BlobCache, RamCache


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_keeps_bytes_across_restarts(tmp_path):
    BlobCache(tmp_path, max_bytes=100).put(sha(b"x"), b"x")
    assert BlobCache(tmp_path, max_bytes=100).get(sha(b"x")) == b"x"
    assert BlobCache(tmp_path, max_bytes=100).get(sha(b"y")) is None


def test_damaged_file_is_fetched_again(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=100)
    cache.put(sha(b"right"), b"right")
    (tmp_path / "blobs" / sha(b"right")).write_bytes(b"wrong")
    assert cache.get_or_fetch(sha(b"right"), lambda: b"right") == (b"right", False)
    assert cache.get(sha(b"right")) == b"right"


def test_longest_unread_leaves_when_room_is_needed(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=25)
    blobs = [bytes([i]) * 10 for i in range(3)]
    for age, blob in zip((300, 200), blobs, strict=False):
        cache.put(sha(blob), blob)
        then = time.time() - age
        os.utime(tmp_path / "blobs" / sha(blob), (then, then))
    assert cache.get(sha(blobs[0]))  # read just now: the second is the older one
    cache.put(sha(blobs[2]), blobs[2])
    assert [cache.get(sha(blob)) is not None for blob in blobs] == [True, False, True]


def test_failed_fetch_leaves_nothing(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=100)

    def broken() -> bytes:
        raise OSError("down")

    with pytest.raises(OSError):
        cache.get_or_fetch(sha(b"x"), broken)
    assert list((tmp_path / "blobs").iterdir()) == []
    assert cache.get_or_fetch(sha(b"x"), lambda: b"x") == (b"x", False)


def test_threads_fetch_once(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=100)
    fetched = []

    def fetch() -> bytes:
        fetched.append(threading.get_ident())
        time.sleep(0.02)
        return b"x"

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: cache.get_or_fetch(sha(b"x"), fetch)[0], range(6)))
    assert found == [b"x"] * 6
    assert len(fetched) == 1


def test_processes_of_a_node_fetch_once(tmp_path):
    program = """
import sys, time, hashlib, pathlib
from arkor_ray.serving.blob_cache import BlobCache
def fetch():
    with open(sys.argv[2], "a") as log: log.write("fetched\\n")
    time.sleep(0.3)
    return b"x"
print(BlobCache(pathlib.Path(sys.argv[1]), max_bytes=100).get_or_fetch(hashlib.sha256(b"x").hexdigest(), fetch)[0])
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "cache"), str(tmp_path / "log")]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(3)]
    assert [p.communicate(timeout=60)[0].strip() for p in running] == [b"b'x'"] * 3
    assert (tmp_path / "log").read_text() == "fetched\n"


def test_ram_keeps_the_last_used_within_its_bytes():
    cache = RamCache(25)
    for name in "abc":
        cache.put(name, name.encode() * 10)
        cache.get("a")
    assert [cache.get(name) is not None for name in "abc"] == [True, False, True]
    assert cache.size_bytes == 20
    cache.put("huge", b"x" * 26)
    assert cache.get("huge") is None and cache.size_bytes == 20
