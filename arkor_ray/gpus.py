"""Whether this process can use the GPU that Ray has given it."""

from __future__ import annotations

import ray
import torch


def unusable_gpu() -> str | None:
    """Why the GPU that Ray gave this task or actor cannot be used, and what to do; None where it can, or there is none.

    On a CPU the work would go on, a hundred times slower, while the GPU that it holds stands still.
    """
    if torch.cuda.is_available() or not ray.is_initialized() or not ray.get_gpu_ids():
        return None
    where = f"Ray gave a GPU of node {ray.util.get_node_ip_address()}, but"
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"{where} torch {torch.__version__} there is the build for CPUs: build the image with `--build-arg TORCH_INDEX=`, "
            "or install torch from PyPI; or keep to CPUs, with an empty CUDA_VISIBLE_DEVICES where Ray is started"
        )
    return (
        f"{where} torch {torch.__version__} finds none there: see whether `nvidia-smi` does. On Kubernetes the pod may need "
        "podDefaults.runtimeClassName, with Docker the container `--gpus all`; or the driver is older than this torch needs"
    )
