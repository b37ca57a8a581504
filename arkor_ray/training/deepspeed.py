"""The DeepSpeed engine of a job: its configuration, optimizer and learning-rate schedule.

Gradients are clipped at norm 1.0 and Adam's constants are those of TrainingArguments' defaults.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.job import OPTIMIZERS, JobConfig, Precision
from arkor_ray.training.batches import BatchPlan

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

MAX_GRAD_NORM = 1.0
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def prepare_deepspeed(device: torch.device) -> None:
    """Call in a worker before anything else imports DeepSpeed, with torch.distributed initialised."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu" and "__compatible_ops__" not in vars(deepspeed.ops):
        # Without this, DeepSpeed runs the compiler to see which of its extensions would build here, and then builds a
        # shared-memory all-reduce that only its inference uses: half a minute at the first start on a machine.
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        deepspeed.ops.__compatible_ops__ = dict.fromkeys([*ALL_OPS, "deepspeed_not_implemented"], False)
    import torch.distributed

    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def engine_config(config: JobConfig, plan: BatchPlan, precision: Precision) -> dict[str, Any]:
    """DeepSpeed's configuration.

    In half precision, ZeRO-0 runs as ZeRO-1: the same data parallelism and the same mathematics, but DeepSpeed's
    half-precision optimizer for it is the one that keeps fp32 master weights which can be read and set.
    """
    stage = config.zero_stage if precision == "fp32" else max(1, config.zero_stage)
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }


@contextlib.contextmanager
def zero3_init(ds_config: dict[str, Any], quantised: bool) -> Iterator[None]:
    """Within it, `from_pretrained` shards the weights over the workers as it reads them, if `ds_config` asks for ZeRO-3."""
    if ds_config["zero_optimization"]["stage"] != 3 or quantised:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(ds_config)  # transformers holds it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def start_engine(model: torch.nn.Module, config: JobConfig, ds_config: dict[str, Any]) -> DeepSpeedEngine:
    """`backward` on it averages gradients over workers; the loss passed to it must be scaled with that in mind."""
    import deepspeed

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(config.optim, trainable, config.learning_rate, config.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trainable, config=ds_config)
    return engine


def make_optimizer(
    name: str, params: list[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """By the name that TrainingArguments gives it. Adafactor and others whose state depends on how ZeRO flattens the weights
    are refused: their loss would differ between ZeRO stages."""
    import torch

    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name in ("adamw_torch", "adamw_hf"):
        return torch.optim.AdamW(params, **common, **ADAM)
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(params, **common, **ADAM, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params, **common)
    if name in OPTIMIZERS:
        import bitsandbytes.optim as bnb

        bits = 8 if "8bit" in name or name == "adamw_bnb_8bit" else 32
        return bnb.AdamW(params, **common, **ADAM, optim_bits=bits, is_paged=name.startswith("paged_"))
    raise InvalidRequestError(f"optim {name!r} is not one of {', '.join(OPTIMIZERS)}", param="config.optim")


class LearningRate:
    """The rate of each update: transformers' schedule of that name, as a function of the step alone.

    So nothing of it needs to be stored, and a resumed run cannot drift. Schedules step once per update, as with
    Trainer.
    """

    def __init__(self, config: JobConfig, total_steps: int) -> None:
        import torch
        from transformers import get_scheduler

        self._base = config.learning_rate
        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            dummy,
            num_warmup_steps=config.warmup_steps.resolve(total_steps),
            num_training_steps=total_steps,
        )
        self._factor = scheduler.lr_lambdas[0]

    def at(self, step: int) -> float:
        """Rate of update `step`, from 1."""
        return self._base * self._factor(step - 1)

    def set(self, engine: DeepSpeedEngine, step: int) -> float:
        rate = self.at(step)
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = rate
        return rate
