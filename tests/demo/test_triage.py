from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from arkor_ray.demo.corpus import make_corpus
from arkor_ray.demo.tickets import CATEGORIES, PRODUCTS, URGENCIES
from arkor_ray.demo.triage import (
    ANSWER_KEYS,
    SYSTEM_PROMPT,
    TriageScore,
    demo_job_config,
    held_out_examples,
    score_answer,
    triage_examples,
    write_triage_dataset,
)
from arkor_ray.schemas.job import JobConfig

IMPORTS = """
from arkor_ray.demo.corpus import make_corpus
from arkor_ray.demo.triage import held_out_examples, triage_examples
"""
WANTED = {
    "category": "bug",
    "urgency": "low",
    "summary": "Crash when opening Quill",
    "nextAction": "Ask for the crash log",
}


def test_the_data_set_has_its_rows_each_a_ticket_with_a_complete_answer(tmp_path):
    rows = [json.loads(line) for line in write_triage_dataset(tmp_path / "a" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 480
    for row in rows:
        system, user, assistant = row["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        assert system["content"] == SYSTEM_PROMPT
        answer = json.loads(assistant["content"])
        assert tuple(answer) == ANSWER_KEYS
        assert answer["category"] in CATEGORIES and answer["urgency"] in URGENCIES
        assert score_answer(assistant["content"], answer) == TriageScore(True, True, True, True, True)
        assert [product for product in PRODUCTS if product in user["content"]] == [
            product for product in PRODUCTS if product in answer["summary"]
        ]


def test_no_ticket_comes_twice_and_no_category_prevails():
    examples = triage_examples(480)
    assert len({example.ticket for example in examples}) == 480
    assert set(Counter(example.answer["category"] for example in examples).values()) == {80}
    urgencies = Counter(example.answer["urgency"] for example in examples)
    assert set(urgencies) == set(URGENCIES) and min(urgencies.values()) > 80


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    first, again, other = (
        write_triage_dataset(tmp_path / name, rows=50, seed=seed).read_bytes()
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first", "other"]  # nothing half-written


def digest_of_everything():
    everything = repr([make_corpus(300), triage_examples(60), held_out_examples()])
    return hashlib.sha256(everything.encode()).hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_rows_and_corpus_do_not_depend_on_the_process(hash_seed):
    source = f"import hashlib\n{IMPORTS}{inspect.getsource(digest_of_everything)}print(digest_of_everything())"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path.cwd())}
    child = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == digest_of_everything()


def test_held_out_tickets_pair_product_and_issue_as_no_training_ticket_does():
    def pairs(examples):
        return {example.answer["summary"] for example in examples}  # the summary names both

    assert not pairs(held_out_examples(60)) & pairs(triage_examples(2000))
    assert Counter(example.answer["category"] for example in held_out_examples(12)) == dict.fromkeys(CATEGORIES, 2)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (json.dumps(WANTED), (True, True, True, True, True)),
        (json.dumps({**WANTED, "category": "billing"}), (True, False, True, True, True)),
        (json.dumps({**WANTED, "category": "weather"}), (False, False, True, True, True)),
        (json.dumps({**WANTED, "urgency": "very"}), (False, True, False, True, True)),
        (json.dumps({**WANTED, "summary": 7}), (False, True, True, False, True)),
        (json.dumps({**WANTED, "more": ""}), (False, True, True, True, True)),
        (json.dumps({**WANTED, "category": []}), (False, False, True, True, True)),
        (json.dumps({"category": "bug"}), (False, True, False, False, False)),
        (json.dumps([WANTED]), (False,) * 5),
        (json.dumps(WANTED) + " and more", (False,) * 5),
        ("I am sorry to hear that.", (False,) * 5),
        ("", (False,) * 5),
    ],
)
def test_an_answer_is_scored_field_by_field(text, score):
    assert score_answer(text, WANTED) == TriageScore(*score)


def test_the_demo_job_is_a_valid_config_with_at_least_four_checkpoints():
    wire = demo_job_config("http://127.0.0.1:1/rows.jsonl", maxSteps=100)
    config = JobConfig.model_validate(wire)
    assert config.model == "arkor-ray/demo-base"
    assert config.max_steps == 100 and config.lora_r == 16
    unchanged = demo_job_config("http://127.0.0.1:1/rows.jsonl")
    assert unchanged["maxSteps"] // unchanged["saveSteps"] >= 4
    assert wire["datasetSource"] == {"type": "blob", "url": "http://127.0.0.1:1/rows.jsonl"}
