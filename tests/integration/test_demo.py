"""`make demo` as a user sees it: the real service, the real job, samples at each checkpoint, a final adapter that answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_the_demo_shows_a_model_that_learns_and_leaves_its_adapter(tmp_path):
    command = [sys.executable, "-m", "arkor_ray.cli.main", "demo", "--data-dir", str(tmp_path / "demo")]
    done = subprocess.run(
        command, env={**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": cache()}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    end = next(i for i, line in enumerate(lines) if "training completed" in line)
    samples = [line for line in lines[:end] if "answers a ticket it has never seen" in line]
    assert len(samples) >= 3, done.stdout
    scores = [int(line.split("JSON ")[1].split("/")[0]) for line in lines[:end] if "JSON " in line and "right" in line]
    assert scores[-1] >= 5, done.stdout
    answer = lines[next(i for i, line in enumerate(lines) if line.startswith("> ")) + 1]
    assert set(json.loads(answer)) == {"category", "urgency", "summary", "nextAction"}
    adapter = Path(lines[-1].rsplit(" ", 1)[1])
    assert PeftConfig.from_pretrained(adapter).r == 16


def cache() -> str:
    """The machine's own cache, so that the base model is made once and not for each test."""
    return os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
