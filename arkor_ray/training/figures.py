"""What rank 0 tells about training, as metrics."""

from __future__ import annotations

from arkor_ray.telemetry import metrics


class TrainingFigures:
    """`base_model` is the catalogue's name, so that the values of that tag stay few."""

    def __init__(self, job_id: str, base_model: str) -> None:
        self.base_model = base_model
        self._job_id = job_id

    def step(self, step: int, total: int, *, samples: int, tokens: int, seconds: float) -> None:
        base = self.base_model
        metrics.TRAINING_STEPS.add(base_model=base)
        metrics.TRAINING_SAMPLES.add(samples, base_model=base)
        metrics.TRAINING_TOKENS.add(tokens, base_model=base)
        metrics.TRAINING_STEP_SECONDS.observe(seconds, base_model=base)
        metrics.TRAINING_PROGRESS.set(step / total, base_model=base, job_id=self._job_id)

    def loss(self, value: float) -> None:
        metrics.TRAINING_LOSS.set(value, base_model=self.base_model, job_id=self._job_id)

    def checkpoint_stage(self, stage: str, seconds: float) -> None:
        metrics.TRAINING_CHECKPOINT_SECONDS.observe(seconds, base_model=self.base_model, stage=stage)

    def checkpoint_ended(self, *, committed: bool) -> None:
        metrics.TRAINING_CHECKPOINTS.add(base_model=self.base_model, outcome="committed" if committed else "failed")

    def storage_failed(self) -> None:
        metrics.TRAINING_STORAGE_FAILURES.add(base_model=self.base_model)
