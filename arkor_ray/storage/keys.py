"""What may be a key: the same rules for every store, so that what works on a laptop works on S3."""

from __future__ import annotations

# S3 allows 1024 bytes; the rest is for the prefix of the storage URL.
MAX_KEY_BYTES = 900


def check_key(key: str) -> str:
    """Returns `key`, or raises `ValueError`: a key is a relative path of ordinary names joined by "/".

    Names that begin with a dot are refused. That keeps "." and ".." out, hence every key inside its store, and leaves
    such names to the stores for their own use.
    """
    if not key or key.endswith("/"):
        raise ValueError(f"{key!r} is no object key: it names no object.")
    _check_names(key, key)
    return key


def check_prefix(prefix: str) -> str:
    """Returns `prefix`, or raises `ValueError` unless it begins keys that `check_key` would accept. "" is a prefix."""
    if prefix:
        _check_names(prefix.removesuffix("/"), prefix)
    return prefix


def check_folder(prefix: str) -> str:
    """Like `check_prefix` for a whole folder: not empty, and with its "/" at the end.

    Without that, `job-step-1` would also mean `job-step-10`, and "" everything there is.
    """
    if not prefix.endswith("/"):
        raise ValueError(f"{prefix!r} names no folder: it must end with '/'.")
    return check_prefix(prefix)


def _check_names(path: str, shown: str) -> None:
    if len(path.encode("utf-8", "surrogatepass")) > MAX_KEY_BYTES:
        raise ValueError(f"{shown[:60]!r}... is no object key: it is longer than {MAX_KEY_BYTES} bytes.")
    if "\\" in path or not path.isprintable():
        raise ValueError(f"{shown!r} is no object key: it has a backslash or a character that cannot be printed.")
    for name in path.split("/"):
        if not name or name.startswith(".") or len(name.encode()) > 255:
            raise ValueError(f"{shown!r} is no object key: {name[:60]!r} is empty, too long or begins with a dot.")
