"""A job's events as they come, for a person: a live bar in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from arkor_ray.cli.output import number
from arkor_ray.schemas.event import CANCELLED, CHECKPOINT, COMPLETED, FAILED, LOG, STARTED, WAITING, Event
from arkor_ray.schemas.job import Job

PREFLIGHT = "dataset.preflight"
_SHOWN_REJECTIONS = 3
_LINES_PER_RUN = 20  # how many steps of a run a log shows at most, where the run's length is known

# Of events that carry a whole report, what there is room for in a line; of those that wait, a sentence that has the rest in it.
_SHOWN = {
    PREFLIGHT: ("format", "rows", "rejected_rows", "train_samples", "eval_samples", "tokens"),
    STARTED: ("model", "total_steps", "train_samples", "num_workers", "device", "precision"),
    **dict.fromkeys(WAITING, ("reason",)),
}


def event_line(event: Event) -> str:
    """One event in one line: number, time, type, and its fields, with those of objects in it; of lists how long they are."""
    fields: dict[str, Any] = {}
    for key, value in event.data.items():
        fields |= value if isinstance(value, dict) else {key: value}
    shown = _SHOWN.get(event.type) or [key for key in fields if key not in ("type", "jobId", "timestamp")]
    said = "  ".join(f"{key}={_short(fields[key])}" for key in shown if fields.get(key) is not None)
    return f"{event.id:>5}  {str(event.data.get('timestamp', ''))[11:19]}  {event.type:<20} {said}".rstrip()


def preflight_lines(report: dict[str, Any]) -> Iterator[str]:
    """What was found in the data, and below it the first rows that were rejected."""
    rejected = report.get("rejected_rows") or 0
    said = [f"data: {report.get('rows')} rows" + (f", {rejected} of them rejected" if rejected else "")]
    evaluation = report.get("eval_samples") or 0
    samples = f"{report.get('train_samples')} samples to train on"
    said.append(samples + (f", {evaluation} to evaluate" if evaluation else ""))
    if "length" in report:  # there is none where no row is left
        cut = report.get("truncated_samples") or 0
        longest = f"the longest has {report['length']['max']} tokens"
        said.append(longest + (f", {cut} are cut to {report.get('max_length')}" if cut else ""))
        said.append(f"the loss looks at {report['supervised_share']:.0%} of the tokens".replace("%", " %"))
    yield "; ".join(said)
    for each in report.get("rejected", [])[:_SHOWN_REJECTIONS]:
        yield f"  row {each['row']}: {each['reason']}"


class JobProgress:
    """Shows events; `say` prints a line beside them. A context manager, since a live bar must be taken down."""

    def __init__(self, job: Job) -> None:
        self._live = sys.stdout.isatty()
        self._total = _int(job.config.get("maxSteps"))
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=Console(highlight=False), disable=not self._live,
        )  # fmt: skip
        self._task = self._bar.add_task("queued", total=self._total, said="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        if self._live:
            self._bar.console.print(escape(text))
        else:
            print(text, flush=True)

    def show(self, event: Event) -> None:
        data = event.data
        if event.type == STARTED:
            metadata = data.get("metadata") or {}
            self._total = _int(metadata.get("total_steps") or metadata.get("totalSteps")) or self._total
            self._bar.update(self._task, total=self._total, description="training")
            self.say("training started" + (f": {self._total} steps" if self._total else ""))
        elif event.type == LOG:
            self._log(data)
        elif event.type == CHECKPOINT:
            late = "" if data.get("ready", True) else "; its first answer may take a while"
            self.say(f"checkpoint at step {data['step']} is saved and answers{late}")
        elif event.type == COMPLETED:
            metrics = data.get("metrics") or {}
            self._finish("completed", f"final loss {number(metrics.get('finalLoss'))}")
            took = metrics.get("totalTime")
            self.say("training completed" + (f" in {took:.0f} s" if isinstance(took, (int, float)) else ""))
        elif event.type == PREFLIGHT:
            for line in preflight_lines(data):
                self.say(line)
        elif event.type in WAITING:
            self.say(str(data.get("reason")))
        elif event.type == FAILED:
            self._finish("failed", "")
            self.say(f"training failed: {data.get('error')}")
        elif event.type == CANCELLED:
            self._finish("cancelled", "")
            self.say("training cancelled")
        else:
            self.say(event_line(event).strip())

    def _log(self, data: dict[str, Any]) -> None:
        step = data["step"]
        numbers = [
            f"{label} {number(data[key])}"
            for key, label in (("loss", "loss"), ("evalLoss", "eval loss"), ("learningRate", "lr"))
            if data.get(key) is not None
        ]
        self._bar.update(self._task, completed=step, said="  ".join(numbers))
        every = max(1, (self._total or 0) // _LINES_PER_RUN)
        if not self._live and (step % every == 0 or step == 1 or data.get("evalLoss") is not None):
            of = f"/{self._total}" if self._total else ""
            self.say(f"step {step}{of}  {'  '.join(numbers)}")

    def _finish(self, description: str, said: str) -> None:
        self._bar.update(self._task, description=description, said=said)


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return number(value)
    return len(value) if isinstance(value, list) else value
