"""One attempt at a job, seen from its driver: data once, then Ray Train's worker group, then the last word.

Ray Train's own reports and checkpoints are not used. A report is a barrier that costs seconds; and our manifests are
the authority on what to go on from, for any number of workers and any Ray version.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from arkor_ray.schemas.dataset import BlobSource
from arkor_ray.schemas.job import BITSANDBYTES_OPTIMIZERS
from arkor_ray.serving.app import gpus_of_replica
from arkor_ray.telemetry import process, tracing
from arkor_ray.telemetry.metrics import JOB_FAILURES
from arkor_ray.training.callbacks import RayEventSink
from arkor_ray.training.data import PreparedData, prepare_data
from arkor_ray.training.failure_policy import FINAL_ERRORS, FinalErrorsEndTheRun, final_error
from arkor_ray.training.job_spec import JobSpec
from arkor_ray.training.loop_config import LoopConfig, LoopResult
from arkor_ray.training.memory import MemoryExhaustedError, naming_what_to_lower
from arkor_ray.training.model import context_length, load_config, load_tokenizer
from arkor_ray.training.rendezvous import NodeAddressConfig

logger = logging.getLogger(__name__)

HEALTH_CHECK_SECONDS = "0.5"  # how soon a dead worker is noticed; Ray's default is 2 s
HUNG_WORKER_SECONDS = "60"  # a worker that does not answer for so long is given up; Ray's default is 10 minutes


def run_job(spec: JobSpec, recorder: Any, on_data_stored: Callable[[], None] = lambda: None) -> None:
    """Trains, and ends the job through `recorder`, the actor handle of a recorder.Recorder: completed, or failed and why.

    Returns also when the job was cancelled, without a last word, since whoever cancelled it has said it. Raises when
    the attempt was lost to infrastructure, so that the process exits with an error and the controller starts the next
    attempt. `on_data_stored` is called once the rows are in storage: from then on the data set's token is of no use.
    """
    try:
        with tracing.span("prepare data"):
            data = _prepare(spec)
        on_data_stored()
        recorder.notice.remote("dataset.preflight", data.preflight)
        result = fit(_without_token(spec), data, recorder)
    except FINAL_ERRORS as error:
        logger.error("The job has failed: %s", error.message)
        JOB_FAILURES.add(reason=error.code)
        ray.get(recorder.failed.remote(error.message, error.fields.get("step"), error.fields.get("preflight")))
        return
    if result.stopped:
        logger.info("Stopped at step %d; a checkpoint is stored", result.step)
        return
    assert result.final_manifest is not None, "a run that was not stopped has a final adapter"
    metrics = {
        "finalLoss": result.metrics["final_loss"],
        "totalSteps": result.step,
        "totalTime": result.metrics["total_time"],
    }
    ray.get(recorder.completed.remote(result.final_manifest, metrics))


def fit(spec: JobSpec, data: PreparedData, recorder: Any) -> LoopResult:
    """Runs the worker group until it is done, restarting it when a worker dies, and with half the rows in a forward pass when
    they do not fit into memory. Raises the error that ended it."""
    loop = LoopConfig(
        spec=spec,
        train=ray.put(data.train),
        evaluation=ray.put(data.evaluation) if data.evaluation is not None else None,
        make_sink=_SinkOf(recorder),
    )
    while True:
        try:
            return _fit(loop)
        except MemoryExhaustedError as error:
            if error.rows is None or error.rows == 1:
                raise
            fewer = error.rows // 2
            logger.warning("%s Going on with %d in a forward pass; the global batch stays.", error.message, fewer)
            loop = replace(loop, spec=replace(loop.spec, rows_per_pass=fewer))


def _fit(loop: LoopConfig) -> LoopResult:
    spec = loop.spec
    # Read by Ray Train's controller, to which the driver's variables are passed on.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_SECONDS)
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", HUNG_WORKER_SECONDS)
    gpus = gpus_of_worker(ray.cluster_resources().get("GPU", 0))
    workdir = spec.scratch_dir / f"ray-train-{spec.job_id}-{spec.attempt}"
    trainer = _Trainer(
        _train_loop,
        train_loop_config={"loop": loop},
        torch_config=NodeAddressConfig(),
        scaling_config=ScalingConfig(
            num_workers=spec.config.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": spec.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
            label_selector=spec.nodes or None,  # type: ignore[call-arg]  # mypy sees the class of Ray Train's version 1
        ),
        run_config=RunConfig(
            name=f"{spec.job_id}-{spec.attempt}",
            storage_path=str(workdir),
            failure_config=FailureConfig(max_failures=spec.max_worker_failures),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        final = final_error(error)
        if final is None:
            raise
        raise final from error
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    answer = getattr(result, "return_value", None)  # of rank 0
    if not isinstance(answer, LoopResult):
        raise RuntimeError("The worker group ended without a result.")
    return answer


def _without_token(spec: JobSpec) -> JobSpec:
    """For the workers, which need no rows from outside; Ray Train writes their configuration into its own state."""
    source = spec.config.dataset_source
    if isinstance(source, BlobSource) and source.token is not None:
        source = source.model_copy(update={"token": None})
    return replace(spec, config=spec.config.model_copy(update={"dataset_source": source}))


def gpus_of_worker(cluster_gpus: float) -> float:
    """One each; where the cluster has just one, what serving leaves of it."""
    if cluster_gpus < 1:
        return 0.0
    return 1 - gpus_of_replica(cluster_gpus) if cluster_gpus == 1 else 1.0


def _prepare(spec: JobSpec) -> PreparedData:
    files = spec.base_files(weights=False)  # the driver's node need not be one that trains
    tokenizer = load_tokenizer(files.path, **files.options)
    return prepare_data(spec, tokenizer, context_length(load_config(files.path, **files.options)))


def _train_loop(config: dict[str, Any]) -> Any:
    loop: LoopConfig = config["loop"]
    first = ray.train.get_context().get_world_rank() == 0
    process.begin_of_job(loop.spec.job_id, loop.spec.attempt, measures=first)
    if not (loop.spec.config.load_in_4bit or loop.spec.config.optim in BITSANDBYTES_OPTIMIZERS):
        # PEFT imports bitsandbytes wherever it is installed, and that loads torch's compiler: 8 s of CPU for nothing.
        # None in sys.modules makes it look not installed; this process trains this one job only.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    # Here, so that neither the driver nor Ray Train's controller wait for PEFT and DeepSpeed.
    from arkor_ray.training.train_loop import train_loop_per_worker

    parent = tracing.job_traceparent(loop.spec.job_id)
    try:
        with (
            tracing.span("train", parent=parent, arkor__attempt=loop.spec.attempt),
            naming_what_to_lower(loop.spec.config),
        ):
            return train_loop_per_worker(loop)
    finally:
        process.end_of_job()


@dataclass(frozen=True)
class _SinkOf:
    """Makes the sink in the worker: threads do not travel."""

    recorder: Any

    def __call__(self) -> RayEventSink:
        return RayEventSink(self.recorder)


class _Trainer(TorchTrainer):
    """There is no public way to say which errors are final, nor that there are no Ray data sets; both are said here."""

    def _create_default_callbacks(self) -> list[Any]:
        # Each of these starts an actor that the workers wait for: one for data sets, which we do not have, and one that
        # removes the placement group of a controller that died, which the end of the driver's Ray Job does anyway.
        unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [each for each in callbacks if not isinstance(each, unneeded)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = FinalErrorsEndTheRun(arguments["failure_policy"])
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]
