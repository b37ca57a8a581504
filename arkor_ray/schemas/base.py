"""The two kinds of model: tolerant on the wire, strict in users' own files."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError
from pydantic.alias_generators import to_camel

from arkor_ray.errors import InvalidRequestError


class WireModel(BaseModel):
    """A body of the HTTP contract: camelCase in JSON, unknown fields kept and echoed."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="allow", protected_namespaces=(), allow_inf_nan=True
    )

    def to_wire(self) -> dict[str, Any]:
        """JSON-ready dict in the wire's spelling; fields that were never set stay absent."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class StoredModel(BaseModel):
    """What we write to storage and read back: snake_case, unknown fields refused, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def iso(moment: datetime) -> str:
    """ISO 8601 with milliseconds and `Z`, the form the TypeScript client expects."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# PostgreSQL's texts have no NUL, and half a surrogate pair is no UTF-8.
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(text: str) -> str:
    """`text` as every database takes it, with U+FFFD for characters that it would refuse: an error may quote anything."""
    return UNSTORABLE.sub("\ufffd", text)


def _aware(value: Any) -> Any:
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=UTC)
    return value


Timestamp = Annotated[datetime, BeforeValidator(_aware), PlainSerializer(iso, return_type=str, when_used="json")]


def utcnow() -> datetime:
    return datetime.now(UTC)


def invalid_request(error: ValidationError, *, prefix: str = "") -> InvalidRequestError:
    """One sentence out of pydantic's first finding: the field in the wire's spelling, the value, the reason."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    field = prefix + ".".join(str(part) for part in first["loc"] if not _is_union_tag(str(part)))
    if not first["loc"]:  # a rule about several fields: its sentence names them, the first one first
        return InvalidRequestError(f"{prefix}{reason}", param=prefix + reason.split(" ", 1)[0].strip(":,'"))
    value = repr(_without_secrets(first.get("input")))
    shown = "" if first["type"] == "missing" else f" (got {value if len(value) <= 80 else value[:77] + '...'})"
    if first["loc"][-1] in _SECRETS:
        shown = ""
    return InvalidRequestError(f"{field}: {reason}{shown}", param=field)


_SECRETS = frozenset(("token", "plaintext"))  # fields of requests whose values are shown to nobody
_IN_URL = re.compile(
    r"(?<=://)[^/?#\s@]*@|(?<=\?)[^\s'\"]+"
)  # a user with a password; a query, which may be a signature


def _without_secrets(value: Any) -> Any:
    """`value` as an error may show it: errors are printed, logged and pasted where requests are not."""
    if isinstance(value, dict):
        return {key: "…" if key in _SECRETS else _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return without_url_secrets(value) if isinstance(value, str) else value


def without_url_secrets(text: str) -> str:
    """`text` with "…" for the credentials and the queries of the URLs in it."""
    return _IN_URL.sub("…", text) if "://" in text else text


_UNION_TAGS = frozenset(("huggingface", "blob", "final", "checkpoint", "int", "float", "str", "bool"))


def _is_union_tag(part: str) -> bool:
    # pydantic names the branch of a union in `loc` ("function-wrap[...]", "StepSpec", "huggingface"); users know only fields.
    return "[" in part or part[:1].isupper() or part in _UNION_TAGS
