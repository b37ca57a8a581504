"""The application that `serve deploy` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ray import serve

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
    monkeypatch.setattr(serve_app, "build_api", lambda settings, **spread: settings)
    assert serve_app.application({}).anonymous is anonymous


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, str]], serve.Deployment]:
    """The deployment that Serve is given for these arguments of the config."""
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(serve_app, "ensure_controller", lambda settings: None)
    return lambda args: serve_app.application(args)._bound_deployment


def test_replicas_are_as_many_as_the_config_says_and_share_no_node_where_it_says_so(deployed) -> None:
    alone, spread = deployed({}), deployed({"num_replicas": "3", "max_replicas_per_node": "1"})
    assert (alone.num_replicas, alone._replica_config.max_replicas_per_node) == (1, None)
    assert (spread.num_replicas, spread._replica_config.max_replicas_per_node) == (3, 1)


@pytest.mark.parametrize(
    ("name", "said"), [("num_replicas", "0"), ("max_replicas_per_node", "one"), ("max_replicas_per_nod", "1")]
)
def test_an_argument_that_is_no_count_or_has_no_meaning_is_refused_by_its_name(deployed, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=name):
        deployed({name: said})
