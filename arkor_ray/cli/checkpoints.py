"""`arkor-ray checkpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkor_ray.cli.connection import ApiUrl, AsJson, ProjectSlug, connect
from arkor_ray.cli.jobs import JobId
from arkor_ray.cli.output import age, number, print_json, print_table
from arkor_ray.client.calls import FINAL, AdapterRef
from arkor_ray.errors import InvalidRequestError

app = typer.Typer(no_args_is_help=True, help="List and download a job's adapters.")

Step = Annotated[int | None, typer.Option(help="The checkpoint at this step.", show_default=False)]
Final = Annotated[bool, typer.Option("--final", help="The final adapter.")]


@app.command("list")
def list_checkpoints(
    job_id: JobId, api_url: ApiUrl = None, project: ProjectSlug = None, as_json: AsJson = False
) -> None:
    """List a job's checkpoints, the final adapter last."""
    with connect(api_url, project) as client:
        checkpoints = client.list_checkpoints(job_id)
    if as_json:
        print_json(checkpoints)
        return
    rows = [
        (
            each.adapter_id,
            "final" if each.kind == FINAL else f"step {each.step}",
            "answers" if each.ready else "loads when asked",
            "  ".join(f"{name} {number(value)}" for name, value in each.metrics.items()),
            age(each.created_at),
        )
        for each in checkpoints
    ]
    print_table(("ADAPTER", "STEP", "STATE", "METRICS", "SAVED"), rows, empty="This job has saved no checkpoint.")


@app.command()
def download(
    job_id: JobId,
    step: Step = None,
    final: Final = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter's folder is made in here.")] = Path(
        "adapters"
    ),
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
    as_json: AsJson = False,
) -> None:
    """Download an adapter in PEFT form: the final one, unless a step is named."""
    with connect(api_url, project) as client:
        folder = client.download_adapter(job_id, chosen(step, final) or FINAL, output)
    if as_json:
        print_json({"path": str(folder)})
    else:
        print(folder)


def chosen(step: int | None, final: bool) -> AdapterRef | None:
    """What `--step` and `--final` name, None when neither was given."""
    if step is not None and final:
        raise InvalidRequestError("--step and --final name two adapters; give one of them", param="step")
    return FINAL if final else step
