"""`arkor-ray demo`: from nothing to a chat with a fine-tuned model, through the public SDK."""

from __future__ import annotations

import functools
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from arkor_ray.cli.chat import converse, print_answer
from arkor_ray.cli.child_service import ChildService
from arkor_ray.cli.file_server import served
from arkor_ray.cli.progress import JobProgress
from arkor_ray.client import Client, Trainer, TrainerCallbacks, text_of
from arkor_ray.client.callbacks import CheckpointContext, EventContext
from arkor_ray.client.job_request import JobRequest
from arkor_ray.demo.triage import (
    TriageExample,
    TriageScore,
    demo_job_config,
    held_out_examples,
    score_answer,
    write_triage_dataset,
)
from arkor_ray.errors import TrainingError
from arkor_ray.schemas.job import JobStatus

DEMO_BASE = "arkor-ray/demo-base"
ROWS = 480
SCORED = 6  # tickets asked at each checkpoint, together; the first is shown
MAX_TOKENS = 160
CHECKPOINTS = 4
LINE = 200  # characters of an answer that are shown
_LABELS = {"valid_json": "JSON", "next_action": "next action"}


def demo(
    model: Annotated[
        str, typer.Option(help="A name in the service's catalogue; without --api-url also a directory.")
    ] = DEMO_BASE,
    api_url: Annotated[
        str | None,
        typer.Option(help="A service that runs already. Default: one of the demo's own.", show_default=False),
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="For the demo's service, data set and adapter.")] = Path(
        ".arkor-ray-demo"
    ),
    steps: Annotated[int | None, typer.Option(min=CHECKPOINTS, help="Length of the run.", show_default=False)] = None,
) -> None:
    """Fine-tune a small model to sort support tickets, and see each checkpoint answer while training goes on."""
    signal.signal(signal.SIGTERM, _end)
    data_dir = data_dir.expanduser().absolute()
    story = Story()
    with ExitStack() as stack:
        if api_url is None:
            story.tell(f"starting a service of its own in {data_dir}")
            service = stack.enter_context(_own_service(data_dir, model))
            api_url = service.url
            story.tell(f"the service is ready at {api_url}")
            client = stack.enter_context(_stranger(api_url))
        else:
            client = stack.enter_context(Client(api_url))
        rows = write_triage_dataset(data_dir / "triage.jsonl", ROWS)
        story.tell(f"wrote {ROWS} support tickets with their answers to {rows}")
        url = stack.enter_context(served(rows, to=api_url))
        _fine_tune(story, client, JobRequest("triage-demo", _config(url, model, steps)), data_dir)


@dataclass
class Answers:
    """What a model said to the held-out tickets, and how often it was right."""

    texts: list[str]
    scores: list[TriageScore]

    def summary(self) -> str:
        count = len(self.scores)
        parts = [
            (field.name, sum(getattr(score, field.name) for score in self.scores)) for field in fields(TriageScore)
        ]
        return ", ".join(f"{_LABELS.get(name, name)} {right}/{count}" for name, right in parts)


class Story:
    """Lines of the demo's own, each with the seconds since its begin; beside the live bar while there is one."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.progress: JobProgress | None = None

    def tell(self, text: str) -> None:
        line = f"[{time.monotonic() - self._begin:5.1f} s] {text}"
        if self.progress is not None:
            self.progress.say(line)
        else:
            print(line, flush=True)


class Examiner:
    """Asks the same unseen tickets at every checkpoint."""

    def __init__(self, story: Story, client: Client, model: str) -> None:
        self._story = story
        self._client = client
        self._model = model
        self._examples = held_out_examples(SCORED)
        self._base: Answers | None = None

    @property
    def example(self) -> TriageExample:
        return self._examples[0]

    def examine(self, checkpoint: CheckpointContext) -> None:
        shown = []
        if self._base is None:
            self._base = self._ask(functools.partial(self._client.chat, base_model=self._model))
            shown = [("ticket", self.example.ticket), ("wanted", self.example.messages[-1]["content"])]
        answers = self._ask(checkpoint.infer)
        shown += [
            ("base model", self._base.texts[0]),
            (f"step {checkpoint.step}", answers.texts[0]),
            ("right", f"{answers.summary()}; the base model: {self._base.summary()}"),
        ]
        self._story.tell(f"checkpoint at step {checkpoint.step} answers a ticket it has never seen:")
        for label, text in shown:
            self._story.tell(f"  {label:>10}  {_in_one_line(text)}")

    def _ask(self, infer: Any) -> Answers:
        def ask(example: TriageExample) -> str:
            return text_of(infer(example.prompt, max_tokens=MAX_TOKENS, temperature=0.0, stream=False))

        with ThreadPoolExecutor(len(self._examples)) as threads:
            texts = list(threads.map(ask, self._examples))
        pairs = zip(texts, self._examples, strict=True)
        return Answers(texts, [score_answer(text, example.answer) for text, example in pairs])


def _in_one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= LINE else f"{flat[:LINE]}…"


def _fine_tune(story: Story, client: Client, request: JobRequest, data_dir: Path) -> None:
    model = request.config["model"]
    examiner = Examiner(story, client, model)

    def show(context: EventContext) -> None:
        assert story.progress is not None
        story.progress.show(context.event)

    def on_checkpoint(context: CheckpointContext) -> None:
        show(context)
        examiner.examine(context)

    callbacks = TrainerCallbacks(show, show, on_checkpoint, show, show)
    trainer = Trainer(request, callbacks=callbacks, session=client.session)
    job = trainer.start()
    story.tell(f"submitted job {job.id}: LoRA on {model}, {request.config['maxSteps']} steps")
    try:
        with JobProgress(job) as story.progress:
            result = trainer.wait()
    except (KeyboardInterrupt, SystemExit):
        trainer.cancel()  # else it would go on with the next demo in this directory
        raise
    finally:
        story.progress = None
    if result.status is not JobStatus.COMPLETED:
        raise TrainingError(f"the job ended as {result.status}: {result.error or 'no reason given'}")
    story.tell("training is completed")
    folder = client.download_adapter(job.id, "final", data_dir / "adapters")
    arguments = {"job_id": job.id, "step": "final", "max_tokens": MAX_TOKENS, "temperature": 0.0}
    story.tell(f"a chat with the final adapter, through {client.base_url}:")
    print(f"> {examiner.example.ticket}", flush=True)
    print_answer(client, examiner.example.prompt, arguments)
    if sys.stdin.isatty():
        print("Write a ticket of your own; Ctrl-D ends.")
        converse(client, examiner.example.prompt[:1], arguments)
    story.tell(f"the adapter, in PEFT form, is in {folder}")


def _config(dataset_url: str, model: str, steps: int | None) -> dict[str, Any]:
    config = demo_job_config(dataset_url, model)
    if model != DEMO_BASE:
        config["learningRate"] = 2e-4  # the demo's own base is tiny and stands much more
    if steps is not None:
        config |= {"maxSteps": steps, "saveSteps": max(1, steps // CHECKPOINTS)}
    return config


def _own_service(data_dir: Path, model: str) -> ChildService:
    environment = {"ARKOR_RAY_DATASETS_ALLOW_PRIVATE_HOSTS": "1"}  # the data set is served by this process
    aliases = []
    if Path(model).is_absolute():
        environment["ARKOR_RAY_MODELS_ALLOW_LOCAL_PATHS"] = "1"
    elif model != DEMO_BASE:
        aliases.append(f"{model}={model}")
    return ChildService(data_dir, aliases=aliases, environment=environment)


def _stranger(api_url: str) -> Client:
    """A new anonymous user, kept in memory: the demo's service has another port each time, so files would pile up."""
    with Client(api_url) as client:
        minted = client.anonymous_token()
    client = Client(api_url, token=minted.token, org=minted.personal_org.slug, project="demo")
    client.ensure_project("demo", "demo")
    return client


def _end(number: int, frame: object) -> NoReturn:
    # As an exception, so that the service is ended on the way out.
    raise SystemExit(128 + number)
