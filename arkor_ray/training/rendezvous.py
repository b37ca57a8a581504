"""Where the workers of a job meet: torch's key-value store, on the first worker's own address and on no other.

Ray Train lets torch open it, and torch listens on every interface, without asking anybody who he is. On one machine that
would be the one door that others find open.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from arkor_ray.errors import TrainingError


@dataclass
class NodeAddressConfig(TorchConfig):
    """Ray Train's own, but for the store."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeAddressBackend


class _NodeAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        address, port = worker_group.execute_single(0, _listen)
        world_size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend_config.backend, address, port, rank, world_size, backend_config.timeout_s
                )
                for rank in range(world_size)
            ]
        )


_listening: list[socket.socket] = []  # of the first worker, between the two calls that it gets


def _listen() -> tuple[str, int]:
    """On the first worker: the address and the port of the store to come, which nobody else can take meanwhile."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listening.append(socket.create_server((address, 0), family=family, backlog=1024))
    return address, _listening[-1].getsockname()[1]


def _join(backend: str, address: str, port: int, rank: int, world_size: int, timeout_s: int) -> None:
    import torch.distributed as dist

    from arkor_ray.gpus import unusable_gpu

    if (fault := unusable_gpu()) is not None:
        raise TrainingError(fault)  # torch would only say that it has no NCCL
    # What torch's own tools, and DeepSpeed, look for.
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    timeout = timedelta(seconds=timeout_s)
    listening = _listening.pop().detach() if rank == 0 else None
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listening)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
