"""What `arkor-ray up` looks at before it makes or starts anything."""

from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner, Result

from arkor_ray.cli import up as up_module
from arkor_ray.cli.main import app
from arkor_ray.embedded import Instance, free_ports
from arkor_ray.settings import DEMO_BASE, Settings


@pytest.fixture(autouse=True)
def no_demo_base(monkeypatch):
    monkeypatch.setattr(up_module, "_demo_base", lambda cache: pytest.fail("the demo base was made"))


def up(*options: object) -> Result:
    return CliRunner().invoke(app, ["up", *map(str, options)])


def test_a_taken_port_is_told_before_anything_is_made(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = up("--data-dir", tmp_path / "data", "--port", taken.getsockname()[1])
    assert refused.exit_code == 1
    assert "choose another port" in refused.stderr
    assert not (tmp_path / "data").exists()


def test_of_a_directory_that_is_in_use_it_is_told_who_runs_there_and_not_that_the_port_is_taken(tmp_path):
    with Instance(tmp_path), socket.create_server(("127.0.0.1", 0)) as taken:
        refused = up("--data-dir", tmp_path, "--port", taken.getsockname()[1])
    assert "arkor-ray down" in refused.stderr


def test_a_database_that_is_away_is_told_before_the_demo_base_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_DATABASE_URL", f"postgresql://arkor@127.0.0.1:{free_ports(1)[0]}/arkor")
    refused = up("--data-dir", tmp_path, "--port", 0)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ARKOR_RAY_DATABASE_URL: ")


def test_the_demo_base_joins_what_was_set(tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(up_module, "_demo_base", lambda cache: tmp_path)
    settings = Settings.load(data_dir=tmp_path, models="a/b=c/d", catalogue="{models: [{name: e/f}]}", port=4321)
    with_base = up_module._with_demo_base(settings)
    assert with_base.model_names() == ["e/f", "a/b", DEMO_BASE]
    assert with_base.model_copy(update={"models": settings.models}) == settings
    assert up_module._with_demo_base(with_base) is with_base
