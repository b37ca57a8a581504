"""Memory that ran out in a worker, as an error that says what to lower.

Only what torch says of itself is taken for it. A process that the machine or Ray kills for its memory is a process that died,
and is tried again: on another machine, or beside others, there may be room.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from arkor_ray.errors import TrainingError
from arkor_ray.schemas.job import JobConfig

# Where torch's own class for it is not used: memory of the host, of cuBLAS, of libraries with an allocator of their own.
_SIGNS = re.compile(
    r"DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory|Cuda failure.*out of memory", re.DOTALL
)
SHOWN = 200  # characters of torch's words


class MemoryExhaustedError(TrainingError):
    """`rows`: of the pass that did not fit; None where fewer would not have helped."""

    code = "out_of_memory"

    @property
    def rows(self) -> int | None:
        return self.fields.get("rows")


@contextmanager
def naming_what_to_lower(config: JobConfig, rows: int | None = None) -> Iterator[None]:
    """Within it, memory that runs out is a MemoryExhaustedError. `rows` go through one forward pass there."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        raise MemoryExhaustedError(_sentence(config, rows, error), rows=rows) from error


def _ran_out(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _SIGNS.search(str(error)) is not None


def _sentence(config: JobConfig, rows: int | None, error: Exception) -> str:
    what = "The model does" if rows is None else f"A forward and backward pass of {rows} row{'s' * (rows > 1)} does"
    length = "unset, the model's context" if config.max_length is None else config.max_length
    said = " ".join(str(error).split())[:SHOWN] or type(error).__name__
    return (
        f"{what} not fit into memory with config.batchSize {config.batch_size}, config.maxLength {length}, "
        f"config.zeroStage {config.zero_stage} and config.loadIn4bit {str(config.load_in_4bit).lower()}: {said}. "
        f"Remedies: {'; '.join(_remedies(config, rows))}."
    )


def _remedies(config: JobConfig, rows: int | None) -> list[str]:
    remedies = []
    if rows is not None:
        if rows > 1:
            remedies.append("lower config.batchSize and raise config.gradientAccumulationSteps by as much")
        remedies.append("lower config.maxLength")
    stage = 2 if config.load_in_4bit else 3  # a 4-bit base cannot be sharded
    if config.zero_stage < stage:
        remedies.append(f"set config.zeroStage {stage} with a higher config.numWorkers")
    if not config.load_in_4bit and config.zero_stage < 3:
        remedies.append("set config.loadIn4bit true")
    return [*remedies, "take a smaller config.model"]
