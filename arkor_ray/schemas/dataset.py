"""Where a job's rows come from, what shape they have, and how many are held out for evaluation."""

from __future__ import annotations

import ipaddress
from pathlib import PurePath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator

from arkor_ray.schemas.base import WireModel

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_METADATA = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "fd00:ec2::254", "fd20:ce::254")))
_UNICAST = ipaddress.ip_network("2000::/3")  # what of IPv6 is given out to the public internet

DatasetFormatName = Literal["chatml", "sharegpt", "alpaca", "prompt_completion", "text"]

# The wire's names, and the names under which Hugging Face tools know the same formats.
FORMAT_ALIASES: dict[str, DatasetFormatName] = {
    "chatml": "chatml",
    "messages": "chatml",
    "openai": "chatml",
    "sharegpt": "sharegpt",
    "conversations": "sharegpt",
    "alpaca": "alpaca",
    "prompt_completion": "prompt_completion",
    "prompt-completion": "prompt_completion",
    "text": "text",
}


class HuggingFaceSource(WireModel):
    """A data set of the Hub. `split` goes to `load_dataset` untouched, slices such as `train[:500]` included."""

    type: Literal["huggingface"]
    name: str = Field(min_length=1)
    split: str | None = None
    subset: str | None = None


class BlobSource(WireModel):
    """A file fetched once, when the job first starts; `token` is sent as a bearer token and never shown again."""

    type: Literal["blob"]
    url: str
    token: str | None = Field(default=None, repr=False)

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("must not have control characters")
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https", "file"):
            raise ValueError("must be an http://, https:// or file:// URL")
        if parts.scheme != "file" and not parts.hostname:
            raise ValueError("must name a host")
        if parts.username or parts.password:
            raise ValueError("must not carry credentials; put them into datasetSource.token")
        if parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
            raise ValueError("a file:// URL must be file:///absolute/path")
        return value


DatasetSource = Annotated[HuggingFaceSource | BlobSource, Field(discriminator="type")]


def _format_name(value: Any) -> Any:
    if isinstance(value, dict):
        value = value.get("type")
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in FORMAT_ALIASES:
        known = ", ".join(sorted(FORMAT_ALIASES))
        raise ValueError(f"must be one of {known}, as a string or as {{'type': …}}, or absent to detect it")
    return FORMAT_ALIASES[value.lower()]


DatasetFormat = Annotated[DatasetFormatName | None, BeforeValidator(_format_name)]


class HoldOut(WireModel):
    """The wire's `datasetSplit` object: which share of the rows is kept from training for evaluation."""

    enabled: bool = False
    test_size: float = Field(default=0.1, gt=0, lt=1)
    seed: int = Field(default=42, ge=0, lt=2**32)


def is_local_path(text: str) -> bool:
    """Whether what names a data set is a file, as far as its form tells."""
    known = PurePath(text).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt")
    return "://" not in text and (text.startswith((".", "/", "~")) or known)


def is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address, also one that wraps another (mapped, 6to4, Teredo, NAT64), is of the public internet."""
    address = _unwrapped(address)
    if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not address.is_multicast


def is_metadata_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether a cloud may keep a machine's own credentials there, for whoever asks from that machine."""
    address = _unwrapped(address)
    return address.is_link_local or address in _METADATA


def _unwrapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        return inner or address
    return address
