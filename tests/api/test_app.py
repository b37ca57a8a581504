"""The application as a whole: what it brings in, and how it starts and ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fastapi import FastAPI

from arkor_ray.db import identities
from arkor_ray.db.session import Database

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("module", ["arkor_ray.api.app", "arkor_ray.api.ray_gateway"])
async def test_api_brings_in_neither_ray_nor_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(str({{'ray', 'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.strip() == "set()"


async def test_ending_application_writes_what_it_still_holds(app: FastAPI, db: Database) -> None:
    with db.write() as session:
        issued = identities.create_anonymous(session, days=1)
    async with app.router.lifespan_context(app):
        with db.read() as session:
            caller = identities.authenticate(session, issued.plaintext)
        app.state.services.last_used.note(caller.token_id)
    with db.read() as session:
        assert identities.authenticate(session, issued.plaintext).token_last_used_at is not None


async def test_use_that_is_noted_after_the_end_is_dropped(app: FastAPI, db: Database) -> None:
    with db.write() as session:
        caller = identities.authenticate(session, identities.create_anonymous(session, days=1).plaintext)
    app.state.services.last_used.close()
    app.state.services.last_used.note(caller.token_id)
