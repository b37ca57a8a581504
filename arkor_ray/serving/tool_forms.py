"""What stands between the marks of a call, in each family's form. All raise ValueError for what is no call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

#: The function's name, and its arguments as JSON text.
Call = tuple[str, str]


def read_json(body: str) -> list[Call]:
    return [_call(_JSON.decode(body))]


def read_mistral(body: str) -> list[Call]:
    body = body.strip()
    if body.startswith("["):
        return [_call(item) for item in _JSON.decode(body)]
    found = re.fullmatch(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*(\{.*\})", body, re.DOTALL)
    if found is None:
        raise ValueError("neither a list of calls nor a name and arguments")
    return [_call({"name": found[1], "arguments": _JSON.decode(found[2])})]


def read_objects(text: str) -> list[Call]:
    calls, at = [], 0
    while at < len(text):
        item, at = _JSON.raw_decode(text, at)
        calls.append(_call(item))
        at += len(text[at:]) - len(text[at:].lstrip("; \t\r\n"))
    return calls


def read_gemma(body: str) -> list[Call]:
    found = re.fullmatch(r"\s*call:\s*([\w.-]+)\s*(\{.*\})\s*", body, re.DOTALL)
    if found is None:
        raise ValueError("not call:name{…}")
    return [(found[1], _json_text(_GemmaValue(found[2]).read()))]


def _call(item: Any) -> Call:
    """A call written as JSON."""
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ValueError("not a call")
    arguments = item.get("arguments", item.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are not an object")
    return item["name"], _json_text(arguments)


def _json_text(arguments: Any) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity
    text.encode()  # raises for half a surrogate pair, which could not be sent
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


class _GemmaValue:
    """Gemma 4's own way to write a value: JSON, but for names without quotes and texts between `<|"|>`."""

    _QUOTE = '<|"|>'
    _NAME = re.compile(r'\s*(?:<\|"\|>(.*?)<\|"\|>|"((?:[^"\\]|\\.)*)"|([^:,{}\[\]\s"]+))\s*:', re.DOTALL)
    _BARE = re.compile(r"[^,{}\[\]\s]+")

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> Any:
        value = self._value()
        if self._text[self._at :].strip():
            raise ValueError("more after the value")
        return value

    def _value(self) -> Any:
        if self._take(self._QUOTE):
            end = self._text.find(self._QUOTE, self._at)
            if end < 0:
                raise ValueError("a text without an end")
            value, self._at = self._text[self._at : end], end + len(self._QUOTE)
            return value
        if self._take("{"):
            return dict(self._items("}", self._pair))
        if self._take("["):
            return self._items("]", self._value)
        if self._text.startswith('"', self._at):
            value, self._at = _JSON.raw_decode(self._text, self._at)
            return value
        bare = self._BARE.match(self._text, self._at)
        if bare is None:
            raise ValueError("no value")
        self._at = bare.end()
        return _JSON.decode(bare[0])

    def _items(self, close: str, item: Callable[[], Any]) -> list[Any]:
        found: list[Any] = []
        while not self._take(close):
            if found and not self._take(","):
                raise ValueError(f"neither , nor {close}")
            found.append(item())
        return found

    def _pair(self) -> tuple[str, Any]:
        name = self._NAME.match(self._text, self._at)
        if name is None:
            raise ValueError("no name")
        self._at = name.end()
        return next(part for part in name.groups() if part is not None), self._value()

    def _take(self, token: str) -> bool:
        """Steps over white space, and over `token` if it comes next."""
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True
