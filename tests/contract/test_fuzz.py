"""Whatever is sent, each route answers as the service's own OpenAPI document says, and never with a fault of its own.

In process: it is the routes that are tried here, some thousands of times, and always in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings, strategies
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.python import asgi
from starlette.types import Receive, Scope, Send

from arkor_ray.api.app import create_app
from arkor_ray.api.routes import ROUTERS
from arkor_ray.db.session import Database
from arkor_ray.schemas.chat import ChatRequest
from arkor_ray.schemas.endpoint import EndpointCreate
from arkor_ray.schemas.job import JobConfig
from arkor_ray.schemas.openai import ChatCompletionRequest
from arkor_ray.settings import Settings
from tests.api.conftest import CONFIG, MODEL, FakeGateway, FakeLogs, Training

pytestmark = pytest.mark.integration

EXAMPLES = 40  # for each operation
ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
# What is deleted is deleted last, and first what lies within: until then it can be named.
OPERATIONS = sorted(
    ((method, route.path_format) for route in ROUTES for method in route.methods),
    key=lambda each: (each[0] == "DELETE", -len(each[1])),
)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_headers_conformance,
    schemathesis.checks.response_schema_conformance,
]


def _fields(model: type[BaseModel]) -> list[str]:
    """A body's fields, as the wire spells them."""
    return [field.alias or name for name, field in model.model_fields.items()]


# fmt: off
JUNK = [
    None, True, False, 0, -1, 1, 1.5, 1e308, 2**31, 2**63, 10**30, 10**400, "", " ", "0", "-1", "1e999", "nan", "x", "None",
    "x" * 10_000, "ä🎈\u2028", "\x7f", "../../etc", "%00", [], [None], [[]], ["x"], [{}], {}, {"type": None}, {"kind": []},
    {"steps": 10**30}, {"ratio": "1"}, {"enabled": "no"}, {"": {}}, {"$ref": "#"},
]
# fmt: on
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = {"messages": MESSAGES, "baseModel": "Tiny", "stream": False}
ENDPOINT = {"slug": "junk", "target": {"kind": "base_model", "baseModel": "Tiny"}, "authMode": "none"}
OPENAI = {"model": "Tiny", "messages": MESSAGES}
BLOB = {**CONFIG, "datasetSource": {"type": "blob", "url": "https://example.com/rows.jsonl"}}
# By name: the path, a body that is accepted, and the fields that junk is put into, one at a time.
BODIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "anonymous": ("/v1/auth/anonymous", {"kind": "cli"}, ["kind"]),
    "project": ("/v1/projects", {"name": "junk", "slug": "junk"}, ["name", "slug"]),
    "token": ("/v1/tokens", {"label": "junk"}, ["label", "email", "expiresInDays"]),
    "key": ("/v1/endpoints/{endpoint_id}/keys", {"label": "junk"}, ["label"]),
    "job": (
        "/v1/jobs",
        {"name": "junk", "config": CONFIG},
        ["name", "config", *(f"config.{name}" for name in _fields(JobConfig)), "config.datasetSource.type",
         "config.datasetSource.name", "config.datasetSource.split", "config.datasetSource.subset",
         "config.datasetSplit.enabled", "config.datasetSplit.testSize", "config.datasetSplit.seed",
         "config.saveSteps.steps", "config.evalSteps.ratio", "config.unknown"],
    ),
    "job with a file": (
        "/v1/jobs", {"name": "junk", "config": BLOB}, ["config.datasetSource.url", "config.datasetSource.token"]
    ),
    "chat": (
        "/v1/inference/chat",
        CHAT,
        [*_fields(ChatRequest), "messages.0", "messages.0.role", "messages.0.content", "messages.0.tool_calls",
         "stop.0", "streamOptions.includeUsage", "responseFormat.type", "structuredOutputs.json",
         "structuredOutputs.regex", "structuredOutputs.choice", "structuredOutputs.grammar",
         "structuredOutputs.json_object", "logitBias", "unknown"],
    ),
    "chat of an adapter": (
        "/v1/inference/chat",
        {"messages": MESSAGES, "adapter": {"kind": "checkpoint", "jobId": "{job_id}", "step": 2}, "stream": False},
        ["adapter.kind", "adapter.jobId", "adapter.step"],
    ),
    "chat with tools": (
        "/v1/inference/chat",
        {**CHAT, "tools": [TOOL], "toolChoice": {"type": "function", "function": {"name": "f"}}},
        ["tools.0", "tools.0.type", "tools.0.function", "tools.0.function.name", "tools.0.function.parameters",
         "tools.0.function.parameters.properties", "toolChoice.type", "toolChoice.function.name"],
    ),
    "chat in JSON": (
        "/v1/inference/chat",
        {**CHAT, "responseFormat": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}},
        ["responseFormat.json_schema", "responseFormat.json_schema.name", "responseFormat.json_schema.schema",
         "responseFormat.json_schema.strict", "responseFormat.json_schema.schema.$ref",
         "responseFormat.json_schema.schema.$schema", "responseFormat.json_schema.schema.properties",
         "responseFormat.json_schema.schema.pattern", "responseFormat.json_schema.schema.multipleOf"],
    ),
    "endpoint": (
        "/v1/endpoints",
        ENDPOINT,
        [*_fields(EndpointCreate), "target.kind", "target.baseModel", "target.adapter"],
    ),
    "completion": (
        "/v1/chat/completions",
        OPENAI,
        [*_fields(ChatCompletionRequest), "messages.0", "messages.0.content", "messages.0.content.0",
         "stream_options.include_usage", "guided_json", "guided_regex", "modalities", "functions"],
    ),
    "public completion": ("/e/fuzz/v1/chat/completions", OPENAI, _fields(ChatCompletionRequest)),
}  # fmt: skip
PLACES = [(body, place) for body, (_, _, places) in BODIES.items() for place in places]
NOT_FOUND = {"model", "adapter.jobId", "adapter.step"}
TAKEN = {"project", "endpoint"}


@dataclass
class World:
    """The application with something in it, how to call it, and what a caller may name."""

    http: requests.Session
    schema: Any
    headers: dict[str, str]
    scope: dict[str, str]
    names: dict[str, str]

    def post(self, path: str, body: Any) -> requests.Response:
        headers = {**self.headers, "Content-Type": "application/json"}
        return self.http.post(path, params=self.scope, data=json.dumps(body), headers=headers)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("fuzz")
    configured = Settings(
        data_dir=folder, cache_dir=folder, models={MODEL: "base/model", "Tiny": "base/tiny"}, max_queued_jobs=10**6,
        public_url="http://testserver",  # as Starlette's client calls it
    )  # fmt: skip
    db = Database(configured.database_url)
    db.migrate()
    app = create_app(configured, db, FakeGateway(), logs=FakeLogs())

    async def http_only(scope: Scope, receive: Receive, send: Send) -> None:
        # Schemathesis ends an application's lifespan after each test, and this one is for all of them.
        assert scope["type"] == "http"
        await app(scope, receive, send)

    with asgi.get_client(http_only) as http:
        made = http.post("/v1/auth/anonymous", json={"kind": "cli"}).json()
        scope = {"orgSlug": made["personalOrg"]["slug"], "projectSlug": "fuzz"}
        schema = schemathesis.openapi.from_asgi("/openapi.json", http_only, config=_config())
        there = World(http, schema, {"Authorization": f"Bearer {made['token']}"}, scope, {})
        there.names = _furnish(there, Training(db, configured))
        yield there
    app.state.services.endpoints.close()
    app.state.services.runs.close()
    app.state.services.last_used.close()
    db.close()


def _config() -> SchemathesisConfig:
    # A made-up token would take the place of the caller's and end in 401; test_tenancy.py tries those.
    generation = GenerationConfig(with_security_parameters=False)
    return SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(generation=generation)))


def _furnish(world: World, training: Training) -> dict[str, str]:
    """By path parameter, the name of something that is there."""
    assert world.post("/v1/projects", {"name": "fuzz", "slug": "fuzz"}).status_code == 201
    job_id = world.post("/v1/jobs", {"name": "fuzz", "config": CONFIG}).json()["job"]["id"]
    training.start(job_id)
    training.save(job_id, 2)
    training.complete(job_id)
    target = {"kind": "adapter", "adapter": {"kind": "final", "jobId": job_id}}
    endpoint = world.post("/v1/endpoints", {"slug": "fuzz", "target": target, "authMode": "none"}).json()["deployment"]
    key = world.post(f"/v1/endpoints/{endpoint['id']}/keys", {"label": "fuzz"}).json()["key"]
    token = world.post("/v1/tokens", {"label": "fuzz"}).json()
    return {
        "job_id": job_id,
        "ref": "2",
        "path": "adapter_config.json",
        "endpoint_id": endpoint["id"],
        "key_id": key["id"],
        "slug": "fuzz",
        "model": "Tiny",
        "token_id": token["id"],
    }


def test_document_has_every_route(world: World) -> None:
    documented = {(method.upper(), path) for path, item in world.schema.raw_schema["paths"].items() for method in item}
    assert documented == set(OPERATIONS)


@pytest.mark.parametrize(("body", "place"), PLACES)
def test_junk_in_a_field_is_accepted_or_refused_by_name(world: World, body: str, place: str) -> None:
    path, good, _ = json.loads(_with_names(json.dumps(BODIES[body]), world.names))
    expected = {200, 201, 400} | ({404} if place in NOT_FOUND else set()) | ({409} if body in TAKEN else set())
    for junk in JUNK:
        answer = world.post(path, _put(good, place.split("."), junk))
        assert answer.status_code in expected, (junk, answer.text)
        if answer.status_code == 400:
            answered = answer.json()
            assert answered["param"] if "param" in answered else answered["error"]["param"], (junk, answer.text)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answer_is_as_documented(world: World, method: str, path: str) -> None:
    operation = world.schema[path][method]
    named = {parameter.name for parameter in operation.path_parameters}
    names = {"path_parameters": {name: world.names[name] for name in named}}
    scope = {"query": world.scope}
    # Valid and not; of things that are there, of others in the same project, of anything anywhere. Else hardly a request
    # would get past the scope.
    cases = [
        operation.as_strategy(mode, **given) for mode in GenerationMode for given in ({**names, **scope}, scope, {})
    ]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategies.one_of(cases))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(session=world.http, headers=world.headers, checks=CHECKS)

    check()


def _with_names(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _put(body: Any, place: list[str], junk: Any) -> Any:
    """A copy of `body` with `junk` at `place`; what is missing on the way is made."""
    if not place:
        return junk
    name, *rest = place
    if name == "0":
        return [_put(body[0] if isinstance(body, list) and body else None, rest, junk)]
    return {
        **(body if isinstance(body, dict) else {}),
        name: _put((body if isinstance(body, dict) else {}).get(name), rest, junk),
    }
