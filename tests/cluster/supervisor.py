"""What starts the nodes of a cluster again when they end, as kubelets or systemd do."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Self

from tests.servers.ray_hosts import HEAD, Node, RayHosts

logger = logging.getLogger(__name__)

LOOK_S = 1.0


class Supervisor:
    """While it is entered, a node without its raylet, and a head without its GCS, is ended whole and started again."""

    def __init__(self, cluster: RayHosts) -> None:
        self.restarts: list[str] = []
        self._cluster = cluster
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(n,), daemon=True) for n in cluster.nodes.items()]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, named: tuple[str, Node]) -> None:
        name, node = named
        needed = ("raylet", "gcs") if name == HEAD else ("raylet",)
        while not self._ended.wait(LOOK_S):
            if all(node.find(part) for part in needed):
                continue
            node.host.kill_all()
            try:
                node.start()
            except (RuntimeError, TimeoutError) as error:  # a worker whose head is away: the next look tries again
                logger.warning("%s does not start: %s", name, str(error)[-300:])
            else:
                self.restarts.append(name)
