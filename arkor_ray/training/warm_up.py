"""Worker processes made ready while the driver still reads the data.

Importing torch and PEFT takes seconds of CPU, in the driver, then in Ray Train's controller, then in the workers. Idle
processes that have done it already are what Ray hands to those actors, if their runtime environment is the same.
"""

from __future__ import annotations

import importlib
import os
import sys

from arkor_ray.schemas.job import BITSANDBYTES_OPTIMIZERS, JobConfig

HEALTH_CHECK_SECONDS = "0.5"  # how soon a dead worker is noticed; Ray's default is 2 s


def set_train_environment() -> None:
    """What Ray Train reads from the driver's variables and passes on to its controller and workers."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_SECONDS)
    # Ray Train sets it for its controller alone, which would then need another kind of process than the workers.
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")


def warm_up(config: JobConfig) -> None:
    """Has Ray start a process for each worker of this job and one for Ray Train's controller; returns at once.

    Not on a cluster with GPUs: a process that imported torch without seeing one may go on not seeing it.
    """
    import ray
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    if ray.cluster_resources().get("GPU", 0):
        return
    environment = {"env_vars": get_env_vars_to_propagate()}
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(_import_what_training_needs)
    for _ in range(config.num_workers + 1):
        task.remote(needs_bitsandbytes(config))


def needs_bitsandbytes(config: JobConfig) -> bool:
    return config.load_in_4bit or config.optim in BITSANDBYTES_OPTIMIZERS


def leave_out_bitsandbytes() -> None:
    """PEFT imports it wherever it is installed, and that loads torch's compiler: 8 s of CPU for nothing.

    None in sys.modules makes it look not installed; a worker process trains one job only.
    """
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def _import_what_training_needs(bitsandbytes: bool) -> None:
    if not bitsandbytes:
        leave_out_bitsandbytes()
    for name in ("ray.train.torch", "arkor_ray.training.trainer", "arkor_ray.training.train_loop"):
        importlib.import_module(name)
