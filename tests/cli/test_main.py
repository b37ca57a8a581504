from __future__ import annotations

import subprocess
import sys

import pytest

from arkor_ray.cli import main as main_module


def test_help_lists_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    for name in main_module.COMMANDS:
        assert name in result.output


@pytest.mark.parametrize("name", main_module.COMMANDS)
def test_every_command_loads_and_explains_itself(run, name):
    assert run(name, "--help").exit_code == 0


def test_version(run):
    assert run("--version").output.startswith("arkor-ray 0.")


def test_an_unknown_command_is_a_usage_error(run):
    result = run("jbos")
    assert result.exit_code == 2
    assert "Did you mean 'jobs'" in " ".join(result.output.split())


def test_an_expected_error_is_one_line_and_exit_code_1(run, fake):
    fake.refuse("/me", 503, times=3, error="unavailable: the database\nis away", code="unavailable")
    result = run("whoami")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: the database is away\n"


def test_an_unexpected_error_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(main_module, "_load", lambda *_: 1 / 0)
    assert isinstance(run("whoami").exception, ZeroDivisionError)


def test_a_missing_extra_names_its_cure(run, monkeypatch):
    def load(*_):
        raise ModuleNotFoundError("No module named 'ray'", name="ray.serve")

    monkeypatch.setattr(main_module, "_load", load)
    result = run("up")
    assert result.exit_code == 1
    assert result.stderr == "error: this needs ray, which is not installed: pip install 'arkor-ray[all]'\n"


def test_the_module_can_be_run():
    run = subprocess.run([sys.executable, "-m", "arkor_ray.cli.main", "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()[0]) == (0, "arkor-ray")
