"""Addresses as users and requests write them."""

from __future__ import annotations

import pytest

from arkor_ray.schemas.address import ip_address, is_loopback


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.255.0.9", "::1", "[::1]", "::ffff:127.0.0.1", "localhost", "LOCALHOST.", "a.b.localhost"],
)
def test_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "::ffff:10.0.0.1",
        "localhost.evil.example",
        "mylocalhost",
        "127.0.0.1.evil",
        "127.1",
    ],
)
def test_elsewhere(host: str) -> None:
    assert not is_loopback(host)


def test_names_are_no_addresses() -> None:
    assert ip_address("gpu-box") is None and ip_address("") is None
    assert str(ip_address("[fe80::1%eth0]")) == "fe80::1"
