"""The controller: a detached Ray actor, restarted by Ray, that turns the reconciler and starts serving applications."""

from __future__ import annotations

import logging
import threading
from typing import Any

from arkor_ray.db.session import Database
from arkor_ray.jobs.launcher import RayJobsLauncher
from arkor_ray.jobs.reconciler import Reconciler
from arkor_ray.jobs.serving_applications import ServingApplications
from arkor_ray.jobs.storage_sweep import StorageSweep
from arkor_ray.placement import CONTROLLER, HARDLY_A_CPU, NAMESPACE, nodes_for
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.schemas.job import Precision
from arkor_ray.settings import Settings
from arkor_ray.telemetry import process
from arkor_ray.telemetry.export import Batch, FewModels

logger = logging.getLogger(__name__)

TURN_S = 0.5
SERVING, SERVING_CALLS = "serving", 64  # the calls that wait for a serving application, and how many may at a time


class Controller:
    """The actor: turns the Reconciler in a thread and answers those who need a serving application."""

    def __init__(self) -> None:
        process.begin()
        self._settings = Settings.load()
        self._serving = ServingApplications(self._settings)
        self._models = FewModels(entry.name for entry in self._settings.base_models.models)
        self._thread = threading.Thread(target=self._loop, name="reconciler", daemon=True)
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._thread.start()

    def ping(self) -> bool:
        """True while the loop runs."""
        return self._thread.is_alive()

    def ensure_serving(self, base_model: str, base_precision: BasePrecision) -> str | None:
        """As ServingApplications.ensure: soon, whether it runs or not. In threads of its own, see `ensure_controller`."""
        return self._serving.ensure(base_model, base_precision)

    def default_precision(self) -> Precision:
        return self._serving.default_precision()

    def take_counts(self, batch: Batch) -> None:
        """What a job's processes have counted since their last call (see telemetry/export.py)."""
        batch.replay(self._models)

    def driver_logs(self, submission: str) -> str | None:
        """What a job's driver printed; None if Ray does not know it."""
        return RayJobsLauncher(self._settings).logs(submission)

    def stop(self) -> None:
        """Ends the loop and gives up the lease; for a clean shutdown of the service."""
        self._stopping.set()
        self._stopped.wait(10)

    def _loop(self) -> None:
        db = Database(self._settings.database_url)
        reconciler: Reconciler | None = None
        while not self._stopping.is_set():
            try:
                if reconciler is None:
                    db.migrate()  # we may be the first to come
                    sweep = StorageSweep(self._settings, db)
                    reconciler = Reconciler(self._settings, db, RayJobsLauncher(self._settings), self._serving, sweep)
                reconciler.turn()
            except Exception:  # a loop that ends leaves every job where it is, and nobody would notice
                logger.exception("The controller's turn failed; the next one tries again")
            self._stopping.wait(TURN_S)
        if reconciler is not None:
            reconciler.release()
        self._stopped.set()


def ensure_controller(settings: Settings) -> Any:
    """The controller's actor handle, started if it does not run yet."""
    import ray

    options: dict[str, Any] = {
        "name": CONTROLLER,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": HARDLY_A_CPU,
        "label_selector": nodes_for(settings, "control-plane"),
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 64,
    }
    # Whoever waits for serving holds a thread for some seconds; however many do, everybody else finds one of the others.
    ray.method(concurrency_group=SERVING)(Controller.ensure_serving)
    actor_class: Any = ray.remote(concurrency_groups={SERVING: SERVING_CALLS})  # type: ignore[call-overload]  # not in its stubs
    return actor_class(Controller).options(**options).remote()
