"""Which revision of the schema a database has, seen from the newest one that this version brings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection

from arkor_ray.db import migrations

SCRIPTS = Path(str(migrations.__file__)).parent
_OURS = re.compile(r"\d{4}")  # numbered in the order in which they came


@dataclass(frozen=True)
class SchemaState:
    """`found` is the database's revision, None where it has no tables of ours; `newest` is this version's.

    "newer": made by a version after this one. "foreign": no revision of ours, so another program's database.
    """

    state: Literal["none", "behind", "newest", "newer", "foreign"]
    found: str | None
    newest: str


def schema_state(connection: Connection) -> SchemaState:
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(SCRIPTS))
    newest = str(scripts.get_current_head())
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        return SchemaState("none", None, newest)
    if found in {script.revision for script in scripts.walk_revisions()}:
        return SchemaState("newest" if found == newest else "behind", found, newest)
    return SchemaState("newer" if _OURS.fullmatch(found) and found > newest else "foreign", found, newest)
