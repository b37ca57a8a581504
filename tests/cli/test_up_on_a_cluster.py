"""`arkor-ray up --ray-address`, without a Ray."""

from __future__ import annotations

import pytest

from arkor_ray import embedded, service
from arkor_ray.cli import up
from arkor_ray.settings import Settings
from arkor_ray.telemetry import logs, tracing


class FakeRay:
    """A cluster that was joined; Ctrl-C comes as soon as the service is ready."""

    metrics_url = None

    def __init__(self, settings: Settings, address: str | None) -> None:
        self.settings = settings

    def __enter__(self) -> FakeRay:
        return self

    def wait(self) -> None:
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({}, True),
        ({"ARKOR_RAY_MODELS": "house=owner/base"}, False),
        ({"ARKOR_RAY_MODELS": "*"}, False),
        ({"ARKOR_RAY_MODELS_ALLOW_LOCAL_PATHS": "1"}, False),
    ],
)
def test_a_cluster_without_base_models_is_warned_of(variables, warned, tmp_path, monkeypatch, capsys):
    for name in ("ARKOR_RAY_MODELS", "ARKOR_RAY_CATALOGUE", "ARKOR_RAY_MODELS_ALLOW_LOCAL_PATHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "text")  # `up` sets it
    for module in (logs, tracing):
        monkeypatch.setattr(module, "configure", lambda: None)
    monkeypatch.setattr(embedded, "LocalRay", FakeRay)
    monkeypatch.setattr(service, "check_reachable", lambda settings: None)
    monkeypatch.setattr(up, "_serve", lambda settings: None)
    monkeypatch.setattr(up, "_stop_on_signals", lambda: None)
    up.up(port=0, data_dir=tmp_path, ray_address="127.0.0.2:6379")
    told = capsys.readouterr()
    assert "arkor-ray is ready at" in told.out
    assert ("set ARKOR_RAY_MODELS on every node" in told.err) is warned
