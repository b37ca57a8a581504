"""`arkor-ray endpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.markup import escape

from arkor_ray.cli.checkpoints import Final, Step, chosen
from arkor_ray.cli.connection import ApiUrl, AsJson, ProjectSlug, connect
from arkor_ray.cli.output import SECRET_COLUMNS, age, print_json, print_table, secret_row
from arkor_ray.client.calls import FINAL, AdapterRef
from arkor_ray.client.client import Client
from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.chat import CheckpointAdapter
from arkor_ray.schemas.endpoint import AuthMode, Endpoint, RetentionMode, ServedAdapter

app = typer.Typer(no_args_is_help=True, help="Publish adapters and base models, and make keys for them.")
keys = typer.Typer(no_args_is_help=True, help="Create, list and revoke the keys that open an endpoint.")
app.add_typer(keys, name="keys")

Named = Annotated[str, typer.Argument(metavar="ENDPOINT", help="The endpoint's slug or id.")]
Job = Annotated[str | None, typer.Option("--job", help="Serve an adapter of this job.", show_default=False)]
Base = Annotated[str | None, typer.Option("--base", help="Serve this base model.", show_default=False)]
Keep = Annotated[
    str | None,
    typer.Option("--keep-runs", help="unlimited, disabled, or a number of days.", show_default=False),
]
AUTH_HELP = f"{' or '.join(get_args(AuthMode))}."


@app.command("list")
def list_endpoints(api_url: ApiUrl = None, project: ProjectSlug = None, as_json: AsJson = False) -> None:
    """List the project's endpoints, newest first."""
    with connect(api_url, project) as client:
        endpoints = client.list_endpoints()
    if as_json:
        print_json(endpoints)
        return
    rows = [
        (each.id, each.slug, _target(each), each.auth_mode, _state(each), each.url or "", age(each.created_at))
        for each in endpoints
    ]
    columns = ("ENDPOINT", "SLUG", "SERVES", "AUTH", "STATE", "URL", "CREATED")
    print_table(columns, rows, empty="There are no endpoints in this project yet.")


@app.command()
def create(
    slug: Annotated[str, typer.Argument(help="Its name, unique on this server: 2 to 50 of a-z, 0-9 and '-'.")],
    job_id: Job = None,
    step: Step = None,
    final: Final = False,
    base: Base = None,
    auth: Annotated[str, typer.Option(help=AUTH_HELP)] = "fixed_api_key",
    keep_runs: Keep = None,
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
    as_json: AsJson = False,
) -> None:
    """Publish a job's adapter, the final one unless a step is named, or a base model. Returns once it can answer."""
    if job_id is None and base is None:
        raise InvalidRequestError("give --job or --base, to be served", param="job")
    ref = _step(job_id, step, final, base)
    mode, days = _retention(keep_runs)
    with connect(api_url, project) as client:
        endpoint = client.create_endpoint(
            slug,
            job_id=job_id,
            step=ref,
            base_model=base,
            auth_mode=_auth(auth),
            run_retention_mode=mode,
            run_retention_days=days,
        )
    if as_json:
        print_json(endpoint)
        return
    print(f"Created endpoint {endpoint.id} at {endpoint.url}")
    if endpoint.auth_mode == "fixed_api_key":
        print(f"It needs a key; make one with: arkor-ray endpoints keys create {endpoint.slug} LABEL")


@app.command()
def get(endpoint: Named, api_url: ApiUrl = None, project: ProjectSlug = None, as_json: AsJson = False) -> None:
    """Show an endpoint."""
    with connect(api_url, project) as client:
        found = client.get_endpoint(_id(client, endpoint))
    _show(found, as_json)


@app.command()
def update(
    endpoint: Named,
    job_id: Job = None,
    step: Step = None,
    final: Final = False,
    base: Base = None,
    auth: Annotated[str | None, typer.Option(help=AUTH_HELP, show_default=False)] = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="A disabled one keeps its slug.", show_default=False)
    ] = None,
    keep_runs: Keep = None,
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
    as_json: AsJson = False,
) -> None:
    """Change what is given. What it serves changes once the new adapter can answer, without a gap."""
    ref = _step(job_id, step, final, base)
    mode, days = _retention(keep_runs)
    with connect(api_url, project) as client:
        updated = client.update_endpoint(
            _id(client, endpoint),
            job_id=job_id,
            step=ref,
            base_model=base,
            auth_mode=None if auth is None else _auth(auth),
            enabled=enabled,
            run_retention_mode=mode,
            run_retention_days=days,
        )
    _show(updated, as_json)


@app.command()
def delete(endpoint: Named, api_url: ApiUrl = None, project: ProjectSlug = None) -> None:
    """Delete an endpoint, its keys and its stored runs; its slug is free afterwards."""
    with connect(api_url, project) as client:
        client.delete_endpoint(_id(client, endpoint))
    print(f"Deleted endpoint {endpoint}")


@keys.command("list")
def list_keys(endpoint: Named, api_url: ApiUrl = None, project: ProjectSlug = None, as_json: AsJson = False) -> None:
    """List an endpoint's keys, revoked ones too, without their secrets."""
    with connect(api_url, project) as client:
        listed = client.list_endpoint_keys(_id(client, endpoint))
    if as_json:
        print_json(listed)
        return
    rows = [secret_row(each, valid=each.enabled) for each in listed]
    print_table(("KEY", *SECRET_COLUMNS), rows, empty="This endpoint has no keys.")


@keys.command("create")
def create_key(
    endpoint: Named,
    label: Annotated[str, typer.Argument(help="Who or what will use it.")],
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
    as_json: AsJson = False,
) -> None:
    """Create a key. It is shown this once."""
    with connect(api_url, project) as client:
        issued = client.create_endpoint_key(_id(client, endpoint), label)
    if as_json:
        print_json(issued)
        return
    typer.echo(f"Key {issued.id} ({issued.label}), shown only now:", err=True)
    print(issued.plaintext)


@keys.command("revoke")
def revoke_key(
    endpoint: Named,
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as listed.")],
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
) -> None:
    """Make a key invalid at once; it stays listed."""
    with connect(api_url, project) as client:
        client.revoke_endpoint_key(_id(client, endpoint), key_id)
    print(f"Revoked key {key_id}")


@app.command()
def runs(
    endpoint: Named,
    limit: Annotated[int, typer.Option(help="How many of the newest to list.", min=1, max=200)] = 20,
    export: Annotated[
        Path | None, typer.Option(help="Write all of them to this file as JSONL, to train on.", show_default=False)
    ] = None,
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
    as_json: AsJson = False,
) -> None:
    """List what an endpoint was asked and answered, newest first, or export it as a data set."""
    with connect(api_url, project) as client:
        endpoint_id = _id(client, endpoint)
        if export is not None:
            path = client.export_runs(endpoint_id, export)
            print_json({"path": str(path)}) if as_json else print(path)
            return
        listed = client.list_runs(endpoint_id, limit=limit)
    if as_json:
        print_json(listed)
        return
    rows = [
        (
            each.id,
            _excerpt(each.messages[-1]),
            _excerpt(each.answer),
            each.finish_reason,
            str(each.usage["total_tokens"]),
            f"{each.latency_ms} ms",
            age(each.created_at),
        )
        for each in listed
    ]
    columns = ("RUN", "ASKED", "ANSWERED", "END", "TOKENS", "TOOK", "AT")
    print_table(columns, rows, empty="This endpoint has stored no run yet.")


def _id(client: Client, endpoint: str) -> str:
    """The id of the project's endpoint with this slug; what is no slug there is taken for an id."""
    return next((each.id for each in client.list_endpoints() if each.slug == endpoint), endpoint)


def _excerpt(message: dict[str, Any]) -> str:
    """The beginning of a message's text on one line, or the functions that it calls."""
    called = ", ".join(str(call.get("function", {}).get("name")) for call in message.get("tool_calls") or [])
    text = " ".join(str(message.get("content") or "").split()) or called
    return escape(text if len(text) <= 40 else f"{text[:39]}…")


def _show(endpoint: Endpoint, as_json: bool) -> None:
    if as_json:
        print_json(endpoint)
        return
    lines = {
        "endpoint": endpoint.id,
        "slug": endpoint.slug,
        "url": endpoint.url,
        "serves": _target(endpoint),
        "auth": endpoint.auth_mode,
        "state": _state(endpoint),
        "runs kept": f"{endpoint.run_retention_days} days"
        if endpoint.run_retention_days
        else endpoint.run_retention_mode,
    }
    for name, value in lines.items():
        if value is not None:
            print(f"{name}: {value}")


def _target(endpoint: Endpoint) -> str:
    if not isinstance(endpoint.target, ServedAdapter):
        return endpoint.target.base_model
    adapter = endpoint.target.adapter
    return f"{adapter.job_id} {f'step {adapter.step}' if isinstance(adapter, CheckpointAdapter) else FINAL}"


def _state(endpoint: Endpoint) -> str:
    return "enabled" if endpoint.enabled else "disabled"


def _step(job_id: str | None, step: int | None, final: bool, base: str | None) -> AdapterRef:
    if job_id is not None and base is not None:
        raise InvalidRequestError("--job and --base name two targets; give one of them", param="job")
    ref = chosen(step, final)
    if ref is not None and job_id is None:
        raise InvalidRequestError("--step and --final belong to --job", param="job")
    return FINAL if ref is None else ref


def _auth(value: str) -> AuthMode:
    for mode in get_args(AuthMode):
        if value == mode:
            return mode
    raise InvalidRequestError(f"--auth: must be {AUTH_HELP[:-1]} (got {value!r})", param="auth")


def _retention(keep_runs: str | None) -> tuple[RetentionMode | None, int | None]:
    """What --keep-runs names, as mode and days."""
    match keep_runs:
        case None:
            return None, None
        case "unlimited" | "disabled":
            return keep_runs, None
        case days if days.isdecimal():
            return "days", int(days)
    raise InvalidRequestError(
        f"--keep-runs: must be unlimited, disabled or a number of days (got {keep_runs!r})", param="keepRuns"
    )
