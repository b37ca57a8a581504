"""What is asked of a Ray that somebody else started; a real one is joined in tests/integration/test_local_nodes.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from arkor_ray import joined_ray
from arkor_ray.errors import InvalidRequestError
from arkor_ray.settings import Settings

CLUSTER = {
    "cluster": True,
    "database_url": "postgresql://arkor:3f9c1ab207e64d58@db/arkor",
    "storage_url": "s3://arkor/jobs",
}


class FakeRay:
    """Nodes, a dashboard, and whether it asks for a token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses = ["10.0.0.1"]
        self.dashboard = "http://10.0.0.1:8265"
        self.token = True
        monkeypatch.setattr(
            "ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: self.token
        )
        monkeypatch.setattr("ray.nodes", self._nodes)
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
        monkeypatch.setattr("ray.dashboard.utils.ray_address_to_api_server_url", lambda gcs: self.dashboard)

    def _nodes(self) -> list[dict[str, object]]:
        gone = {"Alive": False, "NodeManagerAddress": "10.0.0.99"}
        return [gone, *({"Alive": True, "NodeManagerAddress": address} for address in self.addresses)]


@pytest.fixture
def their_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return FakeRay(monkeypatch)


def test_a_cluster_whose_ray_asks_nobody_for_a_token_is_refused_unless_the_operator_wants_it(their_ray, caplog):
    joined_ray.check_ray(Settings.load(**CLUSTER))
    their_ray.token = False
    with pytest.raises(InvalidRequestError, match=r"RAY_AUTH_MODE=token.*ARKOR_RAY_ALLOW_RAY_WITHOUT_TOKEN=1"):
        joined_ray.check_ray(Settings.load(**CLUSTER))
    assert not caplog.records
    joined_ray.check_ray(Settings.load(**CLUSTER, allow_ray_without_token=True))
    assert "runs code on its nodes" in caplog.text


def test_on_one_machine_a_ray_without_a_token_is_only_said(their_ray, tmp_path, caplog):
    their_ray.token = False
    joined_ray.check_ray(Settings.load(data_dir=tmp_path))
    assert "RAY_AUTH_MODE=token" in caplog.text


@pytest.mark.parametrize(
    ("addresses", "dashboard", "refused"),
    [
        (["10.0.0.1", "10.0.0.2"], "http://127.0.0.1:8265", True),
        (["10.0.0.1", "10.0.0.2"], "http://10.0.0.1:8265", False),
        (["10.0.0.1"], "http://127.0.0.1:8265", False),
        (["127.0.0.2", "127.0.0.3"], "http://127.0.0.2:8265", False),
    ],
)
def test_a_dashboard_that_other_machines_cannot_reach_is_refused(their_ray, addresses, dashboard, refused):
    their_ray.addresses, their_ray.dashboard = addresses, dashboard
    if refused:
        with pytest.raises(InvalidRequestError, match=r"--dashboard-host=0\.0\.0\.0"):
            joined_ray.check_ray(Settings.load(**CLUSTER))
    else:
        joined_ray.check_ray(Settings.load(**CLUSTER))


def test_settings_that_a_node_does_not_share_are_named(tmp_path):
    ours = Settings.load(data_dir=tmp_path).environment()
    theirs = {**ours, "ARKOR_RAY_DATABASE_URL": "postgresql://elsewhere/arkor"}
    assert joined_ray.differing_settings(ours, theirs) == ["ARKOR_RAY_DATABASE_URL"]


def test_a_joined_ray_is_gone_only_when_it_stays_away(monkeypatch):
    monkeypatch.setattr(joined_ray, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(joined_ray, "GONE_S", 1.0)
    answers = iter([True, *[False] * 5, True])  # a head that comes back, then none
    asked = []
    monkeypatch.setattr(joined_ray, "answers", lambda address: asked.append(address) or next(answers, False))
    joined_ray.wait_while_answering("head:6379")
    assert next(answers, None) is None
    assert len(asked) > 7 and set(asked) == {"head:6379"}
