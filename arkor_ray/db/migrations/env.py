"""What alembic runs: the revisions of `versions/` on the connection that Database.migrate() or the command line opens.

A developer makes a new revision, on a database at the newest one, with
`alembic -c arkor_ray/db/migrations/alembic.ini -x url=sqlite:///PATH revision --autogenerate --rev-id 0004 -m "what it adds"`,
under the next number. It only adds, and what it adds may be left out of an INSERT: processes of the version before go on with
the new schema until they are replaced.
"""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection

from arkor_ray.db.session import Database
from arkor_ray.db.tables import Base, UtcDateTime


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,  # SQLite changes a column by copying its table, which alembic does only in batch mode
        render_item=plain_type,
    )
    with context.begin_transaction():
        context.run_migrations()


def plain_type(kind: str, item: Any, _autogenerate: Any) -> str | Literal[False]:
    """Revisions are history: they name types of the library, not classes of ours that may change later."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    database = Database(context.get_x_argument(as_dictionary=True)["url"])
    with database.engine.begin() as opened:
        run(opened)
