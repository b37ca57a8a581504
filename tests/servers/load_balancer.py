"""What stands before the nodes of a cluster: connections go to a node whose proxy says that it is healthy."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from types import TracebackType
from typing import Self

from tests.servers.processes import HOST

_CHECK_S = 0.5
_CHECK_LIMIT_S = 1.0


class LoadBalancer:
    """Relays TCP from `url`, on loopback, to the healthy ones of `backends` (host, port) in turn, while it is entered."""

    def __init__(self, backends: list[tuple[str, int]]) -> None:
        self._backends = backends
        self._healthy: list[tuple[str, int]] = []
        self._turn = 0
        self._ended = threading.Event()
        self._listener: socket.socket | None = None
        self.url = ""

    def __enter__(self) -> Self:
        # Here, in the network of the thread that enters.
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.url = f"http://{HOST}:{self._listener.getsockname()[1]}"
        for backend in self._backends:
            threading.Thread(target=self._check, args=(backend,), daemon=True).start()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._listener is not None:
            self._listener.close()

    def _check(self, backend: tuple[str, int]) -> None:
        while not self._ended.wait(_CHECK_S):
            connection = http.client.HTTPConnection(*backend, timeout=_CHECK_LIMIT_S)
            try:
                connection.request("GET", "/-/healthz")
                healthy = connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                healthy = False
            finally:
                connection.close()
            if healthy and backend not in self._healthy:
                self._healthy.append(backend)
            elif not healthy and backend in self._healthy:
                self._healthy.remove(backend)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client:
            self._turn += 1
            healthy = list(self._healthy)
            for i in range(len(healthy)):
                backend = healthy[(self._turn + i) % len(healthy)]
                try:
                    server = socket.create_connection(backend, timeout=_CHECK_LIMIT_S)
                except OSError:
                    continue
                with server:
                    server.settimeout(None)
                    back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                    back.start()
                    _pump(client, server)
                    back.join()
                return


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
