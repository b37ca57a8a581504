"""What the tests of the files in cluster/ read in common."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def variables(path: Path) -> dict[str, str]:
    """Of a file of NAME=VALUE lines."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[A-Z_0-9]+=", line) for line in lines), path
    return dict(line.split("=", 1) for line in lines)
