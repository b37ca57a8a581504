"""The application that `serve deploy` names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import serve
from sqlalchemy.exc import OperationalError

from arkor_ray.api import serve_app
from arkor_ray.db.session import Database


@pytest.mark.parametrize(("said", "anonymous"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_serves_config_may_let_anybody_in_so_tokens_for_anybody_must_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, anonymous: bool
) -> None:
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("ARKOR_RAY_ANONYMOUS", raising=False)
    if said is not None:
        monkeypatch.setenv("ARKOR_RAY_ANONYMOUS", said)
    monkeypatch.setattr(serve_app, "check_ray", lambda settings: None)
    monkeypatch.setattr(serve_app, "ensure_controller", lambda settings: None)
    monkeypatch.setattr(serve_app, "build_api", lambda settings, **spread: settings)
    assert serve_app.application({}).anonymous is anonymous


class LateDatabase:
    """Not there for the first questions."""

    def __init__(self, away: int) -> None:
        self.away, self.migrated = away, False

    def migrate(self) -> None:
        if self.away:
            self.away -= 1
            raise OperationalError("connect", {}, Exception("Connection refused"))
        self.migrated = True


def test_a_database_that_comes_later_than_the_api_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "DATABASE_AGAIN_S", 0.01)
    late = LateDatabase(away=5)
    serve_app.migrate_when_there(late)
    assert late.migrated
    with pytest.raises(OperationalError, match="Connection refused"):
        serve_app.migrate_when_there(LateDatabase(away=1000), patience_s=0.05)


class Followers:
    def __init__(self) -> None:
        self.interruptions = 0

    def interrupt(self) -> None:
        self.interruptions += 1


def test_streams_end_once_when_serve_asks_no_more_how_this_replica_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve_app, "UNASKED_S", 2.0)
    monkeypatch.setattr(serve_app, "WATCH_S", 0.02)
    tail, db = Followers(), Database(f"sqlite:///{tmp_path / 'arkor.db'}")
    api = serve_app.Api()
    api.app = SimpleNamespace(state=SimpleNamespace(services=SimpleNamespace(tail=tail, db=db)))

    async def asked_for(seconds: float) -> int:
        for _ in range(int(seconds / 0.1)):
            await api.check_health()
            await asyncio.sleep(0.1)
        return tail.interruptions

    async def main() -> list[int]:
        seen = [await asked_for(2.5)]
        await asyncio.sleep(3.0)
        seen.append(tail.interruptions)
        seen.append(await asked_for(0.5))
        await asyncio.sleep(3.0)
        return [*seen, tail.interruptions]

    assert asyncio.run(main()) == [0, 1, 1, 2]
    db.close()


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, str]], serve.Deployment]:
    """The deployment that Serve is given for these arguments of the config."""
    monkeypatch.setenv("ARKOR_RAY_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(serve_app, "check_ray", lambda settings: None)
    monkeypatch.setattr(serve_app, "ensure_controller", lambda settings: None)
    return lambda args: serve_app.application(args)._bound_deployment


def test_replicas_are_as_many_as_the_config_says_and_share_no_node_where_it_says_so(deployed) -> None:
    alone, spread = deployed({}), deployed({"num_replicas": "3", "max_replicas_per_node": "1"})
    assert (alone.num_replicas, alone._replica_config.max_replicas_per_node) == (1, None)
    assert (spread.num_replicas, spread._replica_config.max_replicas_per_node) == (3, 1)


def test_a_replica_is_replaced_before_it_ends_unless_the_next_one_needs_its_place(deployed) -> None:
    alone, spread = deployed({"release": "2"}), deployed({"num_replicas": "3", "max_replicas_per_node": "1"})
    assert [each._deployment_config.max_surge_percent for each in (alone, spread)] == [100, 0]


@pytest.mark.parametrize(
    ("name", "said"), [("num_replicas", "0"), ("max_replicas_per_node", "one"), ("max_replicas_per_nod", "1")]
)
def test_an_argument_that_is_no_count_or_has_no_meaning_is_refused_by_its_name(deployed, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=name):
        deployed({name: said})
