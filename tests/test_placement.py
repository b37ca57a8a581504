"""Each part asks Ray for the nodes of its role, and for none where nodes have no roles."""

from __future__ import annotations

import pytest
from ray._private.label_utils import validate_label_selector
from ray.serve._private.config import ReplicaConfig

from arkor_ray.api.serve_app import build_api
from arkor_ray.jobs import controller
from arkor_ray.jobs.launcher import RayJobsLauncher
from arkor_ray.placement import nodes_for
from arkor_ray.serving.app import build_app, inference_args
from arkor_ray.settings import Settings
from arkor_ray.training.main import make_spec

JOB = {"model": "m", "datasetSource": {"type": "blob", "url": "https://example.com/rows.jsonl"}}


@pytest.fixture(params=[True, False], ids=["roles", "no roles"])
def settings(request, tmp_path) -> Settings:
    return Settings.load(data_dir=tmp_path, node_roles=request.param, models={"m": "a/b"})


def expected(settings: Settings, role: str) -> dict[str, str]:
    return {"arkor-ray/role": role} if settings.node_roles else {}


def test_the_selector_is_one_that_ray_accepts(settings):
    assert validate_label_selector(nodes_for(settings, "control-plane")) is None


def test_the_api_runs_on_the_control_plane(settings):
    options = build_api(settings)._bound_deployment.ray_actor_options
    assert options["label_selector"] == expected(settings, "control-plane")
    ReplicaConfig.create(type("Api", (), {}), ray_actor_options=options)  # raises for what Serve does not take


def test_the_controller_runs_on_the_control_plane(settings, monkeypatch):
    seen = {}

    class Remote:
        def options(self, **options):
            seen.update(options)
            return self

        def remote(self):
            return "handle"

    monkeypatch.setattr("ray.remote", lambda **_: lambda actor: Remote())
    assert controller.ensure_controller(settings) == "handle"
    assert seen["label_selector"] == expected(settings, "control-plane")


def test_base_models_run_on_the_nodes_for_serving(settings):
    options = build_app(inference_args(settings, "a/b", "fp32"))._bound_deployment.ray_actor_options
    assert options["label_selector"] == expected(settings, "serving")


def test_drivers_and_workers_run_on_the_nodes_for_training(settings, monkeypatch):
    assert make_spec("job", 1, JOB, None, settings).nodes == expected(settings, "training")
    submitted = {}

    class Client:
        def __init__(self, address):
            pass

        def submit_job(self, **arguments):
            submitted.update(arguments)

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    monkeypatch.setattr("ray.get_runtime_context", lambda: type("Context", (), {"gcs_address": "127.0.0.1:1"}))
    RayJobsLauncher(settings).submit("job", 1, {})
    # None rather than an empty one, with which Ray Jobs would no longer put the driver on the head.
    assert submitted["entrypoint_label_selector"] == (expected(settings, "training") or None)
