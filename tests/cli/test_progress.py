from __future__ import annotations

import io

import pytest

from arkor_ray.cli.progress import JobProgress, event_line, preflight_lines
from arkor_ray.schemas.event import Event
from arkor_ray.schemas.job import Job


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def event(id, type, **data):
    return Event(id=id, type=type, data={"type": type, "jobId": "j", "timestamp": "2026-01-01T09:30:15.000Z", **data})


@pytest.fixture
def job():
    ids = {"id": "j", "orgId": "o", "projectId": "p", "name": "n"}
    wire = {**ids, "status": "queued", "config": {"model": "m"}, "createdAt": "2026-01-01T00:00:00Z"}
    return Job.model_validate(wire)


RUN = [
    event(1, "training.started", metadata={"total_steps": 100}),
    *(event(1 + step, "training.log", step=step, loss=1 / step) for step in range(1, 101)),
    event(102, "checkpoint.saved", step=100, ready=False),
    event(103, "training.completed", metrics={"finalLoss": None}),
]


def test_in_a_log_a_long_run_is_some_twenty_lines(job, capsys):
    with JobProgress(job) as progress:
        for each in RUN:
            progress.show(each)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert steps[0] == "step 1/100  loss 1" and steps[-1] == "step 100/100  loss 0.01"
    assert len(steps) == 21
    assert lines[-2:] == [
        "checkpoint at step 100 is saved and answers; its first answer may take a while",
        "training completed",
    ]


def test_in_a_terminal_it_is_a_bar_with_lines_above_it(job, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with JobProgress(job) as progress:
        for each in RUN[:51]:
            progress.show(each)
        progress.say("a [bold]line[/bold] of its own")
    shown = terminal.getvalue()
    assert "50/100" in shown and "loss 0.02" in shown
    assert "a [bold]line[/bold] of its own" in shown
    assert "step 50/100" not in shown


@pytest.mark.parametrize(
    ("last", "line"),
    [
        (event(2, "training.failed", error="out of data"), "training failed: out of data"),
        (event(2, "training.cancelled"), "training cancelled"),
        (
            event(2, "resources.waiting", reason="2 workers want 1 GPU each", wanted={"GPU": 2}),
            "2 workers want 1 GPU each",
        ),
        (event(2, "checkpoint.delayed", seconds=3), "2  09:30:15  checkpoint.delayed   seconds=3"),
    ],
)
def test_other_ends_and_own_events_are_told(job, capsys, last, line):
    with JobProgress(job) as progress:
        progress.show(last)
    assert capsys.readouterr().out == f"{line}\n"


def test_reports_are_told_in_a_line_by_what_matters_in_them():
    preflight = {"format": "chatml", "rows": 9, "rejected_rows": 2, "rejected": [{"row": 1}], "length": {"p50": 7}}
    assert event_line(event(1, "dataset.preflight", **preflight)).endswith("  format=chatml  rows=9  rejected_rows=2")
    metadata = {"total_steps": 60, "device": "cpu", "eval_steps": None, "optim": "adamw_torch"}
    assert event_line(event(2, "training.started", metadata=metadata)).endswith("  total_steps=60  device=cpu")
    completed = event(9, "training.completed", step=60, metrics={"finalLoss": 0.123456, "totalSteps": 60})
    assert event_line(completed).endswith("  step=60  finalLoss=0.1235  totalSteps=60")


def test_why_a_job_waits_is_a_sentence_in_one_line():
    line = event_line(event(7, "serving.waiting", reason="no node has a GPU", serving={"a": 1}))
    assert line == "    7  09:30:15  serving.waiting      reason=no node has a GPU"


def test_an_event_in_one_line():
    line = event_line(event(7, "checkpoint.saved", step=4, artifacts=[1, 2], ratio=0.123456789, none=None))
    assert line == "    7  09:30:15  checkpoint.saved     step=4  artifacts=2  ratio=0.1235"


def test_data_of_which_nothing_is_left_are_told_with_the_rows_that_were_rejected():
    report = {"rows": 9, "rejected_rows": 9, "train_samples": 0, "eval_samples": 0, "max_length": 512}
    report["rejected"] = [{"row": n, "reason": "no answer"} for n in range(1, 10)]
    assert list(preflight_lines(report)) == [
        "data: 9 rows, 9 of them rejected; 0 samples to train on",
        *(f"  row {n}: no answer" for n in (1, 2, 3)),
    ]
