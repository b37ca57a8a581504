"""`arkor-ray doctor`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from arkor_ray.cli.connection import AsJson
from arkor_ray.cli.output import print_json, stdout
from arkor_ray.doctor.findings import Finding, Status

STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAIL: "bold red"}


def doctor(
    data_dir: Annotated[Path, typer.Option(help="Of the service on this machine.", envvar="ARKOR_RAY_DATA_DIR")] = Path(
        ".arkor-ray"
    ),
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", envvar="RAY_ADDRESS", help="Also asks every node of this Ray.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what a service needs on this machine, before it is started or while it runs, and say what to do.

    Changes nothing: what it writes to the storage it removes. Exit code 1 if anything fails.
    """
    from arkor_ray.doctor.examination import Subject, examine

    examined = examine(Subject(data_dir, ray_address))
    if as_json:
        print_json({"ok": not examined.failed, "checks": [asdict(finding) for finding in examined.findings]})
    else:
        for finding in examined.findings:
            _print(finding)
    if examined.hangs:
        sys.stdout.flush()
        os._exit(1)  # the usual end waits for transfers that were begun, and those may hang too
    if examined.failed:
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    line = Text.assemble((f"{finding.status:<8}", STYLES[finding.status]), f"{finding.name}: ", finding.found)
    if finding.remedy:
        line.append(f"\n        → {finding.remedy}")
    stdout().print(line, soft_wrap=True)
