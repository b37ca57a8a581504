"""What cluster/THREATS.md says is tested is tested: each line names tests, and each of them exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def _lines() -> list[list[str]]:
    """The cells of each line of the table but its head."""
    text = (ROOT / "cluster" / "THREATS.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return rows[2:]


@cache
def _tests_of(path: str) -> frozenset[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, functions))


@pytest.mark.parametrize("line", _lines(), ids=lambda line: line[0])
def test_what_stands_against_a_threat_is_tested(line):
    threat, against, tests = line
    assert threat and against
    named = _NAMED.findall(tests)
    assert named and not _NAMED.sub("", tests).strip(), f"tests are named as `tests/….py::test_…`: {tests}"
    missing = [f"{path}::{name}" for path, name in named if not (ROOT / path).is_file() or name not in _tests_of(path)]
    assert not missing


def test_the_table_is_there():
    assert len(_lines()) > 20
