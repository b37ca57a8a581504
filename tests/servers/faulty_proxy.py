"""An HTTP proxy on loopback that stands in front of one server and can be told to misbehave."""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class Fault(Enum):
    UNAVAILABLE = "answers 503; the server does not hear of the request"
    DROP_REQUEST = "closes the connection without an answer; the server does not hear of the request"
    LOSE_ANSWER = "closes the connection after the server has done what was asked"
    CUT_ANSWER = "closes the connection in the middle of the answer's body"


# Methods and paths (with their query) that a fault is for.
Matcher = Callable[[str, str], bool]


class FaultyProxy:
    """Forwards to `target` (http://host:port) from `url`, byte for byte, so that signatures over the Host header hold.

    `requests` is every (method, path) that came, `failed` how many of them met a fault.
    """

    def __init__(self, target: str) -> None:
        address = urlsplit(target)
        self.target = (address.hostname or "127.0.0.1", address.port or 80)
        self.requests: list[tuple[str, str]] = []
        self.failed = 0
        self._lock = threading.Lock()
        self._fault = Fault.UNAVAILABLE
        self._matches: Matcher = _everything
        self._until = 0.0
        self._remaining = 0
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail_for(self, seconds: float, fault: Fault = Fault.UNAVAILABLE, matching: Matcher | None = None) -> None:
        """From now on, and for that long, requests meet `fault`: those for which `matching(method, path)`, or all."""
        with self._lock:
            self._fault, self._matches = fault, matching or _everything
            self._until, self._remaining = time.monotonic() + seconds, 0

    def fail_next(self, count: int, fault: Fault = Fault.UNAVAILABLE, matching: Matcher | None = None) -> None:
        """The next `count` requests meet `fault`: of those for which `matching(method, path)`, or of all."""
        with self._lock:
            self._fault, self._matches = fault, matching or _everything
            self._until, self._remaining = 0.0, count

    def heal(self) -> None:
        """Forwards everything again."""
        with self._lock:
            self._until, self._remaining = 0.0, 0

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Notes the request and says what it meets."""
        with self._lock:
            self.requests.append((method, path))
            due = self._remaining > 0 or time.monotonic() < self._until
            if not due or not self._matches(method, path):
                return None
            self._remaining = max(0, self._remaining - 1)
            self.failed += 1
            return self._fault

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="faulty-proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that hangs up in the middle of an answer may do so.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault_for(self.command, self.path)
        if fault is Fault.UNAVAILABLE:
            self.send_response(503, "Slow Down")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault is Fault.DROP_REQUEST:
            self.close_connection = True
        else:
            self._forward(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        server = http.client.HTTPConnection(*self.proxy.target, timeout=120)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                # This proxy has said 100 Continue itself, and speaks for one request at a time.
                if name.lower() not in ("expect", "connection"):
                    server.putheader(name, value)
            server.endheaders(body or None)
            answer = server.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):  # the server is gone: so it is for the client
            self.close_connection = True
            return
        finally:
            server.close()
        if fault is Fault.LOSE_ANSWER:
            self.close_connection = True
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        # A HEAD's length is that of the body it does not have.
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if fault is Fault.CUT_ANSWER:
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: `FaultyProxy.requests` is the log."""


def _everything(method: str, path: str) -> bool:
    return True
