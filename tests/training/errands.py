"""What `own_process` is told to do in tests, by name, in another process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from arkor_ray.errors import DatasetError


def double(number: int, *, times: int = 1) -> int:
    print("a library's progress bar")
    sys.stdout.flush()
    os.write(1, b"and what its C code prints\n")
    return number * 2**times


def refuse() -> None:
    raise DatasetError("no such data", param="datasetSource.name")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_thread_behind() -> str:
    threading.Thread(target=time.sleep, args=(600,)).start()
    return "done"


def hang(pid_file: Path) -> None:
    """As stubbornly as can be: signals are ignored, and a thread is under way that the interpreter would wait for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=time.sleep, args=(600,)).start()
    pid_file.write_text(str(os.getpid()))
    time.sleep(600)
