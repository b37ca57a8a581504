"""What an import brings in. The client, the command line and the API must not load what only training and serving need."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import arkor_ray

HEAVY = {"torch", "transformers", "vllm", "deepspeed", "peft", "bitsandbytes", "datasets"}
# The control plane meets Ray by name at run time; the client has nothing to do with it at all.
SERVER = {"ray", "fastapi", "sqlalchemy", "boto3"}


def loaded_by(code: str) -> set[str]:
    """The top-level packages that are loaded after a fresh interpreter ran `code`."""
    report = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    script = f"import atexit\natexit.register(lambda: exec({report!r}))\n{code}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.splitlines()[-1].split())


def test_the_check_sees_what_is_loaded():
    assert {"json", "decimal"} <= loaded_by("import json, decimal")


@pytest.mark.parametrize("module", ["arkor_ray", "arkor_ray.client", "arkor_ray.cli.main"])
def test_client_and_command_line_bring_in_neither_torch_nor_the_server(module):
    assert not loaded_by(f"import {module}") & (HEAVY | SERVER)


def test_using_the_public_names_brings_in_neither():
    assert not loaded_by("from arkor_ray import *") & (HEAVY | SERVER)


def test_importing_the_package_loads_none_of_its_dependencies():
    assert not loaded_by("import arkor_ray") & {"httpx", "pydantic", "yaml", "rich", "typer"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["jobs", "--help"],
        ["chat", "--help"],
        ["endpoints", "--help"],
        ["demo", "--help"],
        ["doctor", "--help"],
        ["storage", "gc", "--help"],
    ],
)
def test_help_brings_in_neither(arguments):
    code = f"import sys; sys.argv = ['arkor-ray', *{arguments!r}]\nfrom arkor_ray.cli.main import main\nmain()"
    assert not loaded_by(code) & (HEAVY | SERVER)


@pytest.mark.parametrize("script", ["finetune", "batch_inference", "evaluate", "export"])
def test_the_help_of_a_job_script_brings_in_neither(script):
    path = Path(__file__).parents[1] / "jobs" / f"{script}.py"
    code = (
        f"import runpy, sys; sys.argv = [{str(path)!r}, '--help']\nrunpy.run_path({str(path)!r}, run_name='__main__')"
    )
    assert not loaded_by(code) & (HEAVY | SERVER)


def test_the_list_of_commands_loads_none_of_them():
    code = "import sys; sys.argv = ['arkor-ray', '--help']\nfrom arkor_ray.cli.main import main\nmain()"
    assert not loaded_by(code) & {"httpx", "pydantic", "yaml"}


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="needs the extra 'server'")
def test_the_api_brings_in_neither_torch_nor_an_engine():
    assert not loaded_by("import arkor_ray.api.app") & HEAVY


def test_every_public_name_exists():
    for name in arkor_ray.__all__:
        assert getattr(arkor_ray, name) is not None
    assert set(arkor_ray.__all__) <= set(dir(arkor_ray))
    with pytest.raises(AttributeError, match="nonesuch"):
        arkor_ray.nonesuch  # noqa: B018
