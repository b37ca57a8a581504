"""A model that learns: base, LoRA and DeepSpeed engine of one worker, with the few things a train loop does to it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from arkor_ray.schemas.checkpoint import BasePrecision, ParityProbe
from arkor_ray.schemas.job import JobConfig, Precision
from arkor_ray.storage.base_files import BaseFiles
from arkor_ray.training.batches import BatchPlan, TokenizedDataset, collate
from arkor_ray.training.deepspeed import LearningRate, engine_config, prepare_deepspeed, start_engine, zero3_init
from arkor_ray.training.loss import SelectiveLoss
from arkor_ray.training.memory import naming_what_to_lower
from arkor_ray.training.model import (
    add_lora,
    base_precision,
    load_base_model,
    resolve_precision,
    target_names,
    torch_dtype,
)
from arkor_ray.training.portable_state import PortableState, Shards, set_weights
from arkor_ray.training.workers import Worker

PROBE_TOKENS = 64


@dataclass(frozen=True)
class StepResult:
    """`loss` is summed over the `tokens` supervised tokens of the global batch, of the forward pass before the update;
    `seconds` is what the step took."""

    loss: float
    tokens: int
    learning_rate: float
    stop: bool
    seconds: float


class Learner:
    """All its methods are collective: every worker calls them, in the same order."""

    def __init__(
        self,
        files: BaseFiles,
        config: JobConfig,
        plan: BatchPlan,
        total_steps: int,
        worker: Worker,
        pad_token_id: int,
    ) -> None:
        self.worker, self.plan, self.config = worker, plan, config
        self.precision: Precision = resolve_precision(config, worker.device)
        self.base_precision: BasePrecision = base_precision(config, self.precision)
        self._pad_token_id = pad_token_id
        prepare_deepspeed(worker.device)
        self._ds_config = engine_config(config, plan, self.precision)
        with zero3_init(self._ds_config, config.load_in_4bit):
            base = load_base_model(files.path, config, self.precision, worker.device, **files.options)
        self.base_revision: str | None = getattr(base.config, "_commit_hash", None)
        self._loss = SelectiveLoss(base)
        # DeepSpeed casts LoRA weights to the engine's precision and keeps fp32 masters itself; under ZeRO-3 a mix of
        # fp32 LoRA and half-precision base weights fails at the first update.
        self.model = add_lora(
            base, config, files.source, revision=files.options["revision"], autocast_adapter_dtype=False
        )
        self.learning_rate = LearningRate(config, total_steps)
        self._engine: Any = None
        self._shards: Shards | None = None

    def start(self, resume: PortableState | None = None) -> None:
        """Makes the engine, from `resume` where there is one. Call once, before anything else."""
        if resume is not None:
            set_weights(self.model, resume.weights)
        self._engine = start_engine(self.model, self.config, self._ds_config)
        self._shards = Shards(self._engine)
        if resume is not None:
            self._shards.restore(resume)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        assert self._shards is not None, "start() comes first"
        return self._shards.shapes

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The precision in which LoRA weights take part in the forward pass, and are published."""
        return torch_dtype(self.precision)

    def step(self, step: int, data: TokenizedDataset, stop_requested: bool) -> StepResult:
        """Update `step`: the mean loss over the supervised tokens of the global batch, whatever it is cut into.

        Whether rank 0 was asked to stop travels with the loss, so that all workers know at the same step. Raises
        MemoryExhaustedError.
        """
        began = time.perf_counter()
        rate = self.learning_rate.set(self._engine, step)
        self._engine.train()
        tokens = data.supervised_tokens(self.plan.global_indices(step))
        local = 0.0
        for indices in self.plan.micro_indices(step, self.worker.rank):
            batch = collate(data, indices, self._pad_token_id)
            with naming_what_to_lower(self.config, self.plan.micro_batch):
                summed = self._loss(self._engine, batch, self.worker.device)
                # DeepSpeed averages gradients over workers and adds them up over micro-batches.
                self._engine.backward(summed * (self.worker.world_size / max(1, tokens)), scale_wrt_gas=False)
            self._engine.step()  # whose memory does not depend on the rows
            local += float(summed.detach())
        loss, stop = self.worker.total(local, float(stop_requested))
        return StepResult(loss, tokens, rate, stop > 0, time.perf_counter() - began)

    def evaluate(self, data: TokenizedDataset) -> float:
        """Mean loss per supervised token of the whole set. Raises MemoryExhaustedError."""
        self._engine.eval()
        size, world = self.plan.micro_batch, self.worker.world_size
        local = 0.0
        with torch.no_grad(), naming_what_to_lower(self.config, size):
            # As many rounds for everyone: under ZeRO-3 each forward pass is collective.
            for first in range(0, len(data), size * world):
                start = first + self.worker.rank * size
                indices = np.arange(start, min(start + size, len(data)))
                local += float(self._loss(self._engine, collate(data, indices, self._pad_token_id), self.worker.device))
        (loss,) = self.worker.total(local)
        return loss / max(1, int(np.count_nonzero(data.supervised)))

    def probe(self, data: TokenizedDataset) -> ParityProbe | None:
        """What the model says now about the first tokens of a training sample; None if that is not finite."""
        ids = torch.as_tensor(data.sample(0)[0][:PROBE_TOKENS].astype(np.int64), device=self.worker.device)
        if len(ids) < 2:
            return None
        self._engine.eval()
        with torch.no_grad():
            everywhere = torch.arange(len(ids), device=ids.device)
            logits = self._loss.logits(
                self._engine, everywhere, input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]
            )
            logprobs = torch.log_softmax(logits[:-1].float(), dim=-1).gather(1, ids[1:, None])[:, 0].tolist()
        if not all(math.isfinite(value) for value in logprobs):
            return None
        return ParityProbe(token_ids=ids.tolist(), logprobs=logprobs)

    def gather(self, *, weights_only: bool = False) -> PortableState | None:
        """The state on the host at rank 0, None elsewhere."""
        assert self._shards is not None, "start() comes first"
        return self._shards.gather(weights_only=weights_only)

    def metadata(self) -> dict[str, Any]:
        """The plan as `training.started` shows it."""
        config, plan = self.config, self.plan
        return {
            "precision": self.precision,
            "base_precision": self.base_precision,
            "zero_stage": config.zero_stage,
            "num_workers": self.worker.world_size,
            "device": self.worker.device.type,
            "batch_size": plan.micro_batch,
            "gradient_accumulation_steps": plan.accumulation,
            "global_batch_size": plan.global_batch,
            "steps_per_epoch": plan.steps_per_epoch,
            "optim": config.optim,
            "lr_scheduler_type": config.lr_scheduler_type,
            "learning_rate": config.learning_rate,
            "lora_r": config.lora_r,
            "lora_alpha": config.lora_alpha,
            "target_modules": target_names(self.model),
            "trainable_parameters": sum(shape.numel() for shape in self.shapes.values()),
        }
