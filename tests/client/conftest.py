from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arkor_ray.client import Client
from arkor_ray.client import event_stream as stream_module
from arkor_ray.client import retry as retry_module
from arkor_ray.client import training_run as run_module
from tests.client.fake_service import URL, FakeService


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """A service, and clients that do not wait before they try again."""
    monkeypatch.setattr(stream_module, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(retry_module, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(run_module, "CALLBACK_DELAY", 0.0)
    monkeypatch.delenv("ARKOR_CLOUD_API_URL", raising=False)
    return FakeService()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".arkor"


@pytest.fixture
def project_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "My_Project"
    directory.mkdir()
    return directory


@pytest.fixture
def client(fake: FakeService, home: Path, project_dir: Path) -> Iterator[Client]:
    with Client(URL, home=home, project_dir=project_dir, transport=fake, max_retries=0) as client:
        yield client
