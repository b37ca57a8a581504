"""Tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from arkor_ray.schemas.base import WireModel
from arkor_ray.schemas.endpoint import EndpointKey
from arkor_ray.schemas.identity import Token
from arkor_ray.schemas.job import Job

STYLES = {"queued": "yellow", "running": "cyan", "completed": "green", "failed": "red", "cancelled": "magenta"}
_WIDE = 400  # columns of a table that goes into a file or a pipe, where nothing may be cut off


def stdout() -> Console:
    # Made anew each time: tests and the demo replace sys.stdout.
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on one line; wire models in the wire's spelling."""
    print(json.dumps(_plain(value), ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """`empty` is the sentence for no rows."""
    rows = list(rows)
    if not rows:
        print(empty)
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[:1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


def status_text(job: Job) -> str:
    return f"[{STYLES[job.status]}]{job.status}[/]"


SECRET_COLUMNS = ("LABEL", "PREFIX", "STATE", "CREATED", "USED")  # after the one with its id


def secret_row(listed: EndpointKey | Token, *, valid: bool) -> tuple[str, ...]:
    """A key or a token in a list, without its secret: its id, then `SECRET_COLUMNS`."""
    state = "valid" if valid else "revoked"
    used = age(listed.last_used_at) or "never"
    return listed.id, listed.label, f"{listed.prefix}…", state, age(listed.created_at), used


def age(moment: datetime | None) -> str:
    """How long ago, in the one unit that fits."""
    if moment is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{int(seconds)} s ago"


def number(value: Any) -> str:
    """A measured number in few digits; a dash where there is none."""
    if not isinstance(value, (int, float)):
        return "–"
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.4f}".rstrip("0").rstrip(".")


def _plain(value: Any) -> Any:
    if isinstance(value, WireModel):
        return value.to_wire()
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
