"""`arkor-ray migrate`: the schema alone, for whoever rolls out a new version."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from arkor_ray.errors import ServiceUnavailableError

RETRY_S = 2.0


def migrate(
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a database that does not answer yet.")] = 0,
) -> None:
    """Brings the database of ARKOR_RAY_DATABASE_URL to this version's schema, and does nothing else.

    The service does the same when it starts. Run by itself before that, a schema that cannot be brought up to date is
    told before anything is replaced. Running it again, or several at once, changes nothing; nor does an older version
    take back what a newer one has done.
    """
    from arkor_ray.db.session import Database
    from arkor_ray.service import check_database
    from arkor_ray.settings import Settings

    settings = Settings.load()
    deadline = time.monotonic() + wait
    while True:
        try:
            check_database(settings)
            break
        except ServiceUnavailableError as error:
            if time.monotonic() + RETRY_S > deadline:
                raise
            typer.echo(f"waiting: {error.message}", err=True)
            time.sleep(RETRY_S)
    db = Database(settings.database_url)
    try:
        found = db.migrate()
    finally:
        db.close()
    if found.state == "newer":
        print(
            f"The database has revision {found.found} of the schema, which a newer arkor-ray made: it stays as it is, and "
            f"this version, which brings {found.newest}, runs on it"
        )
    else:
        print("The database has this version's schema")
