"""One local file behind a URL, so that a service can read it as a job's data set."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from arkor_ray.schemas.address import is_loopback


@contextmanager
def served(path: Path, *, to: str) -> Iterator[str]:
    """The URL under which the service at the URL `to` can fetch the file, while the block runs. Nothing else is served."""
    address = _address_towards(to)
    route = f"/{path.name}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != route:
                self.send_error(404)
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "application/jsonl")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """The demo's output is for people."""

    server = ThreadingHTTPServer((address, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{address}:{server.server_address[1]}{route}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _address_towards(url: str) -> str:
    """This machine's IPv4 address as that service sees it."""
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    if is_loopback(host):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, parts.port or 80))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
