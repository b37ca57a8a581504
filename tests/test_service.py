"""What `arkor-ray up` refuses before it starts anything."""

from __future__ import annotations

import pytest

from arkor_ray import service
from arkor_ray.embedded import free_ports
from arkor_ray.errors import ServiceUnavailableError
from arkor_ray.settings import Settings


def test_the_embedded_default_is_reachable(tmp_path):
    service.check_reachable(Settings.load(data_dir=tmp_path))


@pytest.mark.parametrize("form", ["arkor:secret@127.0.0.1:{}/arkor", "arkor@127.0.0.1:{}/arkor?password=secret"])
def test_a_database_that_is_away_is_named_without_its_password(tmp_path, form):
    url = "postgresql://" + form.format(*free_ports(1))
    with pytest.raises(ServiceUnavailableError, match=r"ARKOR_RAY_DATABASE_URL: .*refused") as raised:
        service.check_reachable(Settings.load(data_dir=tmp_path, database_url=url))
    assert "secret" not in raised.value.message


def test_of_several_databases_that_are_away_each_is_told(tmp_path):
    one, two = free_ports(2)
    url = f"postgresql://arkor:secret@127.0.0.1:{one},127.0.0.1:{two}/arkor"
    with pytest.raises(ServiceUnavailableError, match=rf"{one}.*refused.*{two}.*refused") as raised:
        service.check_database(Settings.load(data_dir=tmp_path, database_url=url))
    assert "secret" not in raised.value.message


def test_a_parameter_that_libpq_does_not_know_is_told(tmp_path):
    url = "postgresql://arkor:secret@127.0.0.1/arkor?target_session=read-write"
    with pytest.raises(ServiceUnavailableError, match=r"ARKOR_RAY_DATABASE_URL: .*target_session") as raised:
        service.check_database(Settings.load(data_dir=tmp_path, database_url=url))
    assert "secret" not in raised.value.message


def test_a_storage_that_does_not_answer_is_named_once_with_the_reason(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service, "STORAGE_ANSWER_S", 2.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.raises(ServiceUnavailableError, match=r"s3://bucket/x at http://127\.0\.0\.1.*Could not connect"):
        service.check_reachable(Settings.load(data_dir=tmp_path, storage_url="s3://bucket/x", s3_endpoint_url=endpoint))
    assert not caplog.records


def test_a_bucket_that_does_not_exist_is_named(tmp_path, moto_s3, monkeypatch):
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load(data_dir=tmp_path, storage_url="s3://nosuch/x")
    with pytest.raises(ServiceUnavailableError, match="nosuch"):
        service.check_reachable(settings)
