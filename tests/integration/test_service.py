"""The cluster's way on one machine: PostgreSQL, S3, two workers under ZeRO-2, the public SDK and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from arkor_ray import LoraConfig, create_trainer
from arkor_ray.client import iter_text
from arkor_ray.demo.testing import make_tiny_model
from arkor_ray.errors import ConflictError, InvalidRequestError, NotFoundError
from arkor_ray.schemas import event
from tests.integration.stories import ask, assert_checkpoints_answer, assert_whole, config, losses
from tests.servers.arkor import Follower, RunningService

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), family="llama", hidden=64, layers=2)


@pytest.fixture(scope="module")
def service(tmp_path_factory, tiny, postgres_url, s3_endpoint) -> Iterator[RunningService]:
    bucket = s3_endpoint.make_bucket()
    environment = {
        **s3_endpoint.environment,
        "ARKOR_RAY_STORAGE_URL": f"s3://{bucket}/arkor",
        "ARKOR_RAY_DATABASE_URL": postgres_url,
    }
    running = RunningService(tmp_path_factory.mktemp("service"), models={"tiny": tiny}, environment=environment)
    running.start()
    yield running
    running.crash()


@pytest.fixture(scope="module")
def finished(client, rows):
    """A completed job on two workers, with what its callbacks saw while it trained."""
    seen: dict[str, list] = {"logs": [], "answers": [], "statuses": []}

    def on_checkpoint(context):
        job = client.get_job(context.job.id)
        seen["statuses"].append(job.status)
        reply = context.infer(
            messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0, stream=False
        )
        streamed = context.infer(messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
        seen["answers"].append((context.step, reply.json(), "".join(iter_text(streamed))))

    trainer = create_trainer(
        name="two workers",
        model="tiny",
        dataset=rows,
        lora=LoraConfig(r=8, alpha=16, max_length=256),
        max_steps=40,
        save_steps=10,
        logging_steps=1,
        batch_size=4,
        learning_rate=1e-3,
        num_workers=2,
        zero_stage=2,
        callbacks={"on_log": lambda entry: seen["logs"].append(entry), "on_checkpoint": on_checkpoint},
        client=client,
    )
    return trainer.wait(), seen


def test_every_checkpoint_answers_from_inside_its_callback_while_training_goes_on(client, finished):
    result, seen = finished
    assert result.status == "completed"
    assert [step for step, _, _ in seen["answers"]] == [10, 20, 30, 40]
    for step, answer, streamed in seen["answers"]:
        assert answer["system_fingerprint"].startswith(f"{result.job.id}-step-{step}@")
        assert streamed == answer["content"]
    assert seen["statuses"][0] == "running"
    events = list(client.events(result.job.id))
    assert_whole(events)
    assert_checkpoints_answer(client, result.job.id, events)


def test_training_agreed_with_serving_at_every_checkpoint(client, finished):
    parities = [e.data["parity"] for e in client.events(finished[0].job.id) if e.type == event.CHECKPOINT]
    assert len(parities) == 4
    assert all(p["max_abs_diff"] <= p["tolerance"] for p in parities), parities


def test_one_worker_gives_the_same_curve_as_two(client, rows, finished):
    other = client.create_job("one worker", config(rows, batchSize=8, loraAlpha=16, maxLength=256))
    events = Follower(client, other.id).join()
    assert losses(events) == pytest.approx(losses(list(client.events(finished[0].job.id))), abs=2e-4)


def test_the_downloaded_adapter_is_a_peft_folder_that_says_what_serving_says(client, finished, tiny, tmp_path):
    job_id = finished[0].job.id
    folder = client.download_adapter(job_id, "final", tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder).eval()
    question = [{"role": "user", "content": "my printer is broken please help"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = ask(client, adapter={"kind": "final", "jobId": job_id})
    # A random model may stop in the middle of a character: serving never sends half of one.
    assert answer["content"] == tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def test_qlora_trains_and_answers_on_its_own_four_bit_base(client, rows):
    job = client.create_job("qlora", config(rows, loadIn4bit=True, maxSteps=6, saveSteps=3, batchSize=2))
    events = Follower(client, job.id).join()
    assert events[-1].type == event.COMPLETED, events[-1].data
    assert_checkpoints_answer(client, job.id, events)


def test_a_dry_run_goes_through_every_stage(client, rows):
    job = client.create_job("dry", config(rows, dryRun=True, maxSteps=500, saveSteps=100))
    events = Follower(client, job.id).join()
    assert events[-1].type == event.COMPLETED, events[-1].data
    assert max(losses(events)) <= 10
    assert [e for e in events if e.type == event.CHECKPOINT]


def test_rows_without_an_answer_fail_the_job_with_the_reason(client, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    job = client.create_job("bad", config(path.as_uri()))
    events = Follower(client, job.id).join()
    assert events[-1].type == event.FAILED
    found = client.get_job(job.id)
    assert found.status == "failed"
    assert found.error == events[-1].data["error"]
    assert "supervise" in found.error or "assistant" in found.error


def test_bad_values_are_refused_at_submit_time_by_name(client, rows):
    with pytest.raises(InvalidRequestError, match="learningRate"):
        client.create_job("bad", config(rows, learningRate=-1))
    with pytest.raises(InvalidRequestError, match="catalogue"):
        client.create_job("bad", config(rows, model="no/such"))


def test_the_base_model_and_an_adapter_answer_side_by_side(client, finished):
    base = ask(client, base_model="tiny")
    assert base["model"] == "tiny"
    assert base["system_fingerprint"] != ask(client, job_id=finished[0].job.id)["system_fingerprint"]
    with pytest.raises(NotFoundError):
        ask(client, adapter={"kind": "checkpoint", "jobId": finished[0].job.id, "step": 11})


def test_another_organisation_sees_nothing(service, finished, tmp_path):
    from arkor_ray import Client

    with Client(service.url, home=tmp_path / "other", project_dir=tmp_path / "project") as stranger:
        stranger.ensure_project("mine", "mine")
        with pytest.raises(NotFoundError):
            stranger.get_job(finished[0].job.id)
        with pytest.raises(NotFoundError):
            ask(stranger, job_id=finished[0].job.id)


def test_a_finished_job_cannot_be_cancelled(client, finished):
    with pytest.raises(ConflictError, match="already completed"):
        client.cancel_job(finished[0].job.id)


def test_the_command_line_shows_and_chats(service, client, finished, tmp_path):
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "arkor_ray.cli.main", *arguments]
        environment = {**service.environment, "ARKOR_CLOUD_API_URL": service.url}
        done = subprocess.run(command, env=environment, cwd=service.home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    job_id = finished[0].job.id
    listed = json.loads(run("jobs", "list", "--json"))
    assert job_id in [job["id"] for job in listed]
    assert "completed" in run("jobs", "get", job_id)
    said = run("chat", "--job", job_id, "--final", "--message", "hello", "--max-tokens", "8")
    assert said.strip()
    assert "10" in run("checkpoints", "list", job_id)


def test_many_followers_each_see_the_whole_log(service, client, finished):
    job_id = finished[0].job.id
    logs: list[list[int]] = []

    def follow() -> None:
        with service.client() as own:
            logs.append([e.id for e in own.events(job_id)])

    threads = [threading.Thread(target=follow) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(logs) == 20
    assert all(numbers == logs[0] for numbers in logs)


def test_every_part_says_it_is_ready_and_errors_speak_the_contract(service):
    assert httpx.get(f"{service.url}/readyz").status_code == 200
    missing = httpx.get(f"{service.url}/v1/nothing")
    assert missing.status_code == 404
    assert set(missing.json()) >= {"error", "code"}
