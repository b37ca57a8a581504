"""How the controller's actor is made. What it does in its turns is in test_reconciler.py."""

from __future__ import annotations

from types import SimpleNamespace

from arkor_ray.jobs import controller


def test_calls_that_wait_for_serving_take_no_thread_from_the_others(settings, monkeypatch):
    made = {}

    def remote(**options):
        made.update(options)
        return lambda actor: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: None))

    monkeypatch.setattr("ray.remote", remote)
    controller.ensure_controller(settings)
    assert set(made["concurrency_groups"]) == {controller.Controller.ensure_serving.__ray_concurrency_group__}
    others = (controller.Controller.ping, controller.Controller.driver_logs, controller.Controller.take_counts)
    assert not any(hasattr(each, "__ray_concurrency_group__") for each in others)
