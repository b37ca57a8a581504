"""The serving applications of base models: which there are, and the start of those that are wanted."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from arkor_ray.errors import ModelError, ServiceUnavailableError
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.schemas.job import JobConfig, Precision
from arkor_ray.settings import Settings

logger = logging.getLogger(__name__)


class ServingApplications:
    """Starts them, one per base model and precision; concurrent callers share one start."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._starts: dict[str, Future[None]] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="serving")

    def default_precision(self) -> Precision:
        """The precision of a base model where nothing is said: bf16 if the cluster has GPUs, else fp32."""
        if self._settings.default_precision != "auto":
            return self._settings.default_precision
        import ray

        return "bf16" if ray.cluster_resources().get("GPU", 0) > 0 else "fp32"

    def precision_of(self, config: JobConfig) -> BasePrecision:
        """The base precision that a job trains on, and that its adapters are therefore served on."""
        return "nf4" if config.load_in_4bit else config.precision or self.default_precision()

    def prefetch(self, base_model: str, base_precision: BasePrecision) -> None:
        """Begins to start the application and returns; a failure is logged here and told to whoever needs it later."""
        self._start(base_model, base_precision).add_done_callback(_log_failure)

    def ensure(self, base_model: str, base_precision: BasePrecision) -> None:
        """Returns once the application runs. Raises what its start raised."""
        self._start(base_model, base_precision).result()

    def _start(self, base_model: str, base_precision: BasePrecision) -> Future[None]:
        from arkor_ray.serving.app import application_name

        name = application_name(base_model, base_precision)
        with self._lock:
            start = self._starts.get(name)
            if start is None or start.done():  # a done one proves nothing about now: the application may be gone
                start = self._starts[name] = self._pool.submit(self._run, name, base_model, base_precision)
            return start

    def _run(self, name: str, base_model: str, base_precision: BasePrecision) -> None:
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        from arkor_ray.serving.app import build_app, inference_args

        # Serve repairs what is starting or has lost a replica; running it anew would replace the replicas that are well.
        on_the_way = (ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY, ApplicationStatus.DELETING)
        while (application := serve.status().applications.get(name)) is not None:
            if application.status == ApplicationStatus.RUNNING:
                return
            if application.status not in on_the_way:
                break
            time.sleep(0.2)
        logger.info("Starting serving application %s for %s (%s)", name, base_model, base_precision)
        try:
            serve.run(
                build_app(inference_args(self._settings, base_model, base_precision)), name=name, route_prefix=None
            )
        except RuntimeError as error:  # Serve gives up on a deployment whose replicas end again and again
            failed = serve.status().applications.get(name)
            reason = str((failed and failed.message) or error)
            if ModelError.__name__ in reason:
                raise ModelError(f"The base model {base_model} cannot be served: {reason[-600:]}") from error
            raise ServiceUnavailableError(f"Serving of {base_model} did not start: {reason[-600:]}") from error


def _log_failure(start: Future[None]) -> None:
    if error := start.exception():
        logger.error("A serving application did not start: %s", error, exc_info=error)
