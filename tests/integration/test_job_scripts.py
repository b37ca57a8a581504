"""The scripts of jobs/ on a real Ray: each does what it says, and goes on where it was ended."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import ray
import torch

from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.serving import batch
from tests.training.tiny import make_base_model, make_rows, write_rows

pytestmark = pytest.mark.integration

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1"}})
    yield
    ray.shutdown()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A job file beside its data set, and a finished run of it."""
    root = tmp_path_factory.mktemp("world")
    base = make_base_model(root / "base")
    write_rows(root / "rows.jsonl", make_rows(12))
    (root / "job.yaml").write_text(
        "name: my job\nmodel: tiny\ndataset: rows.jsonl\nlora: {r: 4, alpha: 8}\nmax_steps: 6\nsave_steps: 2\n"
        "batch_size: 4\nlearning_rate: 1.0e-2\n"
    )
    arguments = [str(root / "job.yaml"), "--output", str(root / "runs"), "--model", str(base)]
    status = script("finetune").main([*arguments, "--events", str(root / "events.jsonl")])
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return SimpleNamespace(root=root, base=base, arguments=arguments, status=status, events=events, runs=root / "runs")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_file_becomes_adapters_and_events(world):
    assert world.status == 0
    assert [event["id"] for event in world.events] == list(range(1, len(world.events) + 1))
    types = [event["type"] for event in world.events]
    assert set(types[:2]) == {"dataset.preflight", "training.started"}
    assert types.count("training.log") == 6 and types.count("checkpoint.saved") == 3
    assert types[-1] == "training.completed"
    assert world.events[-1]["url"] == f"{world.runs.as_uri()}/adapters/my-job-final"
    assert (world.runs / "adapters" / "my-job-final" / "adapter_model.safetensors").is_file()


def test_a_job_that_was_lost_goes_on_from_its_newest_checkpoint(world, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(world.runs, runs)
    for lost in ("adapters/my-job-final", "adapters/my-job-step-6", "resume/my-job/step-00000006"):
        shutil.rmtree(runs / lost)
    elsewhere = tmp_path / "_ray_pkg_2"  # Ray unpacks a working directory that has changed somewhere else
    elsewhere.mkdir()
    for name in ("job.yaml", "rows.jsonl"):
        shutil.copy(world.root / name, elsewhere)
    arguments = [str(elsewhere / "job.yaml"), "--output", str(runs), *world.arguments[3:]]
    assert script("finetune").main([*arguments, "--events", str(tmp_path / "events.jsonl")]) == 0
    told = lines(tmp_path / "events.jsonl")
    before = {event["step"]: event for event in world.events if event["type"] == "training.log"}
    after = {event["step"]: event for event in told if event["type"] == "training.log"}
    for step in (5, 6):
        assert after[step]["loss"] == pytest.approx(before[step]["loss"], abs=1e-5)
    for step in after.keys() - {5, 6}:  # told again, for they were new when the checkpoint was taken; not trained again
        assert after[step]["samplesPerSecond"] == before[step]["samplesPerSecond"]
    assert list(after) == sorted(after)
    assert "training.completed" in capsys.readouterr().out


def test_a_job_that_runs_is_not_started_twice(world, capsys):
    from arkor_ray.training.standalone import NAMESPACE, EventLog

    name = f"{world.runs.as_uri()} other"
    running = ray.remote(EventLog).options(name=name, namespace=NAMESPACE, num_cpus=0).remote("other", "")
    assert script("finetune").main([*world.arguments, "--job-id", "other"]) == 1
    assert "Job other" in (error := capsys.readouterr().err) and "is running on this cluster" in error
    ray.kill(running)


def test_data_that_cannot_be_trained_on_ends_with_the_reason(world, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n')
    shutil.copy(world.root / "job.yaml", tmp_path)
    arguments = [str(tmp_path / "job.yaml"), "--output", str(tmp_path / "runs"), *world.arguments[3:]]
    assert script("finetune").main(arguments) == 1
    assert "None of the data set's 1 rows can be used" in capsys.readouterr().out


def peft_answers(world, rows: list[dict], tokens: int) -> list[str]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, world.runs / "adapters" / "my-job-final").eval()
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    answers = []
    for row in rows:
        messages = row["messages"][:-1]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def test_every_row_is_answered_in_order_and_only_once(world, tmp_path, monkeypatch, capsys):
    rows = make_rows(20, seed=3)
    write_rows(
        tmp_path / "ask.jsonl", [*rows, {"messages": [{"role": "user", "content": "w1 " * 400}]}, {"text": "no"}]
    )
    output = tmp_path / "answers.jsonl"
    arguments = ["--data", str(tmp_path / "ask.jsonl"), "--adapter", str(world.runs), "--output", str(output)]
    arguments += ["--max-tokens", "6", "--temperature", "0", "--rows", "4"]
    answer_all, asked = batch.answer_all, []

    def dying(questions, *rest, **options):
        yield [{"index": index, "answer": "kept"} for index, _ in questions[:4]]
        raise ServiceUnavailableError("the node went away")

    def living(questions, *rest, **options):
        asked.extend(index for index, _ in questions)
        yield from answer_all(questions, *rest, **options)

    monkeypatch.setattr(batch, "answer_all", dying)
    assert script("batch_inference").main(arguments) == 1
    assert "the node went away" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.setattr(batch, "answer_all", living)
    assert script("batch_inference").main([*arguments, "--replicas", "2"]) == 0
    assert asked == list(range(4, 21))

    found = lines(output)
    assert [result["index"] for result in found] == list(range(22))
    assert [result["answer"] for result in found[:4]] == ["kept"] * 4
    assert [result["answer"].rstrip("\ufffd") for result in found[4:20]] == [
        text.rstrip("\ufffd") for text in peft_answers(world, rows[4:], 6)
    ]
    assert found[4]["messages"] == rows[4]["messages"][:-1] and found[4]["usage"]["completion_tokens"] <= 6
    assert "more than the 128 that fit" in found[20]["error"] and "row 22 is plain text" in found[21]["error"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["errors"] == 2
    assert script("batch_inference").main(arguments) == 1
    assert "is there already" in capsys.readouterr().err


def test_answers_keep_to_a_schema_and_are_held_against_those_wanted_and_the_bases(world, tmp_path, capsys):
    wanted = [{"prompt": prompt, "completion": "{}"} for prompt in ("w1", "w2 w3", "w4")]
    write_rows(tmp_path / "held.jsonl", wanted)
    (tmp_path / "schema.json").write_text('{"type": "object", "additionalProperties": false}')
    report = tmp_path / "report.json"
    arguments = ["--data", str(tmp_path / "held.jsonl"), "--adapter", str(world.runs), "--output", str(report)]
    arguments += ["--against-base", "--json-schema", str(tmp_path / "schema.json"), "--max-tokens", "100"]
    assert script("evaluate").main(arguments) == 0
    told = json.loads(report.read_text())
    assert list(told) == ["adapter", "base"]
    for who in told.values():
        assert (who["rows"], who["samples"], who["valid_json"], who["same_json"]) == (3, 3, 1.0, 1.0)
    assert told["adapter"]["loss"] != told["base"]["loss"]
    assert "same json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--replicas", "9"], "--replicas 9: each takes one CPU, and the cluster has 4"),
        (["--temperature", "3"], r"temperature: .* less than or equal to 2 \(got 3.0\)"),
        (["--output", "answers.jsonl"], "must be an absolute path"),
        (["--json-schema", "/nonesuch.json"], "--json-schema: /nonesuch.json cannot be read"),
        (["--adapter", "/nonesuch"], "There is no adapter at /nonesuch"),
    ],
)
def test_what_batch_inference_cannot_do_is_told_in_a_sentence(world, tmp_path, capsys, arguments, sentence):
    import re

    usual = [
        "--data",
        str(world.root / "rows.jsonl"),
        "--adapter",
        str(world.runs),
        "--output",
        str(tmp_path / "x.jsonl"),
    ]
    assert script("batch_inference").main([*usual, *arguments]) == 1
    assert re.search(sentence, capsys.readouterr().err)
