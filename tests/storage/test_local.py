"""What only a directory can get wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arkor_ray.errors import StorageError
from arkor_ray.storage.local import LocalStore

# Puts the same large object again and again, until it is killed.
WRITER = """
import sys
from pathlib import Path
from arkor_ray.storage.local import LocalStore
store = LocalStore(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number = (number + 1) % 250
    store.put("object", bytes([number]) * 4_000_000)
"""


def test_killed_writer_leaves_a_whole_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    for wait in (0.05, 0.11, 0.17):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(store.root)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while store.head("object") is None:
                time.sleep(0.01)
            time.sleep(wait)
            writer.send_signal(signal.SIGKILL)
        data = store.get("object")
        assert data == data[:1] * 4_000_000
        assert [info.key for info in store.list("")] == ["object"]


def test_leftovers_of_killed_writers_go_after_a_day(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"x")
    old, new = tmp_path / ".incoming" / "old", tmp_path / ".incoming" / "new"
    for path, age in ((old, 25 * 3600), (new, 3600)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age, time.time() - age))
    store.put("b", b"x")
    assert not old.exists()
    assert new.exists()
    assert [info.key for info in store.list("")] == ["a", "b"]


def test_empty_folders_go_with_their_last_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("a/b/c/d", b"x")
    store.put("a/e", b"x")
    store.delete("a/b/c/d")
    assert [path.name for path in (store.root / "a").iterdir()] == ["e"]
    store.delete("a/e")
    assert not (store.root / "a").exists()


def test_faults_of_the_disk_are_storage_errors(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageError, match="could not put 'a'"):
        LocalStore(root).put("a", b"x")
    store = LocalStore(tmp_path / "other")
    store.put("a", b"x")
    for if_absent in (False, True):
        with pytest.raises(StorageError, match=r"a/b"):
            store.put("a/b", b"x", if_absent=if_absent)
    assert store.get("a") == b"x"


def test_links_that_lead_outside_are_not_written_through(tmp_path: Path) -> None:
    """An object that is a link is replaced, so that what it points to stays as it is."""
    store = LocalStore(tmp_path / "store")
    store.put("folder/a", b"x")
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    (store.root / "folder" / "link").symlink_to(outside)
    store.put("folder/link", b"y")
    assert outside.read_bytes() == b"untouched"
    assert store.get("folder/link") == b"y"
