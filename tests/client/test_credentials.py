from __future__ import annotations

import json
import stat

import pytest

from arkor_ray.client import Client
from arkor_ray.client.credentials import CredentialStore, normalise_url, project_slug
from arkor_ray.errors import AuthenticationError, InvalidRequestError, PermissionDeniedError
from tests.client.fake_service import URL

OTHER = "http://other.test"


def write(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def credentials(url, token, org):
    return {"mode": "anon", "token": token, "anonymousId": "a", "arkorCloudApiUrl": url, "orgSlug": org}


def test_without_credentials_a_token_is_minted_and_stored_as_the_typescript_sdk_does(client, fake, home, project_dir):
    client.list_jobs()
    path = home / "credentials.json"
    stored = json.loads(path.read_text())
    assert stored == {**credentials(URL, "token-1", "anon-1"), "anonymousId": stored["anonymousId"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    state = json.loads((project_dir / ".arkor" / "state.json").read_text())
    assert state == {"orgSlug": "anon-1", "projectSlug": "my-project", "projectId": fake.projects["anon-1"][0]["id"]}
    assert fake.projects["anon-1"][0]["name"] == "My_Project"


def test_the_next_client_uses_what_is_stored(client, fake, home, project_dir):
    client.list_jobs()
    fake.requests.clear()
    with Client(URL, home=home, project_dir=project_dir, transport=fake) as second:
        second.list_jobs()
    (request,) = fake.requests
    assert request.headers["Authorization"] == "Bearer token-1"
    assert dict(request.url.params) == {"orgSlug": "anon-1", "projectSlug": "my-project"}


def test_nothing_is_minted_before_a_token_is_needed(client, fake, home):
    client.healthz()
    client.cli_config()
    assert not home.exists()
    assert all("Authorization" not in request.headers for request in fake.requests)


def test_credentials_for_another_service_are_neither_sent_nor_overwritten(client, fake, home, project_dir):
    theirs, state = (
        credentials(OTHER, "secret", "their-org"),
        {"orgSlug": "their-org", "projectSlug": "p", "projectId": "1"},
    )
    write(home / "credentials.json", **theirs)
    write(project_dir / ".arkor" / "state.json", **state)
    client.list_jobs()
    assert all("secret" not in str(request.headers) for request in fake.requests)
    assert json.loads((home / "credentials.json").read_text()) == theirs
    assert json.loads((project_dir / ".arkor" / "state.json").read_text()) == state
    with Client(URL, home=home, project_dir=project_dir, transport=fake) as second:
        second.list_jobs()
    assert len(fake.tokens) == 1, "kept beside theirs, and found again"


def test_a_broken_credentials_file_is_left_alone(client, fake, home):
    home.mkdir(parents=True)
    (home / "credentials.json").write_text("{not json")
    client.list_jobs()
    assert (home / "credentials.json").read_text() == "{not json"


def test_oauth_credentials_are_used_with_the_organisation_of_the_state_file(client, fake, home, project_dir):
    token = fake.add_token("team")
    fake.projects["team"] = [{"id": "1", "slug": "p", "name": "p", "orgId": "o"}]
    write(home / "credentials.json", mode="oauth", accessToken=token, refreshToken="r", arkorCloudApiUrl=URL)
    write(project_dir / ".arkor" / "state.json", orgSlug="team", projectSlug="p", projectId="1")
    client.list_jobs()
    assert dict(fake.requests[-1].url.params) == {"orgSlug": "team", "projectSlug": "p"}


def test_a_token_given_by_hand_is_used_and_not_stored(fake, home, project_dir):
    token = fake.add_token("team")
    write(home / "credentials.json", **credentials(URL, "secret", "anon"))
    with Client(URL, token=token, home=home, project_dir=project_dir, transport=fake) as client:
        client.list_jobs()
    assert {request.headers.get("Authorization") for request in fake.requests} == {f"Bearer {token}"}
    assert dict(fake.requests[-1].url.params) == {"orgSlug": "team", "projectSlug": "my-project"}
    assert not (project_dir / ".arkor").exists()


def test_a_project_that_exists_is_taken(client, fake, home, project_dir):
    client.list_jobs()
    (project_dir / ".arkor" / "state.json").unlink()
    with Client(URL, home=home, project_dir=project_dir, transport=fake) as second:
        second.list_jobs()
    assert len(fake.projects["anon-1"]) == 1
    assert (project_dir / ".arkor" / "state.json").exists()


def test_a_state_file_of_another_organisation_is_refused_with_the_way_out(client, fake, home, project_dir):
    write(project_dir / ".arkor" / "state.json", orgSlug="someone", projectSlug="p", projectId="1")
    with pytest.raises(
        InvalidRequestError, match=r"state\.json belongs to the organisation 'someone'.*delete that file"
    ):
        client.list_jobs()


def test_a_rejected_token_names_its_file(client, fake, home):
    write(home / "credentials.json", **credentials(URL, "old", "anon"))
    with pytest.raises(AuthenticationError, match=r"credentials\.json; `arkor-ray login`"):
        client.list_jobs()


def test_sign_in_replaces_a_rejected_token(client, fake, home):
    write(home / "credentials.json", **credentials(URL, "old", "anon"))
    client.sign_in()
    assert client.list_jobs() == []
    assert json.loads((home / "credentials.json").read_text())["token"] == "token-1"


def test_the_token_that_a_sign_in_replaces_is_kept(client, home, caplog):
    client.list_jobs()
    client.sign_in()
    (kept,) = home.glob("credentials.json.*")
    assert json.loads(kept.read_text())["token"] == "token-1"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert CredentialStore(home).load(URL).token == client.session.token == "token-2"
    assert f"is kept in {kept}" in caplog.text
    CredentialStore(home).save(URL, "token-2", org_slug="anon-2", anonymous_id="a")
    assert list(home.glob("credentials.json.*")) == [kept]


def test_a_sign_in_that_fails_leaves_what_is_stored(client, fake, home):
    client.list_jobs()
    fake.refuse("/auth/anonymous", 403, code="forbidden")
    with pytest.raises(PermissionDeniedError):
        client.sign_in()
    assert CredentialStore(home).load(URL).token == "token-1"


def test_the_url_comes_from_the_argument_then_the_variable_then_the_file_then_this_machine(home, monkeypatch):
    monkeypatch.delenv("ARKOR_CLOUD_API_URL", raising=False)
    store = CredentialStore(home)
    assert store.base_url() == "http://127.0.0.1:8000"
    write(home / "credentials.json", **credentials(OTHER, "t", "o"))
    assert store.base_url() == OTHER
    monkeypatch.setenv("ARKOR_CLOUD_API_URL", "https://variable.test/")
    assert store.base_url() == "https://variable.test"
    assert store.base_url("http://argument.test/arkor//") == "http://argument.test/arkor"


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("HTTP://Host.Test:80/", "http://host.test"),
        ("https://h:443/x/", "https://h/x"),
        ("https://h:80", "https://h:80"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_one_service_has_one_spelling(url, normal):
    assert normalise_url(url) == normal


@pytest.mark.parametrize("url", ["host:8000", "ftp://h", "http://", "http://h:x"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InvalidRequestError):
        normalise_url(url)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("My Project", "my-project"),
        ("--a_b--", "a-b"),
        ("Ünï", "n"),
        ("...", "project"),
        ("", "project"),
        ("x", "x"),
        ("a" * 39 + " b", "a" * 39 + "-"),
    ],
)
def test_slugs_are_those_of_the_typescript_sdk(name, slug):
    assert project_slug(name) == slug
