"""Addresses of machines, as users and HTTP requests write them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` spells in the usual form, an IPv6 one with or without brackets; None for a name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]").partition("%")[0])
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether `host` leads to the machine it is used on, by what it says alone: nothing is looked up."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = ip_address(name)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped.is_loopback
    return address is not None and address.is_loopback


def check_web_address(url: str, *, example: str) -> str:
    """`url` as it is. Raises ValueError with a sentence to put behind its name, where it is not http(s)://HOST and
    whatever may follow a host. What is taken for a password is not shown."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is none, a bracket that is open
        sound = False
    if "@" in url:
        raise ValueError(
            f"The URL must hold no user and no password, as it is shown to people: write it as in {example}"
        )
    if not sound or any(character.isspace() for character in url):
        raise ValueError(f"{url!r} must begin with http:// or https:// and name a host, as in {example}")
    return url


def check_s3_endpoint(url: str) -> str:
    """As `check_web_address`, for the endpoint of an S3 service."""
    if "@" in url:
        raise ValueError("The URL must hold no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return check_web_address(url, example="http://127.0.0.1:9000")
