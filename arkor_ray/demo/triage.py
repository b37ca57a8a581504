"""The demo's data set: support tickets to be sorted, and the job that teaches a model to do it.

Each row is one conversation in OpenAI `messages` form: the instructions, a ticket, and the answer as compact JSON with
`category`, `urgency`, `summary` and `nextAction`.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from arkor_ray.demo.tickets import CATEGORIES, URGENCIES, Ticket, make_ticket

SYSTEM_PROMPT = (
    "You triage support tickets. Reply with one JSON object and nothing else: "
    "category, urgency (low, medium or high), summary, nextAction."
)
ANSWER_KEYS = ("category", "urgency", "summary", "nextAction")

#: Job config of the demo in wire form, without `model` and `datasetSource`. Steps, rank and rate suit `demo-base`.
DEMO_JOB: dict[str, Any] = {
    "datasetFormat": {"type": "chatml"},
    "maxSteps": 80,
    "batchSize": 8,
    "learningRate": 1e-2,
    "lrSchedulerType": "linear",
    "warmupSteps": 3,
    "weightDecay": 0.0,
    "loggingSteps": 1,
    "saveSteps": 20,
    "loraR": 16,
    "loraAlpha": 32,
    "maxLength": 512,
    "trainOnResponsesOnly": True,
}


@dataclass(frozen=True)
class TriageExample:
    """A ticket and the answer wanted for it."""

    ticket: str
    answer: dict[str, str]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages that ask for the answer."""
        return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": self.ticket}]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, as one row of the data set has it."""
        content = json.dumps(self.answer, ensure_ascii=False, separators=(",", ":"))
        return [*self.prompt, {"role": "assistant", "content": content}]


@dataclass(frozen=True)
class TriageScore:
    """How near a model's answer comes to the wanted one."""

    valid_json: bool  # one JSON object with exactly the four keys, text in each, and known category and urgency
    category: bool
    urgency: bool
    summary: bool
    next_action: bool


def demo_job_config(dataset_url: str, model: str = "arkor-ray/demo-base", **overrides: Any) -> dict[str, Any]:
    """The `config` of `POST /v1/jobs` for the demo; `overrides` replace single fields, in wire spelling."""
    return {
        "model": model,
        "datasetSource": {"type": "blob", "url": dataset_url},
        **DEMO_JOB,
        **overrides,
    }


def write_triage_dataset(path: Path, rows: int = 480, seed: int = 0) -> Path:
    """Write `rows` conversations as JSONL; the same arguments give the same bytes. Returns `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps({"messages": example.messages}, ensure_ascii=False) + "\n" for example in triage_examples(rows, seed)
    )
    # A job may read the file at any time, so it is never there in part.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)
    return path


def triage_examples(rows: int = 480, seed: int = 0) -> list[TriageExample]:
    """Training examples, no ticket twice."""
    return _examples(rows, Random(f"triage-{seed}"), held_out=False)


def held_out_examples(rows: int = 24, seed: int = 0) -> list[TriageExample]:
    """Examples that pair a product with an issue as no training ticket does; categories take turns."""
    return _examples(rows, Random(f"held-out-{seed}"), held_out=True)


def score_answer(text: str, expected: dict[str, str]) -> TriageScore:
    """Compare a model's raw answer with the wanted one, field by field; what is not JSON scores nothing."""
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        return TriageScore(False, False, False, False, False)
    valid = (
        set(answer) == set(ANSWER_KEYS)
        and all(isinstance(value, str) for value in answer.values())
        and answer["category"] in CATEGORIES
        and answer["urgency"] in URGENCIES
    )
    return TriageScore(valid, *(answer.get(key) == expected[key] for key in ANSWER_KEYS))


def _examples(rows: int, random: Random, *, held_out: bool) -> list[TriageExample]:
    found: dict[str, TriageExample] = {}
    while len(found) < rows:
        ticket = make_ticket(random, held_out=held_out)
        # Categories in turn: a model that always names one of them is right no more often than chance.
        if ticket.issue.category == CATEGORIES[len(found) % len(CATEGORIES)] and ticket.text not in found:
            found[ticket.text] = TriageExample(ticket.text, _answer(ticket))
    return list(found.values())


def _answer(ticket: Ticket) -> dict[str, str]:
    return {
        "category": ticket.issue.category,
        "urgency": ticket.urgency,
        "summary": ticket.issue.summary.format(p=ticket.product),
        "nextAction": ticket.issue.next_action,
    }
