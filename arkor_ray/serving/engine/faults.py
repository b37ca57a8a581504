"""Whose fault an exception is: the request's that met it, or the device's, on which nothing will work again."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; whoever asked for less would have got it."""
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def device_fault(error: BaseException) -> bool:
    """Whether a kernel failed (illegal access, a lost GPU...). It is told to whoever comes next, so it says nothing about
    that one's request, and this process cannot use the device any more."""
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error")
