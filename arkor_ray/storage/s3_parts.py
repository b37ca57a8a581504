"""Large objects in parts: where these are cut, and doing something with many at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
Part = tuple[int, int]  # where it starts and how long it is, in bytes

PART_BYTES = 8 << 20
MAX_PARTS = 10_000
PARALLEL_PARTS = 8


def parts_of(size: int) -> Iterator[Part]:
    length = max(PART_BYTES, -(-size // MAX_PARTS))
    return ((start, min(length, size - start)) for start in range(0, size, length))


def in_parallel(work: Callable[[S, Event], T], items: Iterable[S]) -> list[T]:
    """`work(item, stop)` for every item, in their order; the first one that fails stops the others and is raised."""
    stop = Event()
    with ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="s3-part") as pool:
        futures = [pool.submit(work, item, stop) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            stop.set()
            for future in futures:
                future.cancel()


def write_all(fd: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, start)
        view, start = view[written:], start + written
