from __future__ import annotations

import json

import pytest

from tests.client.fake_service import URL

PREFLIGHT = {
    "format": "messages",
    "rows": 480,
    "rejected_rows": 1,
    "rejected": [{"row": 7, "reason": "no answer"}],
    "train_samples": 430,
    "eval_samples": 49,
    "template_sha256": "00ff",
    "max_length": 512,
    "supervised_share": 0.3412,
    "length": {"p50": 80, "p90": 300, "p99": 600, "max": 812},
    "truncated_samples": 12,
}
JOB_YAML = "name: run\nmodel: tiny\ndataset: a/b\nmax_steps: 4\n"


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB_YAML)
    return path


# jobs


def test_create_submits_the_file_and_says_how_to_follow(run, fake, job_file):
    result = run("jobs", "create", "-f", job_file, "--name", "other")
    (job,) = fake.jobs.values()
    assert result.exit_code == 0 and f"jobs events {job.id} --follow" in result.stdout
    assert job.wire["name"] == "other"
    assert job.wire["config"] == {
        "model": "tiny",
        "datasetSource": {"type": "huggingface", "name": "a/b"},
        "maxSteps": 4,
    }


def test_create_with_json_prints_the_job_alone(run, fake, job_file):
    assert json.loads(run("jobs", "create", "-f", job_file, "--json").stdout)["id"] in fake.jobs


def test_create_refuses_a_typo_in_the_file_before_anything_is_sent(run, fake, job_file):
    job_file.write_text(JOB_YAML + "lerning_rate: 1\n")
    result = run("jobs", "create", "-f", job_file)
    assert result.exit_code == 1 and "did you mean 'learning_rate'" in result.stderr
    assert fake.requests == []


def test_create_and_follow_shows_the_run_in_plain_lines(run, fake, job_file):
    fake.on_create(
        fake.emit_started,
        lambda job: fake.emit_log(job, 1, evalLoss=1.25),
        lambda job: fake.emit_checkpoint(job, 1),
        lambda job: fake.emit(job, "dataset.preflight", **PREFLIGHT),
        fake.complete,
    )
    result = run("jobs", "create", "-f", job_file, "--follow")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == [
        "training started: 4 steps",
        "step 1/4  loss 2  eval loss 1.25",
        "checkpoint at step 1 is saved and answers",
        "data: 480 rows, 1 of them rejected; 430 samples to train on, 49 to evaluate; the longest has 812 tokens, 12 are cut "
        "to 512; the loss looks at 34 % of the tokens",
        "  row 7: no answer",
        "training completed in 2 s",
    ]


def test_following_a_job_that_fails_exits_with_1_and_its_reason(run, fake, job_file):
    fake.on_create(fake.emit_started, fake.fail)
    result = run("jobs", "create", "-f", job_file, "--follow")
    assert result.exit_code == 1
    assert result.stderr.endswith("failed: the loss is not finite\n")


def test_list(run, job):
    result = run("jobs", "list")
    assert job.id in result.stdout and "completed" in result.stdout and "tiny" in result.stdout
    assert [each["id"] for each in json.loads(run("jobs", "list", "--json").stdout)] == [job.id]


def test_an_empty_list_says_so(run):
    assert "no jobs" in run("jobs", "list").stdout
    assert json.loads(run("jobs", "list", "--json").stdout) == []


def test_get(run, job):
    result = run("jobs", "get", job.id)
    assert "maxSteps: 4" in result.stdout and "training.completed" in result.stdout
    detail = json.loads(run("jobs", "get", job.id, "--json").stdout)
    assert detail["job"]["status"] == "completed" and len(detail["events"]) == 8


def test_a_job_that_is_not_there_is_an_error(run, job):
    for command in (["get"], ["cancel"], ["events"], ["events", "--follow"], ["logs"]):
        result = run("jobs", *command, "nonesuch")
        assert result.exit_code == 1 and result.stderr == "error: no such job\n", command


def test_cancel(run, fake, job_file):
    run("jobs", "create", "-f", job_file)
    (job,) = fake.jobs.values()
    assert run("jobs", "cancel", job.id).exit_code == 0
    assert job.wire["status"] == "cancelled"
    result = run("jobs", "cancel", job.id)
    assert result.exit_code == 1 and "already cancelled" in result.stderr


def test_events_so_far(run, job):
    lines = run("jobs", "events", job.id).stdout.splitlines()
    assert len(lines) == 8
    assert lines[1].split()[0] == "2" and "training.log" in lines[1] and "step=1" in lines[1]


def test_events_followed_as_json_are_one_object_a_line(run, fake, job):
    fake.drop_connection(after_event=5)
    lines = run("jobs", "events", job.id, "--follow", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads(lines[3])["type"] == "checkpoint.saved"


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], {}),
        (["--attempt", 2], {"attempt": "2"}),
        (["--follow"], {"follow": "true"}),
        (["--follow", "--attempt", 2], {"attempt": "2", "follow": "true"}),
    ],
)
def test_logs(run, fake, job, options, asked):
    assert run("jobs", "logs", job.id, *options).stdout == "one line\n"
    params = dict(fake.asked("GET", "/logs")[-1].url.params)
    assert {name: value for name, value in params.items() if name in ("attempt", "follow")} == asked


# checkpoints


def test_checkpoints_list(run, job):
    result = run("checkpoints", "list", job.id)
    assert f"{job.id}-step-2" in result.stdout and f"{job.id}-final" in result.stdout
    assert len(json.loads(run("checkpoints", "list", job.id, "--json").stdout)) == 3


def test_checkpoints_download(run, job, tmp_path):
    result = run("checkpoints", "download", job.id, "--step", 2, "-o", tmp_path / "out")
    folder = tmp_path / "out" / f"{job.id}-step-2"
    assert result.stdout.strip() == str(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights 2"
    run("checkpoints", "download", job.id, "-o", tmp_path / "out")
    assert (tmp_path / "out" / f"{job.id}-final" / "manifest.json").exists()


def test_step_and_final_together_are_refused(run, job):
    assert "one of them" in run("checkpoints", "download", job.id, "--step", 2, "--final").stderr


# chat


def answer_with_target(fake):
    fake.answer = lambda body: json.dumps([body.get("adapter", body.get("baseModel")), body["messages"]])


@pytest.mark.parametrize(
    ("arguments", "adapter"),
    [
        (["--step", 2], {"kind": "checkpoint", "step": 2}),
        (["--final"], {"kind": "final"}),
        ([], {"kind": "final"}),
    ],
)
def test_chat_with_a_job(run, fake, job, arguments, adapter):
    answer_with_target(fake)
    result = run("chat", "--job", job.id, *arguments, "-m", "hi", "--system", "be kind")
    target, messages = json.loads(result.stdout)
    assert target == {**adapter, "jobId": job.id}
    assert [message["content"] for message in messages] == ["be kind", "hi"]


def test_chat_with_a_running_job_takes_its_newest_checkpoint(run, fake, job):
    job.wire["status"] = "running"
    answer_with_target(fake)
    result = run("chat", "--job", job.id, "-m", "hi")
    assert json.loads(result.stdout)[0]["step"] == 4
    assert result.stderr == "checkpoint at step 4\n"


def test_an_adapter_that_is_not_there_is_told_before_a_conversation_is_begun(run, fake, job):
    result = run("chat", "--job", job.id, "--step", 3, input="")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: Job {job.id} has no checkpoint at step 3; it has step 2, step 4, the final one\n"


def test_chat_with_a_base_model_and_sampling_options(run, fake, job):
    bodies = []
    fake.answer = lambda body: bodies.append(body) or "ok"
    assert (
        run(
            "chat", "--base", "tiny", "-m", "-", "--max-tokens", 5, "--temperature", 0, "--seed", 1, input="hi"
        ).exit_code
        == 0
    )
    wanted = {"messages": [{"role": "user", "content": "hi"}], "baseModel": "tiny", "stream": True}
    assert bodies == [{**wanted, "maxTokens": 5, "temperature": 0.0, "seed": 1}]


def test_a_conversation_remembers_what_was_said_and_forgets_what_was_refused(run, fake, job):
    bodies = []
    fake.answer = lambda body: bodies.append(body["messages"]) or f"answer {len(bodies)}"

    def refuse_second(body):
        bodies.append([message["content"] for message in body["messages"]])
        if len(bodies) == 1:
            fake.refuse("/inference/chat", 429, code="rate_limited")
        return f"answer {len(bodies)}"

    fake.answer = refuse_second
    result = run("chat", "--base", "tiny", input="one\n\ntwo\nthree\n")
    assert result.stdout.split("\n")[:2] == ["answer 1", "answer 2"]
    assert bodies == [["one"], ["one", "answer 1", "three"]]
    assert "error: refused with 429" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--job", "x", "--base", "y"], ["--base", "y", "--final"]])
def test_chat_needs_exactly_one_target(run, arguments):
    assert run("chat", *arguments, "-m", "hi").exit_code == 1


# endpoints


def listed_endpoint(run):
    (endpoint,) = json.loads(run("endpoints", "list", "--json").stdout)
    return endpoint


def test_endpoint_of_a_job_says_where_it_is_and_how_to_get_a_key(run, job):
    result = run("endpoints", "create", "triage", "--job", job.id)
    assert f"{URL}/e/triage/v1" in result.stdout and "endpoints keys create triage LABEL" in result.stdout
    assert listed_endpoint(run)["target"] == {"kind": "adapter", "adapter": {"kind": "final", "jobId": job.id}}
    assert "triage" in run("endpoints", "list").stdout
    shown = run("endpoints", "get", "e1").stdout
    assert f"serves: {job.id} final" in shown and "runs kept: 7 days" in shown
    result = run("endpoints", "create", "triage", "--job", job.id)
    assert result.exit_code == 1 and "already taken" in result.stderr


def test_open_endpoint_of_a_base_model_asks_for_no_key(run, job):
    result = run("endpoints", "create", "plain", "--base", "tiny", "--auth", "none", "--keep-runs", "unlimited")
    assert "key" not in result.stdout
    endpoint = listed_endpoint(run)
    assert endpoint["target"] == {"kind": "base_model", "baseModel": "tiny"}
    assert (endpoint["authMode"], endpoint["runRetentionMode"]) == ("none", "unlimited")


def test_endpoint_update_sends_only_what_was_given(run, fake, job):
    run("endpoints", "create", "triage", "--base", "tiny")
    result = run("endpoints", "update", "triage", "--job", job.id, "--step", 2, "--disable", "--keep-runs", "disabled")
    assert "state: disabled" in result.stdout and f"serves: {job.id} step 2" in result.stdout
    assert "runs kept: disabled" in result.stdout
    assert json.loads(fake.asked("PATCH", "e1")[-1].content) == {
        "target": {"kind": "adapter", "adapter": {"kind": "checkpoint", "jobId": job.id, "step": 2}},
        "enabled": False,
        "runRetentionMode": "disabled",
    }
    assert json.loads(run("endpoints", "update", "e1", "--enable", "--json").stdout)["enabled"] is True
    assert json.loads(fake.asked("PATCH", "e1")[-1].content) == {"enabled": True}


def test_endpoint_delete(run, job):
    run("endpoints", "create", "triage", "--base", "tiny")
    assert run("endpoints", "delete", "triage").exit_code == 0
    assert "no endpoints" in run("endpoints", "list").stdout
    assert run("endpoints", "get", "e1").stderr == "error: no such endpoint\n"


def test_endpoint_keys(run, job):
    run("endpoints", "create", "triage", "--base", "tiny")
    assert "no keys" in run("endpoints", "keys", "list", "triage").stdout
    created = run("endpoints", "keys", "create", "triage", "ci")
    assert created.stdout == "ark_live_12345678-k1\n", "a script can take standard output as the key"
    assert "shown only now" in created.stderr
    listed = run("endpoints", "keys", "list", "triage").stdout
    assert "ci" in listed and "valid" in listed and "k1" in listed and "-k1" not in listed
    assert run("endpoints", "keys", "revoke", "triage", "k1").exit_code == 0
    (key,) = json.loads(run("endpoints", "keys", "list", "e1", "--json").stdout)
    assert key["enabled"] is False


def test_endpoint_runs_by_slug_or_id(run, fake, job):
    run("endpoints", "create", "triage", "--base", "tiny")
    assert "no run" in run("endpoints", "runs", "triage").stdout
    fake.answer_at_endpoint("is [this] on\none line? " + "x" * 100)
    fake.answer_at_endpoint("later", content=None, tool_calls=[{"function": {"name": "look_up"}}])
    for named in ("triage", "e1"):
        shown = run("endpoints", "runs", named).stdout
        assert "is [this] on one line? xxx" in shown and "x" * 50 not in shown
        assert "look_up" in shown and "20 ms" in shown and shown.index("later") < shown.index("this")
    (newest,) = json.loads(run("endpoints", "runs", "triage", "--limit", 1, "--json").stdout)
    assert newest["id"] == "r2" and newest["usage"]["total_tokens"] == 11
    assert run("endpoints", "runs", "nonesuch").stderr == "error: no such endpoint\n"


def test_endpoint_runs_exported_are_a_data_set(run, fake, job, tmp_path):
    run("endpoints", "create", "triage", "--base", "tiny")
    fake.answer_at_endpoint("hi")
    file = tmp_path / "new" / "runs.jsonl"
    assert run("endpoints", "runs", "triage", "--export", file).stdout == f"{file}\n"
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fine"}]
    }


def test_export_that_breaks_off_leaves_the_file_as_it_was(run, fake, job, tmp_path):
    run("endpoints", "create", "triage", "--base", "tiny")
    file = tmp_path / "runs.jsonl"
    file.write_text("before")
    fake.export_breaks = True
    result = run("endpoints", "runs", "triage", "--export", file)
    assert result.exit_code == 1 and "Cannot reach" in result.stderr
    assert file.read_text() == "before" and [each.name for each in tmp_path.glob("*runs.jsonl*")] == ["runs.jsonl"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--job", "x", "--base", "y"],
        ["--base", "y", "--final"],
        ["--base", "y", "--auth", "open"],
        ["--base", "y", "--keep-runs", "-1"],
    ],
)
def test_endpoint_options_that_do_not_fit_are_refused_before_anything_is_sent(run, fake, arguments):
    result = run("endpoints", "create", "triage", *arguments)
    assert result.exit_code == 1 and "--" in result.stderr
    assert fake.requests == []


# tokens, models, account


def test_tokens(run, fake):
    result = run("tokens", "create", "ci", "--days", 3)
    assert result.stdout.strip() in fake.tokens
    assert "ci" in run("tokens", "list").stdout
    (token,) = json.loads(run("tokens", "list", "--json").stdout)
    assert run("tokens", "revoke", token["id"]).exit_code == 0
    assert "no tokens" in run("tokens", "list").stdout


def test_models(run):
    assert run("models").stdout == "tiny\n"


def test_whoami(run):
    assert "anon-1" in run("whoami").stdout
    assert json.loads(run("whoami", "--json").stdout)["apiUrl"] == URL


def test_login(run, fake, home):
    assert run("login").exit_code == 0
    token = fake.add_token("team")
    assert "a member of team" in run("login", "--token", token).stdout
    stored = json.loads((home / "credentials.json").read_text())
    assert (stored["token"], stored["orgSlug"]) == (token, "team")
    assert "team" in run("whoami").stdout


def test_login_with_a_bad_token_stores_nothing(run, home):
    result = run("login", "--token", "wrong")
    assert result.exit_code == 1 and "unknown token" in result.stderr
    assert not home.exists()
