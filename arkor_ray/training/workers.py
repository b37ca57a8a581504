"""The group of training processes: who am I, which device is mine, and agreeing with the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from arkor_ray.errors import TrainingError
from arkor_ray.gpus import unusable_gpu


@dataclass(frozen=True)
class Worker:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Collective: the sums of the values over all workers, in double precision."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def from_first(self, value: Any) -> Any:
        """Collective: rank 0's value (a small picklable object), everywhere."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def join_workers() -> Worker:
    """Finds the process group that Ray Train made, or makes one from torchrun's variables, or one of this process alone.

    Raises TrainingError where Ray gave this process a GPU that torch cannot use.
    """
    device = _device()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # One core stays with the recorder, the api and serving: torch's threads wait for the slowest of them, so that
        # sharing its core with anything else slows them all.
        torch.set_num_threads(max(1, (len(os.sched_getaffinity(0)) - 1) // local_workers))
    return Worker(dist.get_rank(), dist.get_world_size(), device)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        if (fault := unusable_gpu()) is not None:
            raise TrainingError(fault)
        return torch.device("cpu")
    if dist.is_initialized():
        import ray.train.torch

        device = ray.train.torch.get_device()
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
