"""`arkor-ray storage`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from arkor_ray.cli.connection import AsJson
from arkor_ray.cli.output import age, print_json, print_table
from arkor_ray.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from arkor_ray.db.session import Database
    from arkor_ray.jobs.garbage import Amount, Report
    from arkor_ray.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Look after what the service keeps in its storage.")


@app.callback()
def storage() -> None:
    """A group, though of one command."""


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    unknown_jobs: Annotated[
        bool, typer.Option("--unknown-jobs", help="Also remove folders of jobs that the database does not have.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Of the service on this machine.", envvar="ARKOR_RAY_DATA_DIR")] = Path(
        ".arkor-ray"
    ),
    as_json: AsJson = False,
) -> None:
    """For the operator: remove what no job needs any more. The service does the same by itself every few hours.

    Works with the service's settings, on its machine, also while it runs: ARKOR_RAY_RESUME_STATE_DAYS and
    ARKOR_RAY_ADAPTER_DAYS say how long what is kept.
    """
    from arkor_ray.jobs import garbage
    from arkor_ray.settings import Settings
    from arkor_ray.storage import open_store

    settings = Settings.load(data_dir=data_dir)
    db = _existing_database(settings)
    store = open_store(settings.storage_url, endpoint_url=settings.s3_endpoint_url)
    report = garbage.sweep(settings, db, store, dry_run=dry_run, unknown_jobs=unknown_jobs)
    if as_json:
        print_json(_plain(report))
    else:
        _print(report)
    if report.problems:
        raise typer.Exit(1)


def _existing_database(settings: Settings) -> Database:
    """Never a new one: in the eyes of an empty database every folder is of an unknown job."""
    from sqlalchemy import inspect
    from sqlalchemy.exc import SQLAlchemyError

    from arkor_ray.db.session import Database
    from arkor_ray.db.tables import JobRow
    from arkor_ray.placeholders import shown_database_url
    from arkor_ray.service import check_reachable

    missing = ServiceUnavailableError(
        f"There is no arkor-ray database at {shown_database_url(settings.database_url)}; set --data-dir or "
        "ARKOR_RAY_DATABASE_URL to that of the service"
    )
    if settings.database_file is not None and not settings.database_file.is_file():
        raise missing
    check_reachable(settings)
    db = Database(settings.database_url)
    try:
        made = inspect(db.engine).has_table(JobRow.__tablename__)
    except SQLAlchemyError as error:
        raise missing from error
    if not made:
        raise missing
    return db


def _print(report: Report) -> None:
    rows = [(str(why), *_columns(amount)) for why, amount in report.removed.items()]
    if len(rows) > 1:
        rows.append(("total", *_columns(_total(report))))
    verb = "WOULD GO" if report.dry_run else "REMOVED"
    print_table((verb, "OBJECTS", "SIZE", "OLDEST"), rows, empty="There is nothing to remove.")
    if report.unknown_jobs.objects:
        print(
            f"Left alone, of jobs that the database does not have: {_words(report.unknown_jobs)} (see --unknown-jobs)"
        )
    if report.unknown_keys.objects:
        shown = ", ".join(map(repr, report.examples))
        print(f"Left alone, not made by this service: {_words(report.unknown_keys)}, such as {shown}")
    for problem in report.problems:
        typer.echo(f"error: it ended early: {problem}", err=True)


def _total(report: Report) -> Amount:
    from arkor_ray.jobs.garbage import Amount

    amounts = report.removed.values()
    oldest = [amount.oldest for amount in amounts if amount.oldest is not None]
    return Amount(sum(a.objects for a in amounts), sum(a.size for a in amounts), min(oldest, default=None))


def _columns(amount: Amount) -> tuple[str, str, str]:
    return str(amount.objects), decimal(amount.size), age(amount.oldest)


def _words(amount: Amount) -> str:
    return f"{amount.objects} objects, {decimal(amount.size)}, the oldest of {age(amount.oldest)}"


def _plain(report: Report) -> dict[str, Any]:
    def plain(amount: Amount) -> dict[str, Any]:
        return {
            "objects": amount.objects,
            "bytes": amount.size,
            "oldest": amount.oldest.isoformat() if amount.oldest else None,
        }

    return {
        "dryRun": report.dry_run,
        "removed": {why.name.lower(): plain(amount) for why, amount in report.removed.items()},
        "total": plain(_total(report)),
        "unknownJobs": plain(report.unknown_jobs),
        "unknownKeys": {**plain(report.unknown_keys), "examples": report.examples},
        "problems": report.problems,
    }
