"""What an attacker has: a server of data, eyes for everything that listens, and calls to whatever does."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import psutil

from tests.servers.arkor import RunningService


class DataServer:
    """Gives rows for the token. Who comes with a signature in the URL is kept waiting until `let_go`, and then refused."""

    def __init__(self, rows: bytes, token: str) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()
        self.tokens: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.tokens.append(self.headers["Authorization"])
                signed = "signature" in self.path
                if signed:
                    outer.asked.set()
                    outer.let_go.wait(120)
                ok = self.headers["Authorization"] == f"Bearer {token}" and not signed
                with contextlib.suppress(OSError):  # the one who asked was killed
                    self.send_response(200 if ok else 403)
                    self.end_headers()
                    self.wfile.write(rows if ok else b"no")

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.let_go.set()
        self._http.shutdown()
        self._http.server_close()


class Listeners:
    """Every listening socket of the service, seen now and then while it lives: address, port and a title of its process."""

    def __init__(self, service: RunningService) -> None:
        self.seen: dict[tuple[str, int], str] = {}
        self._service = service
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_again, daemon=True)
        self._thread.start()

    def look(self) -> dict[tuple[str, int], str]:
        found = {}
        for pid, title in self._service.processes().items():
            with contextlib.suppress(psutil.Error):  # it ended while we looked
                for each in psutil.Process(pid).net_connections("inet"):
                    if each.status == psutil.CONN_LISTEN:
                        found[each.laddr.ip, each.laddr.port] = title
        self.seen.update(found)
        return found

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look_again(self) -> None:
        while not self._ended.wait(0.5):
            self.look()


def call(port: int, method: str, token: str | None = None) -> grpc.StatusCode:
    """What a port says to a gRPC call without a body."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            channel.unary_unary(method)(b"", timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK
