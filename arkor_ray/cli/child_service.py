"""A whole service as a child process, for the length of a `with` block."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, Self

from arkor_ray.errors import ServiceUnavailableError

READY = "arkor-ray is ready at "
START_TIMEOUT_S = 600.0  # the first start also makes the demo's base model
STOP_TIMEOUT_S = 30.0


class ChildService:
    """`arkor-ray up` on a free port. What it prints is passed on until it is ready, and all of it goes to `log_path`.

    Raises ServiceUnavailableError, with the last line of the log, when it does not come up.
    """

    def __init__(self, data_dir: Path, *, aliases: list[str], environment: dict[str, str]) -> None:
        self.url = ""
        self.log_path = data_dir / "service.log"
        self._command = [sys.executable, "-m", "arkor_ray.cli.main", "up", "--port", "0", "--data-dir", str(data_dir)]
        for alias in aliases:
            self._command += ["--alias", alias]
        self._environment = {**os.environ, **environment}
        if sys.stderr.isatty():  # else the progress bar of the first start would not be drawn into our pipe
            self._environment["TTY_COMPATIBLE"] = "1"
        self._settled = threading.Event()

    def __enter__(self) -> Self:
        from arkor_ray.embedded import make_data_dir

        make_data_dir(self.log_path.parent)
        self._log = self.log_path.open("wb")
        # A session of its own: Ctrl-C reaches us alone, and the service is ended in order, after the job.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_lines, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._pass_on, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            self._settled.wait(START_TIMEOUT_S)
        except BaseException:
            self._stop()
            raise
        if not self.url:
            self._stop()
            raise ServiceUnavailableError(
                f"The service did not come up: {self._last_line()} (its whole log is {self.log_path})"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._settled.set()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(1.0)  # a process that outlived the service may hold the pipe open
        self._log.close()

    def _read_lines(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._write(line)
            text = line.decode(errors="replace").strip()
            if text.startswith(READY):
                self.url = text.removeprefix(READY)
                self._settled.set()
            elif not self._settled.is_set():
                print(text, flush=True)
        self._settled.set()  # it ended, ready or not

    def _pass_on(self, stream: IO[bytes]) -> None:
        # Bytes, not lines: a progress bar draws itself over the same line.
        while chunk := os.read(stream.fileno(), 1 << 16):
            self._write(chunk)
            if not self._settled.is_set():
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()

    def _write(self, data: bytes) -> None:
        log: BinaryIO = self._log
        if not log.closed:
            log.write(data)
            log.flush()

    def _last_line(self) -> str:
        lines = [line.strip() for line in self.log_path.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "it said nothing")
