"""The serving applications of base models: which there are, and the start of those that are wanted."""

from __future__ import annotations

import logging
import threading
import time
from concurrent import futures
from typing import TYPE_CHECKING

from arkor_ray.errors import ModelError, ServiceUnavailableError
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.schemas.job import JobConfig, Precision
from arkor_ray.settings import Settings

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

logger = logging.getLogger(__name__)

# How long one call is kept. Ray ends no call whose caller has left, so whoever waits longer asks again.
ANSWER_S = 10.0
# How long an application is watched for all who ask. Serve goes on with it, and the next to ask has it watched again.
WATCH_S = 60.0

_BUILDING = threading.Lock()  # Serve keeps a register of what it pickles that is not safe for threads


class ServingApplications:
    """Starts them, one per base model and precision; concurrent callers share one start.

    Each start has a thread of its own: one whose replicas find no GPU goes on for ever, and none may wait behind it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._starts: dict[str, _Start] = {}

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
        self._start(base_model, base_precision).ended.add_done_callback(_log_failure)

    def ensure(self, base_model: str, base_precision: BasePrecision) -> str | None:
        """Starts the application if need be. None once it runs; where it does not within ANSWER_S, what Serve says of it.

        Raises ModelError for a base model that cannot be served, else ServiceUnavailableError with the reason.
        """
        start = self._start(base_model, base_precision)
        futures.wait([start.ended], ANSWER_S)
        return start.ended.result() if start.ended.done() else start.said

    def _start(self, base_model: str, base_precision: BasePrecision) -> _Start:
        from arkor_ray.serving.app import application_name

        name = application_name(base_model, base_precision)
        with self._lock:
            start = self._starts.get(name)
            if start is None or start.ended.done():  # a done one proves nothing about now: the application may be gone
                start = self._starts[name] = _Start(self._settings, name, base_model, base_precision)
            return start


class _Start:
    """One application on its way, in a thread. `said`: what Serve last said of it.

    `ended`: None once it runs, what Serve says of it when it is watched no more, or why it will not run.
    """

    def __init__(self, settings: Settings, name: str, base_model: str, base_precision: BasePrecision) -> None:
        self.said = "Ray Serve does not say how far it is"
        self.ended: futures.Future[str | None] = futures.Future()
        self._settings = settings
        self._name, self._base_model, self._base_precision = name, base_model, base_precision
        threading.Thread(target=self._run, name=f"start {name}", daemon=True).start()

    def _run(self) -> None:
        try:
            self.ended.set_result(self._watch())
        except Exception as error:  # told to whoever asked
            self.ended.set_exception(error)

    def _watch(self) -> str | None:
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        # Serve repairs what is starting or has lost a replica; running it anew would replace the replicas that are well.
        on_the_way = (ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY, ApplicationStatus.DELETING)
        deadline, deployed = time.monotonic() + WATCH_S, False
        while True:
            application = serve.status().applications.get(self._name)
            if application is not None and application.status == ApplicationStatus.RUNNING:
                return None
            if application is not None and application.status in on_the_way:
                self.said = _what_serve_says(application)
                if time.monotonic() > deadline:
                    return self.said
                time.sleep(0.2)
            elif deployed:
                raise self._failure(application)
            else:
                self._deploy()
                deployed = True

    def _deploy(self) -> None:
        from ray import serve

        from arkor_ray.serving.app import build_app, inference_args

        logger.info("Starting serving application %s for %s (%s)", self._name, self._base_model, self._base_precision)
        with _BUILDING:
            app = build_app(inference_args(self._settings, self._base_model, self._base_precision))
        target = serve.RunTarget(app, name=self._name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def _failure(self, application: ApplicationStatusOverview | None) -> ModelError | ServiceUnavailableError:
        """Serve gives up on a deployment whose replicas end again and again."""
        reason = "it was deleted" if application is None else _what_serve_says(application)
        if ModelError.__name__ in reason:
            return ModelError(f"The base model {self._base_model} cannot be served: {reason}")
        return ServiceUnavailableError(f"Serving of {self._base_model} did not start: {reason}")


def _what_serve_says(application: ApplicationStatusOverview) -> str:
    """The end of the longest message: the reason of a replica's death stands at the end of its traceback."""
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return max(messages, key=len)[-600:] or f"it is {application.status.value}"


def _log_failure(ended: futures.Future[str | None]) -> None:
    if error := ended.exception():
        logger.error("A serving application did not start: %s", error, exc_info=error)
