"""`arkor-ray jobs`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from arkor_ray.cli.connection import ApiUrl, AsJson, ProjectSlug, connect
from arkor_ray.cli.output import age, print_json, print_table, status_text, stdout
from arkor_ray.cli.progress import JobProgress, event_line
from arkor_ray.client.client import Client
from arkor_ray.client.job_file import load_job_file
from arkor_ray.errors import TrainingError
from arkor_ray.schemas.event import FAILED, Event
from arkor_ray.schemas.job import Job

app = typer.Typer(no_args_is_help=True, help="Create, list, follow and cancel fine-tuning jobs.")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
INTERRUPTED = 130


@app.command()
def create(
    file: Annotated[Path, typer.Option("--file", "-f", help="job.yaml: name, model, dataset, lora, max_steps, …")],
    name: Annotated[str | None, typer.Option(help="Replaces the file's name.", show_default=False)] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Stay and show how it goes; exit code 1 if it fails.")
    ] = False,
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
    as_json: AsJson = False,
) -> None:
    """Submit the job that a YAML file describes."""
    request = load_job_file(file, name=name)
    with connect(api_url, project) as client:
        job = client.create_job(request.name, request.config)
        if as_json:
            print_json(job)
        elif follow:
            print(f"Created job {job.id}")
        else:
            print(f"Created job {job.id}; follow it with: arkor-ray jobs events {job.id} --follow")
        if follow:
            _follow(client, job, as_json)


@app.command("list")
def list_jobs(api_url: ApiUrl = None, project: ProjectSlug = None, as_json: AsJson = False) -> None:
    """List the project's jobs, newest first."""
    with connect(api_url, project) as client:
        jobs = client.list_jobs()
    if as_json:
        print_json(jobs)
        return
    rows = [(job.id, job.name, status_text(job), str(job.config.get("model", "")), age(job.created_at)) for job in jobs]
    print_table(("JOB", "NAME", "STATUS", "MODEL", "CREATED"), rows, empty="There are no jobs in this project yet.")


@app.command()
def get(job_id: JobId, api_url: ApiUrl = None, project: ProjectSlug = None, as_json: AsJson = False) -> None:
    """Show a job: its status, its configuration, its last word."""
    with connect(api_url, project) as client:
        detail = client.get_job_detail(job_id)
    job = detail.job
    if as_json:
        print_json({"job": job, "events": [event.data for event in detail.events]})
        return
    console = stdout()
    console.print(f"{job.name}  {status_text(job)}")
    shown = {
        "job": job.id,
        "created": age(job.created_at),
        "started": age(job.started_at),
        "ended": age(job.completed_at),
    }
    for key, value in {**shown, "error": job.error or "", **job.config}.items():
        if value != "":
            console.print(f"  {key}: {value}", markup=False)
    if detail.events:
        console.print(event_line(detail.events[-1]), markup=False)


@app.command()
def cancel(job_id: JobId, api_url: ApiUrl = None, project: ProjectSlug = None) -> None:
    """Cancel a job. The checkpoints it has saved go on answering."""
    with connect(api_url, project) as client:
        client.cancel_job(job_id)
    print(f"Cancelled job {job_id}")


@app.command()
def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the job ends; exit code 1 if it fails.")] = False,
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
    as_json: AsJson = False,
) -> None:
    """Show a job's events, from the first."""
    with connect(api_url, project) as client:
        detail = client.get_job_detail(job_id)
        if follow:
            _follow(client, detail.job, as_json)
            return
    for event in detail.events:
        _print_event(event, as_json)


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the job, or the given attempt, ends.")] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="The first is 1; left out: the newest.", show_default=False)
    ] = None,
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
) -> None:
    """Print what the job's driver and workers printed."""
    with connect(api_url, project) as client:
        if not follow:
            print(client.job_logs(job_id, attempt=attempt), end="")
            return
        with _stopping(job_id):
            for piece in client.follow_logs(job_id, attempt=attempt):
                print(piece, end="", flush=True)


def _follow(client: Client, job: Job, as_json: bool) -> None:
    failure = None
    with _stopping(job.id):
        for event in _shown(client, job, as_json):
            if event.type == FAILED:
                failure = event.data.get("error")
    if failure is not None:
        raise TrainingError(f"job {job.id} failed: {failure}")


@contextlib.contextmanager
def _stopping(job_id: str) -> Iterator[None]:
    """Ctrl-C ends the following, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped following; the job goes on. `arkor-ray jobs cancel {job_id}` ends it.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _shown(client: Client, job: Job, as_json: bool) -> Iterator[Event]:
    if as_json:
        for event in client.events(job.id):
            _print_event(event, as_json)
            yield event
        return
    with JobProgress(job) as progress:
        for event in client.events(job.id):
            progress.show(event)
            yield event


def _print_event(event: Event, as_json: bool) -> None:
    if as_json:
        print_json({"id": event.id, **event.data})
    else:
        print(event_line(event), flush=True)
