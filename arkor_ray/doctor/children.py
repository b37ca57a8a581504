"""Programs that a check asks: with a time limit, and their output up to it whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """`code` is None where the program did not end in time and was killed."""

    output: str
    errors: str
    code: int | None

    def objects(self) -> list[dict[str, Any]]:
        """Its lines of JSON objects; others, such as warnings that a package prints, are left out."""
        found = []
        for line in self.output.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return found


def ask(command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None) -> Said | None:
    """None where there is no such program."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    except FileNotFoundError:
        return None
    try:
        output, errors = process.communicate(timeout=limit_s)
        return Said(output, errors, process.returncode)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        return Said(output, errors, None)


def ask_module(module: str, *arguments: str, limit_s: float, environment: Mapping[str, str] | None = None) -> Said:
    said = ask([sys.executable, "-m", module, *arguments], limit_s, environment)
    assert said is not None, "this interpreter is there"
    return said
