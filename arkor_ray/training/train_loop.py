"""What every worker runs: a job's story from its newest checkpoint to its final adapter.

Called by Ray Train through `trainer`, or bare under torchrun by `bare`.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Any

from arkor_ray.errors import TrainingError
from arkor_ray.schemas.job import JobConfig
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.training.adapter_export import AdapterExport
from arkor_ray.training.batches import BatchPlan, TokenizedDataset
from arkor_ray.training.callbacks import EventSink, NullEventSink
from arkor_ray.training.checkpoint import CheckpointContext, CheckpointWriter, Snapshot
from arkor_ray.training.data import total_steps
from arkor_ray.training.figures import TrainingFigures
from arkor_ray.training.learner import Learner, StepResult
from arkor_ray.training.loop_config import LoopConfig, LoopResult
from arkor_ray.training.model import load_tokenizer
from arkor_ray.training.portable_state import PortableState
from arkor_ray.training.resume_state import (
    DamagedStateError,
    Identity,
    Progress,
    committed_manifests,
    load_resume_state,
    resumable_steps,
)
from arkor_ray.training.spool import Spool, remove_leftovers
from arkor_ray.training.workers import Worker, join_workers

logger = logging.getLogger(__name__)

NON_FINITE_STEPS = 3
FLUSH_SECONDS = 600.0  # a recorder waits for serving before it acknowledges a checkpoint


def train_loop_per_worker(config: LoopConfig) -> LoopResult | None:
    """Trains from the newest checkpoint in storage to the end, or until asked to stop. Rank 0 returns the result.

    Raises DatasetError or ModelError for what the user must change, TrainingError when training itself failed;
    neither is worth another try.
    """
    worker = join_workers()
    spec, job = config.spec, config.spec.config
    remove_leftovers(spec.scratch_dir, spec.job_id)  # everywhere: the first worker of an earlier attempt was anywhere
    sink = config.make_sink() if worker.is_first else NullEventSink()
    store = config.store or spec.open_store()
    train = _resolve(config.train)
    evaluation = _resolve(config.evaluation) if config.evaluation is not None else None
    plan = batch_plan(job, len(train), worker.world_size, spec.rows_per_pass)
    total = total_steps(job, plan)
    due = Due(job, total)
    base = spec.base_files()
    tokenizer = load_tokenizer(base.path, **base.options)

    learner = Learner(base, job, plan, total, worker, tokenizer.pad_token_id)
    identity = _identity(learner, plan, job, spec.base_model)
    resume, progress = newest_state(store, spec.job_id, identity, worker)
    start = progress.step
    learner.start(resume)
    del resume
    run = Run(config, learner, tokenizer, identity, store, sink, progress, total)
    sink.started({**learner.metadata(), **due.metadata(), "model": job.model, "train_samples": len(train)})
    run.tell_again()
    if worker.is_first and start < total:
        logger.info("Training on %d samples, from step %d to %d", len(train), start + 1, total)
    elif worker.is_first:
        logger.info("Nothing left to train: the newest checkpoint is that of the last step, %d", total)

    stopped = False
    try:
        for step in range(start + 1, total + 1):
            result = learner.step(step, train, sink.should_stop() or run.storage_failed)
            run.count(step, result)
            if due.log(step):
                run.log(step, result)
            if evaluation is not None and due.evaluate(step):
                run.log_evaluation(step, learner.evaluate(evaluation))
            stopped = result.stop and step < total
            if due.save(step) or stopped:
                run.save(step, train)
            if stopped:
                break
        return run.finish(train, total, stopped)
    finally:
        run.close()


def newest_state(
    store: ObjectStore, job_id: str, identity: Identity, worker: Worker
) -> tuple[PortableState | None, Progress]:
    """Collective. The newest resume state that every worker could read, None and step 0 when there is none.

    Raises what `load_resume_state` does, but for a damaged state: then the next older one is taken. Where none could be read
    while there are others by now, an earlier attempt that is not yet over has taken them away for newer ones: those are taken.
    """
    tried: list[int] = []
    while (steps := worker.from_first(list(resumable_steps(store, job_id)) if worker.is_first else [])) != tried:
        for step, older in zip(steps, [*steps[1:], None], strict=True):
            found = None
            try:
                found = load_resume_state(store, job_id, step, identity)
            except DamagedStateError as error:
                instead = f"step {older}" if older is not None else "what else there is by now"
                logger.warning("Job %s does not go on from step %d but from %s: %s", job_id, step, instead, error)
            if worker.total(found is None) == [0]:
                assert found is not None
                return found
        tried = steps
    return None, Progress()


def batch_plan(config: JobConfig, samples: int, world_size: int, rows_per_pass: int | None = None) -> BatchPlan:
    """The global batch is what the user asked for, also when the job goes on with another number of workers, or with fewer
    rows in a forward pass."""
    return BatchPlan(
        samples=samples,
        global_batch=config.batch_size * config.gradient_accumulation_steps * config.num_workers,
        micro_batch=rows_per_pass or config.batch_size,
        world_size=world_size,
        seed=config.seed,
    )


class Due:
    """At which steps to log, evaluate and save: every so many, and at the last one. 0 steps between saves or evaluations means
    only at the end, and never, as `save_steps` and `eval_steps` of an own choosing say."""

    def __init__(self, config: JobConfig, total: int) -> None:
        self._total = total
        self._log = max(1, config.logging_steps.resolve(total))
        self._save = config.save_steps.resolve(total)
        self._evaluate = config.eval_steps.resolve(total) if config.eval_steps is not None else 0

    def log(self, step: int) -> bool:
        return step == self._total or step % self._log == 0

    def save(self, step: int) -> bool:
        return step == self._total or (self._save > 0 and step % self._save == 0)

    def evaluate(self, step: int) -> bool:
        return step == self._total or (self._evaluate > 0 and step % self._evaluate == 0)

    def metadata(self) -> dict[str, int | None]:
        return {
            "total_steps": self._total,
            "logging_steps": self._log,
            "save_steps": self._save or None,
            "eval_steps": self._evaluate or None,
        }


class Run:
    """The run's books on this worker: what was logged, what is to be stored. Only rank 0 reports and stores."""

    def __init__(
        self,
        config: LoopConfig,
        learner: Learner,
        tokenizer: Any,
        identity: Identity,
        store: ObjectStore,
        sink: EventSink,
        progress: Progress,
        total: int,
    ) -> None:
        self._job_id, self._learner, self._store, self._sink = config.spec.job_id, learner, store, sink
        self._progress = progress
        self._plan, self._total = learner.plan, total
        self._figures = TrainingFigures(config.spec.job_id, config.spec.base_name or config.spec.base_model)
        self._bad_steps = 0
        self._since = self._started = time.monotonic()
        self._seconds_before = progress.train_seconds
        self._logged_step = self._saved_step = progress.step
        self._writer: CheckpointWriter | None = None
        if learner.worker.is_first:
            context = CheckpointContext(
                job_id=config.spec.job_id,
                base_model=config.spec.base_model,
                base_revision=learner.base_revision,
                base_precision=learner.base_precision,
                identity=identity,
                spool=Spool(config.spec.scratch_dir, config.spec.job_id),
            )
            export = AdapterExport(learner.model, learner.shapes, tokenizer, learner.adapter_dtype)
            self._writer = CheckpointWriter(context, export, store, sink, config.patience, self._figures)

    @property
    def storage_failed(self) -> bool:
        return self._writer is not None and self._writer.failed

    def tell_again(self) -> None:
        """What the last attempt perhaps did not get to tell: log entries up to its checkpoint, and committed checkpoints."""
        for entry in self._progress.unrecorded:
            self._sink.log(entry)
        self._progress.unrecorded = []
        if self._writer is not None and self._progress.step:
            for manifest in committed_manifests(self._store, self._job_id):
                self._sink.checkpoint(manifest.model_dump(mode="json"))

    def count(self, step: int, result: StepResult) -> None:
        """Raises TrainingError when the loss has not been a number for some steps in a row."""
        progress = self._progress
        progress.step = step
        progress.logged_loss += result.loss
        progress.logged_tokens += result.tokens
        progress.train_seconds = self._seconds_before + time.monotonic() - self._started
        samples = self._plan.samples_seen(step) - self._plan.samples_seen(step - 1)
        self._figures.step(step, self._total, samples=samples, tokens=result.tokens, seconds=result.seconds)
        self._bad_steps = 0 if math.isfinite(result.loss) else self._bad_steps + 1
        if self._bad_steps >= NON_FINITE_STEPS:
            self.log(step, result)
            raise TrainingError(
                f"The loss was not a finite number in {NON_FINITE_STEPS} steps in a row, up to step {step}. "
                "Lower learning_rate, add warmup_steps, or use precision bf16 or fp32.",
                step=step,
            )

    def log(self, step: int, result: StepResult) -> None:
        progress, now = self._progress, time.monotonic()
        progress.last_loss = progress.logged_loss / max(1, progress.logged_tokens)
        seen = self._plan.samples_seen(step) - self._plan.samples_seen(self._logged_step)
        self._figures.loss(progress.last_loss)
        self._sink.log(
            {
                "step": step,
                "loss": progress.last_loss,
                "learning_rate": result.learning_rate,
                "epoch": self._plan.epoch(step),
                "samples_per_second": seen / max(now - self._since, 1e-9),
            }
        )
        self._since, self._logged_step = now, step
        progress.logged_loss, progress.logged_tokens = 0.0, 0

    def log_evaluation(self, step: int, loss: float) -> None:
        self._progress.last_eval_loss = loss
        self._sink.log({"step": step, "eval_loss": loss, "epoch": self._plan.epoch(step)})

    def save(self, step: int, data: TokenizedDataset) -> None:
        """Collective. Returns as soon as the state is on the host; the rest happens in the background."""
        began = time.monotonic()
        self._submit(self._learner.gather(), data, final=False)
        self._figures.checkpoint_stage("gather", time.monotonic() - began)
        self._saved_step = step

    def finish(self, data: TokenizedDataset, total: int, stopped: bool) -> LoopResult | None:
        """Collective. Waits for storage and for the events; the final adapter comes last."""
        if not stopped:
            self._submit(self._learner.gather(weights_only=True), data, final=True)
        if self._writer is None:
            return None
        final = self._writer.finish()
        self._sink.flush(FLUSH_SECONDS)
        return LoopResult(
            step=self._progress.step,
            total_steps=total,
            stopped=stopped,
            metrics=self._metrics(),
            final_manifest=final.model_dump(mode="json") if final is not None else None,
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
        self._sink.close()

    def _submit(self, state: Any, data: TokenizedDataset, *, final: bool) -> None:
        probe = self._learner.probe(data)
        if self._writer is not None:
            progress = replace(self._progress, unrecorded=self._sink.unrecorded())
            self._writer.submit(Snapshot(state, progress, self._metrics(), probe, final))

    def _metrics(self) -> dict[str, float | None]:
        """In the manifest and in training.completed: `final_loss` is the last one logged, `total_time` in seconds."""
        progress = self._progress
        values = {"final_loss": progress.last_loss, "eval_loss": progress.last_eval_loss}
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        return {**finite, "total_steps": float(progress.step), "total_time": progress.train_seconds}


def _identity(learner: Learner, plan: BatchPlan, config: JobConfig, base_model: str) -> Identity:
    shapes = {
        name: list(getattr(p, "ds_shape", p.shape)) for name, p in learner.model.named_parameters() if p.requires_grad
    }
    return Identity(plan.global_batch, plan.samples, plan.seed, config.optim, shapes, base_model)


def _resolve(data: Any) -> TokenizedDataset:
    """The data set itself, or what an object reference stands for: a view of the machine's one copy."""
    if isinstance(data, TokenizedDataset):
        return data
    import ray

    return ray.get(data)
