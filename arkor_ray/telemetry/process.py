"""What every server process does first, and what those of a job do last."""

from __future__ import annotations

from arkor_ray.telemetry import logs, metrics, tracing
from arkor_ray.telemetry.export import ControllerExporter, RayExporter, each_second, send_to_controller

_of_job: ControllerExporter | None = None


def begin() -> None:
    """In a replica or the controller: logs, traces and metrics."""
    logs.configure()
    tracing.configure()
    exporter = RayExporter()
    metrics.export_to(exporter)
    each_second(exporter.again)


def begin_of_job(job_id: str, attempt: int, *, measures: bool = True) -> None:
    """In a process that serves one attempt at a job; `end_of_job` comes last.

    Args:
        measures: False for a worker that does the same as the first one, which counts for all.
    """
    global _of_job
    logs.configure(job_id=job_id, attempt=attempt)
    if not measures or _of_job is not None:
        return
    tracing.configure()
    gauges = RayExporter()
    _of_job = ControllerExporter(send_to_controller, gauges)
    metrics.export_to(_of_job)
    each_second(gauges.again)
    each_second(_of_job.send)


def end_of_job() -> None:
    """Before such a process ends: its last counts and spans leave it. Blocks, for some seconds at most."""
    if _of_job is not None:
        _of_job.send(surely=True)
    tracing.flush()
