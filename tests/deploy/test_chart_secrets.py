"""Secrets that the chart makes: random at the first install, the same ones after every upgrade."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import helm_python as helm
import pytest

from tests.deploy.chart import EVERYTHING, NAMESPACE, RELEASE, YOURS, Rendered, loaded, render, with_values

SECRETS = {
    "ray-auth": {"auth_token"},
    "postgresql": {"password", "url"},
    "redis": {"password"},
    "object-store": {"secretAccessKey", "accessKeyId"},
}


class FakeKubernetes:
    """As much of an API server as `lookup` asks: what there is, and the Secrets of one namespace."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, str]] = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = fake.answer(self.path.partition("?")[0])
                data = json.dumps(
                    body or {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
                ).encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def keep(self, rendered: Rendered) -> None:
        """What `helm install` would have stored."""
        for each in rendered.of_kind("Secret"):
            self.secrets[each["metadata"]["name"]] = each["stringData"]

    def answer(self, path: str) -> dict[str, object] | None:
        prefix = f"/api/v1/namespaces/{NAMESPACE}/secrets/"
        if path.startswith(prefix):
            stored = self.secrets.get(path.removeprefix(prefix))
            if stored is None:
                return None
            data = {key: base64.b64encode(value.encode()).decode() for key, value in stored.items()}
            name = path.removeprefix(prefix)
            return {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name, "namespace": NAMESPACE},
                "data": data,
            }
        secrets = {"name": "secrets", "singularName": "secret", "namespaced": True, "kind": "Secret", "verbs": ["get"]}
        return {
            "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [secrets]},
        }.get(path)


@pytest.fixture
def kubernetes() -> Iterator[FakeKubernetes]:
    fake = FakeKubernetes()
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def upgrade(kubernetes: FakeKubernetes, values: dict) -> Rendered:
    with helm.Config(
        namespace=NAMESPACE, kube_apiserver=kubernetes.url, kube_token="x", storage_driver="memory"
    ) as config:
        files = config.render(loaded(), values, name=RELEASE, namespace=NAMESPACE, is_upgrade=True)
    return Rendered(files)


def secrets_of(rendered: Rendered) -> dict[str, dict[str, str]]:
    return {e["metadata"]["name"].removeprefix("rel-arkor-ray-"): e["stringData"] for e in rendered.of_kind("Secret")}


def test_each_is_random_and_long_and_outlives_the_release():
    first, second = secrets_of(render(EVERYTHING)), secrets_of(render(EVERYTHING))
    assert {name: set(values) for name, values in first.items()} == SECRETS
    made = [first[name][key] for name in SECRETS for key in SECRETS[name] - {"url", "accessKeyId"}]
    assert len(set(made)) == 4 and all(len(value) >= 40 and value.isalnum() for value in made)
    assert not set(made) & {value for values in second.values() for value in values.values()}
    for each in render(EVERYTHING).of_kind("Secret"):
        assert each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_an_upgrade_keeps_every_one(kubernetes):
    installed = render(EVERYTHING)
    kubernetes.keep(installed)
    upgraded = upgrade(kubernetes, with_values(EVERYTHING, api={"replicas": 1}))
    assert secrets_of(upgraded) == secrets_of(installed)
    assert "delete raycluster" in upgraded.notes


def test_one_that_is_not_there_yet_is_made_and_the_others_are_kept(kubernetes):
    installed = render(EVERYTHING)
    kubernetes.keep(installed)
    del kubernetes.secrets["rel-arkor-ray-redis"]
    before, after = secrets_of(installed), secrets_of(upgrade(kubernetes, EVERYTHING))
    assert before.pop("redis") != after.pop("redis")
    assert before == after


def test_a_given_one_takes_the_place_of_the_one_that_is_kept(kubernetes):
    kubernetes.keep(render(EVERYTHING))
    given = with_values(EVERYTHING, rayAuth={"token": "f1c0ffee5ca1ab1e0ddba11deadbeef0"})
    assert secrets_of(upgrade(kubernetes, given))["ray-auth"]["auth_token"] == "f1c0ffee5ca1ab1e0ddba11deadbeef0"


def test_of_what_is_yours_the_chart_makes_none():
    assert set(secrets_of(render(YOURS))) == {"ray-auth"}
    named = render(with_values(YOURS, rayAuth={"existingSecret": "ours"}))
    assert secrets_of(named) == {}
    assert named.cluster["authOptions"]["secretName"] == "ours"
