from __future__ import annotations

import functools
import json

import httpx
import pytest
from typer.testing import CliRunner

from arkor_ray.cli import demo as demo_module
from arkor_ray.cli.main import app
from arkor_ray.client import Client
from arkor_ray.demo.triage import held_out_examples

SERVICE = "http://127.0.0.1:9"


@pytest.fixture
def run_demo(fake, home, project_dir, tmp_path, monkeypatch):
    client = functools.partial(Client, home=home, project_dir=project_dir, transport=fake)
    monkeypatch.setattr(demo_module, "Client", client)
    wanted = {example.ticket: example.messages[-1]["content"] for example in held_out_examples(demo_module.SCORED)}
    # The base model talks, the adapters have learnt the answers.
    fake.answer = lambda body: "I am sorry." if "baseModel" in body else wanted[body["messages"][-1]["content"]]
    arguments = ["demo", "--api-url", SERVICE, "--data-dir", str(tmp_path / "data"), "--steps", "4"]
    return lambda: CliRunner().invoke(app, arguments)


def test_each_checkpoint_is_shown_beside_the_base_model_before_a_chat_with_the_adapter(run_demo, fake, tmp_path):
    fetched = []

    def happen(job):
        fetched.append(httpx.get(job.wire["config"]["datasetSource"]["url"]).text.splitlines())
        fake.emit_started(job)
        for step in (1, 2):
            fake.emit_log(job, step)
            fake.emit_checkpoint(job, step)
        fake.complete(job)

    fake.on_create(happen)
    result = run_demo()
    assert result.exit_code == 0, result.stderr
    (job,) = fake.jobs.values()
    assert (job.wire["config"]["maxSteps"], job.wire["config"]["saveSteps"]) == (4, 1)
    assert len(fetched[0]) >= 400 and all(json.loads(row)["messages"] for row in fetched[0])
    told = result.stdout
    order = [
        "submitted job",
        "training started",
        "step 1/4",
        "checkpoint at step 1",
        "base model  I am sorry.",
        "checkpoint at step 2",
        "training completed",
        "chat with the final adapter",
        "the adapter, in PEFT form",
    ]
    places = [told.index(part) for part in order]
    assert places == sorted(places)
    assert told.count("category 6/6") == 2 and told.count("category 0/6") == 2
    assert (tmp_path / "data" / "adapters" / f"{job.id}-final" / "adapter_model.safetensors").exists()


def test_a_job_that_fails_ends_the_demo_with_its_reason(run_demo, fake):
    fake.on_create(fake.emit_started, fake.fail)
    result = run_demo()
    assert result.exit_code == 1
    assert "the loss is not finite" in result.stderr


def test_an_interrupted_demo_cancels_its_job(run_demo, fake, monkeypatch):
    fake.on_create(fake.emit_started, lambda job: fake.emit_checkpoint(job, 1))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module.Examiner, "examine", interrupt)
    assert run_demo().exit_code != 0
    (job,) = fake.jobs.values()
    assert job.wire["status"] == "cancelled"
