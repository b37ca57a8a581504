"""Log lines of every process of the service, as text or as JSON: `ARKOR_RAY_LOG_FORMAT`.

What a line is about goes with it: the job and attempt of a process that serves one job, the request that an api or
inference replica is at, the trace. Ray's own loggers stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from arkor_ray.telemetry import tracing

FORMAT_VARIABLE = "ARKOR_RAY_LOG_FORMAT"
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_of_process: dict[str, Any] = {}
_of_task: ContextVar[dict[str, Any]] = ContextVar("arkor_log_fields", default={})  # noqa: B039 (never changed in place)

# Nothing of ours logs these; libraries and exceptions may quote a URL or a header that has them.
_SECRETS = re.compile(
    r"""(?ix)
    (?P<bearer> \bbearer\s+ ) [^\s"',]+
    | (?P<parameter> (?: [?&](?:x-amz-(?:signature|credential|security-token)|x-goog-signature|signature|sig|token|key)
      | password )= )
      [^&\s"'<>)]+
    | (?P<url> [a-z][a-z0-9+]*://[^\s:/@"']*: ) [^\s/@"']+ (?=@)
    """
)
_HIDDEN = "[hidden]"


def configure(**of_process: Any) -> None:
    """This process's log lines go to stderr, in the form that the environment asks for. May be called again.

    Args:
        of_process: job_id and attempt, for a process that serves one job.
    """
    _of_process.update(of_process)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if os.environ.get(FORMAT_VARIABLE) == "json" else TextLines(_TEXT))
    root = logging.getLogger()
    # Ray Train has one of its own class there, and every line would come twice; what writes elsewhere stays.
    console = (sys.stdout, sys.stderr)
    root.handlers = [other for other in root.handlers if getattr(other, "stream", None) not in console] + [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("arkor_ray").setLevel(logging.INFO)


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Lines that are logged in this block, and in the tasks it starts, are about `fields`. Those that are None are left out."""
    before = _of_task.set(_of_task.get())
    note(**fields)
    try:
        yield
    finally:
        _of_task.reset(before)


def note(**fields: Any) -> None:
    """As `about`, to the end of the current task."""
    _of_task.set({**_of_task.get(), **{name: value for name, value in fields.items() if value is not None}})


def subject() -> dict[str, Any]:
    """What lines of the current task are about."""
    return _of_task.get()


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        about = " ".join(f"{name}={value}" for name, value in subject().items())
        if about:
            head, newline, rest = line.partition("\n")
            line = f"{head} [{about}]{newline}{rest}"
        return _hide_secrets(line)


class JsonLines(logging.Formatter):
    """One object per line: time, level, logger, message, what it is about, trace_id and span_id, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _hide_secrets(record.getMessage()),
            **_of_process,
            **subject(),
            **tracing.current_ids(),
        }
        if record.exc_info:
            line["exception"] = _hide_secrets(self.formatException(record.exc_info))
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, ensure_ascii=False, default=str)


def _hide_secrets(text: str) -> str:
    return _SECRETS.sub(lambda found: (found["bearer"] or found["parameter"] or found["url"]) + _HIDDEN, text)
