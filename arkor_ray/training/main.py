"""The driver of one attempt at a job: the entrypoint of its Ray Job.

python -m arkor_ray.training.main --job-id JOB --attempt N

Exit code 0: the job has its last word, or was cancelled. Anything else: the attempt was lost, and the controller
starts another.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from arkor_ray.telemetry import process, tracing

if TYPE_CHECKING:
    from arkor_ray.settings import Settings
    from arkor_ray.training.job_spec import JobSpec

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m arkor_ray.training.main", description="Runs one attempt at a job.")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    args = parser.parse_args(argv)
    process.begin_of_job(args.job_id, args.attempt)
    signal.signal(signal.SIGTERM, _end_gracefully)
    try:
        with tracing.span("attempt", parent=tracing.job_traceparent(args.job_id), arkor__attempt=args.attempt):
            return run(args.job_id, args.attempt)
    finally:
        process.end_of_job()


def run(job_id: str, attempt: int) -> int:
    """Reads the job from the database and runs it; what is wrong with the job itself becomes its last word."""
    import ray

    from arkor_ray.db import jobs
    from arkor_ray.db.session import Database
    from arkor_ray.db.tables import JobRow
    from arkor_ray.errors import InvalidRequestError
    from arkor_ray.schemas.job import JobStatus
    from arkor_ray.settings import Settings

    settings = Settings.load()
    db = Database(settings.database_url)
    with db.read() as session:
        row = session.get(JobRow, job_id)
        if row is None or row.attempt != attempt or JobStatus(row.status).is_terminal:
            logger.info("Job %s needs no attempt %d any more", job_id, attempt)
            return 0
        wire_config, token = row.config, row.dataset_token

    from arkor_ray.placement import NAMESPACE
    from arkor_ray.storage import layout
    from arkor_ray.telemetry.metrics import JOB_FAILURES
    from arkor_ray.training.driver_log import DriverLog
    from arkor_ray.training.heartbeat import Heartbeat
    from arkor_ray.training.recorder import start_recorder
    from arkor_ray.training.trainer import run_job

    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what workers print goes into a file, by way of this process
    logging.getLogger("ray._private.worker").setLevel(logging.WARNING)  # it greets in colours, here too
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=True)
    recorder = start_recorder(job_id, attempt)

    def forget_token() -> None:
        with db.write() as session:
            jobs.drop_dataset_token(session, job_id)

    with Heartbeat(recorder):
        try:
            spec = make_spec(job_id, attempt, wire_config, token, settings)
        except (
            InvalidRequestError
        ) as error:  # what was accepted no longer holds, such as a model that left the catalogue
            JOB_FAILURES.add(reason=error.code)
            ray.get(recorder.failed.remote(error.message, None))
            return 0
        with DriverLog(spec.open_store(), layout.log_key(job_id, attempt)):
            run_job(spec, recorder, on_data_stored=forget_token)
    return 0


def make_spec(
    job_id: str, attempt: int, wire_config: dict[str, Any], dataset_token: str | None, settings: Settings
) -> JobSpec:
    """The job as the train loop wants it. Raises InvalidRequestError (ModelError for the catalogue)."""
    from arkor_ray.placement import nodes_for
    from arkor_ray.schemas.job import JobConfig
    from arkor_ray.training.job_spec import DatasetPolicy, JobSpec

    config = JobConfig.parse(wire_config)
    if config.precision is None and settings.default_precision != "auto":
        config.precision = settings.default_precision
    if dataset_token is not None and config.dataset_source.type == "blob":
        config.dataset_source = config.dataset_source.model_copy(update={"token": dataset_token})
    base = settings.find_model(config.model)
    return JobSpec(
        job_id=job_id,
        attempt=attempt,
        config=config,
        base_model=base.reference,
        base_name=base.name,
        trust_remote_code=base.trust_remote_code,
        model_cache=settings.model_cache,
        storage_url=settings.storage_url,
        s3_endpoint_url=settings.s3_endpoint_url,
        dataset_policy=DatasetPolicy(
            allow_private_hosts=settings.datasets_allow_private_hosts,
            allow_local_paths=settings.datasets_allow_local_paths,
            max_bytes=settings.datasets_max_bytes,
            timeout_s=settings.datasets_timeout_s,
        ),
        nodes=nodes_for(settings, "training"),
        cpus_per_worker=settings.training_cpus_per_worker,
        scratch_dir=settings.data_dir / "scratch",
    )


def _end_gracefully(signum: int, frame: FrameType | None) -> None:
    """Ray sends SIGTERM to end a job. Ray Train ends its workers on SIGINT, and only if that finds the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    raise SystemExit(main())
