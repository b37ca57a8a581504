"""Secrets that everybody knows keep a cluster from starting; what is no secret, or comes from elsewhere, does not."""

from __future__ import annotations

import pytest

from arkor_ray.placeholders import database_passwords, is_placeholder, shown_database_url, weak_secrets

GOOD = "k7Qv2mR9xT4w"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "AKIA7", "AWS_SECRET_ACCESS_KEY": GOOD}


def weak(url: str = f"postgresql://arkor:{GOOD}@db/arkor", *, s3: bool = True, **environment: str) -> list[str]:
    return list(weak_secrets(url, s3=s3, environment={**S3_KEYS, **environment}))


@pytest.mark.parametrize(
    "secret",
    [
        "", " ", "password", "Password", "PASSWORD", "change-me", "CHANGE_ME", "changeme!", "change.me", "<password>",
        "${PASSWORD}", "$PASSWORD", "'secret'", "postgres", "minioadmin", "minio123", "your-password", "your_secret", "xxxx",
        "123456", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "Arkor-Ray",
    ],
)  # fmt: skip
def test_a_secret_of_examples_is_a_placeholder_in_any_spelling(secret: str) -> None:
    assert is_placeholder(secret)


@pytest.mark.parametrize(
    "secret", [GOOD, "correct horse battery staple", "password-of-the-night-7Qx", "testing-4-real"]
)
def test_a_secret_of_ones_own_is_none(secret: str) -> None:
    assert not is_placeholder(secret)


def test_the_users_own_name_is_no_password() -> None:
    assert is_placeholder("Billing", "billing") and not is_placeholder("billing")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://arkor:password@db/arkor",
        "postgresql://arkor:change%2Dme@db/arkor",
        "postgresql://billing:billing@db/arkor",
        "postgresql://arkor:@db/arkor",
        "postgresql+psycopg://arkor@db/arkor?password=secret",
        "postgresql://arkor@db/arkor?password=",
        "postgresql://arkor:change-me@one:5432,[::1]:5432/arkor",
        "postgresql://billing@one:5432,two:5432/arkor?password=billing",
    ],
)
def test_the_databases_placeholder_is_told_by_the_variable_and_not_shown(url: str) -> None:
    [sentence] = weak(url)
    assert sentence.startswith("ARKOR_RAY_DATABASE_URL has a password")
    assert "change" not in sentence and "billing" not in sentence and "secret" not in sentence


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://arkor@db/arkor",
        "postgresql://db/arkor",
        "postgresql:///arkor?host=/run/postgresql",
        f"postgresql://arkor:{GOOD}@db/arkor",
        f"postgresql://arkor:{GOOD}@one:5432,[::1]:5432/arkor",
        f"postgresql://arkor@db/arkor?password={GOOD}&sslmode=require",
    ],
)
def test_a_database_without_a_password_has_other_means_and_is_no_concern(url: str) -> None:
    assert weak(url) == []


def test_the_password_that_libpq_reads_from_its_own_variable_counts_where_the_url_has_none() -> None:
    assert "PGPASSWORD" in weak("postgresql://arkor@db/arkor", PGPASSWORD="changeme")[0]
    assert weak("postgresql://arkor@db/arkor", PGPASSWORD=GOOD) == weak(PGPASSWORD="changeme") == []


@pytest.mark.parametrize(
    ("key", "secret"), [("minioadmin", "minioadmin"), ("AKIA7", "minio123"), ("ceph", "ceph"), ("AKIA7", "")]
)
def test_keys_of_images_are_refused_for_s3_alone(key: str, secret: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    assert weak(**keys)[0].startswith("AWS_SECRET_ACCESS_KEY")
    assert weak(**keys, s3=False) == []


def test_s3_by_a_role_or_a_profile_needs_no_keys() -> None:
    assert list(weak_secrets("postgresql://db/arkor", s3=True, environment={"AWS_PROFILE": "arkor"})) == []


def test_rays_own_token_is_looked_at_too() -> None:
    assert weak(RAY_AUTH_TOKEN="changeme")[0].startswith("RAY_AUTH_TOKEN")
    assert weak(RAY_AUTH_TOKEN="9f" * 32) == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://arkor:SECRET@db:5432/arkor", "postgresql://arkor:***@db:5432/arkor"),
        ("postgresql+psycopg://arkor:SEC/RET?#1@db/arkor?a=b", "postgresql+psycopg://arkor:***@db/arkor?a=b"),
        ("postgresql://arkor@db/arkor?password=SECRET", "postgresql://arkor@db/arkor?password=***"),
        ("postgresql://u@h/db?pass%77ord=SECRET&sslmode=require", "postgresql://u@h/db?pass%77ord=***&sslmode=require"),
        (
            "postgresql://u:SECRET@h/db?sslpassword=SECRET2&password=SECRET3",
            "postgresql://u:***@h/db?sslpassword=***&password=***",
        ),
        ("postgresql:///arkor?host=/run/postgresql", "postgresql:///arkor?host=/run/postgresql"),
        ("postgresql://u:SECRET@one:5432,two:5433/arkor", "postgresql://u:***@one:5432,two:5433/arkor"),
        ("postgresql://u@one:5432,two:5433/arkor", "postgresql://u@one:5432,two:5433/arkor"),
        ("sqlite:////data/arkor.db", "sqlite:////data/arkor.db"),
    ],
)
def test_of_a_databases_url_every_password_is_hidden_and_all_else_shown(url: str, shown: str) -> None:
    assert shown_database_url(url) == shown
    assert (database_passwords(url) == set()) is (url == shown)


def test_a_databases_passwords_are_known_as_they_stand_and_as_they_are_meant() -> None:
    assert database_passwords("postgresql://u:a%40b@h/db?password=c+d") == {"a%40b", "a@b", "c+d", "c d"}
