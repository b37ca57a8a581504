"""The application that `serve deploy` names."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkor_ray.api import serve_app


@pytest.mark.parametrize(("said", "anonymous"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_serves_config_may_let_anybody_in_so_tokens_for_anybody_must_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, anonymous: bool
) -> None:
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("ARKOR_RAY_ANONYMOUS", raising=False)
    if said is not None:
        monkeypatch.setenv("ARKOR_RAY_ANONYMOUS", said)
    monkeypatch.setattr(serve_app, "ensure_controller", lambda settings: None)
    monkeypatch.setattr(serve_app, "build_api", lambda settings, num_replicas: settings)
    assert serve_app.application({}).anonymous is anonymous
