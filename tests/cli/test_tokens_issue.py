"""The operator's way to a first token, against a real database."""

from __future__ import annotations

from typer.testing import CliRunner

from arkor_ray.cli.tokens import app
from arkor_ray.db import identities
from arkor_ray.db.session import Database


def test_a_token_issued_on_the_machine_opens_the_service(tmp_path):
    done = CliRunner().invoke(app, ["issue", "laptop", "--org", "acme", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    db = Database(f"sqlite:///{tmp_path / 'arkor.db'}")
    with db.read() as session:
        caller = identities.authenticate(session, done.stdout.strip().splitlines()[-1])
    assert caller.identity_id


def test_a_bad_organisation_is_refused_by_name(tmp_path):
    done = CliRunner().invoke(app, ["issue", "laptop", "--org", "Not A Slug", "--data-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "orgSlug" in str(done.exception)
