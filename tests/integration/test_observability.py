"""What an operator sees of one job and some chats: metrics as Prometheus scrapes them, traces, log lines, the job's log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from arkor_ray.client.client import Client
from arkor_ray.demo.testing import make_tiny_model
from arkor_ray.telemetry import tracing
from tests.integration.stories import ask, assert_whole, config
from tests.servers.arkor import Follower, RunningService, wait_for
from tests.servers.otlp import Collector, running_collector
from tests.telemetry.test_tracing import CALLER

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS, BATCH, CHATS, TOKENS = 20, 4, 3, 8


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory, collector) -> Iterator[RunningService]:
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"), family="llama", hidden=64, layers=2)
    environment = {
        "ARKOR_RAY_LOG_FORMAT": "json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "500",
        "RAY_metrics_report_interval_ms": "1000",
    }
    running = RunningService(tmp_path_factory.mktemp("service"), models={"tiny": tiny}, environment=environment)
    running.start()
    yield running
    running.crash()


@pytest.fixture(scope="module")
def job_id(client: Client, rows: str, service: RunningService) -> str:
    """A completed job; its adapter and its base were asked, and there was a 404 and a 401."""
    job = client.create_job("watched", config(rows, maxSteps=STEPS, saveSteps=10, batchSize=BATCH))
    assert_whole(Follower(client, job.id).join(), steps=STEPS)
    for _ in range(CHATS):
        ask(client, job_id=job.id)
    ask(client, base_model="tiny")
    missing = f"{service.url}/v1/jobs/00000000-0000-4000-8000-000000000000"
    headers = {"Authorization": f"Bearer {client.session.token}"}
    scope = {"orgSlug": client.session.org, "projectSlug": client.session.project}
    assert httpx.get(missing, headers=headers, params=scope).status_code == 404
    assert httpx.get(missing, headers={"Authorization": "Bearer wrong"}, params=scope).status_code == 401
    return job.id


class Scrape:
    """The service's own metrics, as Prometheus sees them now."""

    def __init__(self, service: RunningService) -> None:
        instance = json.loads((service.data_dir / "instance.json").read_text())
        families = text_string_to_metric_families(httpx.get(instance["metrics_url"], timeout=30).text)
        self.samples = [s for family in families for s in family.samples if s.name.startswith("ray_arkor_")]

    def total(self, name: str, **tags: str) -> float:
        """Added up over processes and the tags that are not named."""
        return sum(s.value for s in self.samples if s.name == f"ray_{name}" and tags.items() <= s.labels.items())


def test_metrics_say_what_was_done(service: RunningService, job_id: str) -> None:
    expected: list[tuple[str, dict[str, str], Callable[[float], bool]]] = [
        ("arkor_training_steps_total", {"base_model": "tiny"}, lambda n: n == STEPS),
        ("arkor_training_samples_total", {"base_model": "tiny"}, lambda n: n == STEPS * BATCH),
        ("arkor_training_supervised_tokens_total", {}, lambda n: n > STEPS * BATCH),
        ("arkor_training_step_seconds_count", {}, lambda n: n == STEPS),
        ("arkor_training_checkpoint_seconds_count", {"stage": "gather"}, lambda n: n == 2),
        ("arkor_training_checkpoint_seconds_count", {"stage": "upload"}, lambda n: n == 3),
        ("arkor_training_checkpoint_seconds_count", {"stage": "announce"}, lambda n: n == 3),
        ("arkor_training_checkpoints_total", {"outcome": "committed"}, lambda n: n == 3),
        ("arkor_training_storage_failures_total", {}, lambda n: n == 0),
        ("arkor_job_attempts_total", {}, lambda n: n == 1),
        ("arkor_jobs", {"status": "completed"}, lambda n: n == 1),
        ("arkor_jobs", {"status": "queued"}, lambda n: n == 0),
        ("arkor_jobs_queue_seconds_count", {}, lambda n: n == 1),
        ("arkor_controller_leader", {}, lambda n: n == 1),
        ("arkor_controller_turn_seconds_count", {}, lambda n: n > 1),
        ("arkor_api_requests_total", {"route": "/v1/jobs", "method": "POST", "status": "201"}, lambda n: n == 1),
        ("arkor_api_requests_total", {"route": "/v1/jobs/{job_id}", "status": "404"}, lambda n: n == 1),
        ("arkor_api_requests_total", {"status": "401"}, lambda n: n == 1),
        ("arkor_api_requests_total", {"route": "/v1/inference/chat", "status": "200"}, lambda n: n == CHATS + 1),
        ("arkor_api_request_seconds_count", {"route": "/v1/inference/chat"}, lambda n: n == CHATS + 1),
        ("arkor_api_event_streams", {}, lambda n: n == 0),
        ("arkor_serving_requests_total", {"base_model": "tiny", "outcome": "ok"}, lambda n: n == CHATS + 1),
        ("arkor_serving_first_token_seconds_count", {}, lambda n: n == CHATS + 1),
        ("arkor_serving_generated_tokens_total", {}, lambda n: 0 < n <= (CHATS + 1) * TOKENS),
        ("arkor_serving_adapter_lookups_total", {"tier": "device"}, lambda n: n >= CHATS),
        ("arkor_serving_rows", {"state": "free"}, lambda n: n == 16),
        ("arkor_serving_kv_bytes", {"state": "free"}, lambda n: n > 0),
    ]
    wrong: list[str] = []

    def all_right() -> bool:
        scrape = Scrape(service)
        wrong[:] = [
            f"{name} {tags}: {scrape.total(name, **tags)}"
            for name, tags, right in expected
            if not right(scrape.total(name, **tags))
        ]
        return not wrong

    wait_for(all_right, 60, "the metrics do not say what was done", lambda: "\n".join(wrong))


def test_what_a_job_leaves_behind_has_no_name_of_it(service: RunningService, job_id: str) -> None:
    def gone() -> bool:
        return not any(job_id in str(sample.labels) for sample in Scrape(service).samples)

    wait_for(gone, 60, "there are still series of a job that has ended")


def test_a_request_is_one_trace_from_the_caller_to_the_engine(
    client: Client, job_id: str, collector: Collector
) -> None:
    trace_id, caller = CALLER.split("-")[1:3]
    answer = httpx.post(
        f"{client.base_url}/v1/inference/chat",
        json={"messages": [{"role": "user", "content": "hi"}], "adapter": {"kind": "checkpoint", "jobId": job_id, "step": 10},
              "maxTokens": 4, "stream": False},
        headers={"Authorization": f"Bearer {client.session.token}", "traceparent": CALLER, "X-Request-Id": "mine"},
        params={"orgSlug": client.session.org, "projectSlug": client.session.project},
        timeout=60,
    )  # fmt: skip
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine"
    names = {"POST /v1/inference/chat", "generate", "queue", "prefill", "decode"}
    wait_for(lambda: names <= set(collector.spans(trace_id)), 60, "spans are missing", lambda: str(collector.refused))
    spans = collector.spans(trace_id)
    request, generate = spans["POST /v1/inference/chat"], spans["generate"]
    assert request.parent_id == caller and generate.parent_id == request.span_id
    assert {spans[name].parent_id for name in ("queue", "prefill", "decode")} == {generate.span_id}
    tokens = answer.json()["usage"]["completion_tokens"]
    assert generate.attributes["gen_ai.usage.output_tokens"] == tokens
    assert generate.attributes["arkor.adapter.id"] == f"{job_id}-step-10"
    assert {span.service for span in spans.values()} == {"arkor-ray"}


def test_a_job_is_one_trace_from_its_submission_to_its_checkpoints(job_id: str, collector: Collector) -> None:
    _, trace_id, first, _ = tracing.job_traceparent(job_id).split("-")
    names = {
        "submit job",
        "launch attempt",
        "attempt",
        "prepare data",
        "train",
        "store checkpoint",
        "announce checkpoint",
    }
    wait_for(lambda: names <= set(collector.spans(trace_id)), 60, "spans are missing")
    spans = collector.spans(trace_id)
    assert (spans["submit job"].span_id, spans["submit job"].parent_id) == (first, "")
    below = {name: span.parent_id for name, span in spans.items() if name not in ("submit job", "prepare data")}
    assert set(below.values()) == {first}, below
    assert spans["prepare data"].parent_id == spans["attempt"].span_id


def test_the_jobs_log_has_what_driver_and_workers_printed_as_json(service: RunningService, job_id: str) -> None:
    def printed(*arguments: str) -> str:
        command = [sys.executable, "-m", "arkor_ray.cli.main", "jobs", "logs", job_id, *arguments]
        environment = {**service.environment, "ARKOR_CLOUD_API_URL": service.url}
        done = subprocess.run(command, env=environment, cwd=service.home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = printed()
    assert printed("--attempt", "1", "--follow") == text
    assert printed("--follow") == text
    said = [json.loads(found) for found in re.findall(r"\{\"time\".*\}", text)]
    assert {line["job_id"] for line in said} == {job_id} and {line["attempt"] for line in said} == {1}
    loggers = {line["logger"]: line for line in said}
    assert len([line for line in text.splitlines() if "Training on" in line]) == 1, text
    assert "\x1b[36m(" not in text, "colours in a file"
    assert loggers["arkor_ray.training.train_loop"]["trace_id"] == tracing.job_traceparent(job_id).split("-")[1]
    stored = service.data_dir / "storage" / "logs" / job_id / "attempt-1.log"
    assert "arkor_ray.training.train_loop" in stored.read_text()
