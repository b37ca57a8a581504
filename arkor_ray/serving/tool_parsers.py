"""Calls of tools in what a model writes, each family in its own form. Text in, wherever it is cut; content and calls out.

| form    | a call                                                       | known by, in the chat template |
| ------- | ------------------------------------------------------------ | ------------------------------ |
| Hermes  | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`       | `<tool_call>`, `arguments`     |
| Gemma 4 | `<|tool_call>call:name{key:<|"|>text<|"|>,n:1}<tool_call|>`  | `<|tool_call>`                 |
| Mistral | `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, later         | `[TOOL_CALLS]`                 |
|         | `[TOOL_CALLS]name[ARGS]{…}`                                  |                                |
| Llama 3 | `{"name": …, "parameters": {…}}`, the whole answer           | `ipython`, `"parameters"`      |

A call is told once it is whole. What looks like one and cannot be read, or names a tool that was not offered, is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from arkor_ray.serving.text_stream import overlap


@dataclass(frozen=True)
class CallDelta:
    """A piece of the call number `index`: its name, which comes first and once, or more of its arguments' JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""


Piece = str | CallDelta


class ToolParser(Protocol):
    #: Special tokens that must stay visible in the text it reads.
    markers: tuple[str, ...]

    def push(self, text: str) -> list[Piece]:
        """What has become certain with this text."""

    def finish(self, *, complete: bool) -> list[Piece]:
        """The rest. `complete` is False when the answer was cut at its token limit."""


def parser_for(template: str, names: Collection[str]) -> ToolParser | None:
    """For a model with this chat template and the tools on offer; None when the template shows no form known here."""
    if "<|tool_call>" in template and "<tool_call|>" in template:
        return MarkedCalls("<|tool_call>", "<tool_call|>", _read_gemma, names, quote='<|"|>')
    if "[TOOL_CALLS]" in template:
        return MarkedCalls("[TOOL_CALLS]", None, _read_mistral, names, markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"))
    # The same tags are put around other forms as well: XML in Qwen3-Coder and GLM-4.5.
    if "<tool_call>" in template and "arguments" in template and not re.search("<function=|<arg_key>", template):
        return MarkedCalls("<tool_call>", "</tool_call>", _read_json, names)
    if "ipython" in template and '"parameters"' in template.replace("\\", ""):
        return WholeAnswer(names)
    return None


class ForcedCall:
    """The one call that a `tool_call` constraint leaves room for; its arguments are told as they come."""

    markers: tuple[str, ...] = ()
    _HEAD = re.compile(r'\{"name": "([^"]*)", "arguments": ')

    def __init__(self) -> None:
        self._held = ""
        self._named = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        out: list[Piece] = []
        if not self._named:
            head = self._HEAD.match(self._held)
            if head is None:
                return out
            self._named, self._held = True, self._held[head.end() :]
            out.append(CallDelta(0, head[1]))
        # The last character may be the brace that closes the call, which is none of the arguments'.
        if len(self._held) > 1:
            out.append(CallDelta(0, arguments=self._held[:-1]))
            self._held = self._held[-1]
        return out

    def finish(self, *, complete: bool) -> list[Piece]:
        if not self._named:
            return [self._held] if self._held else []
        return [] if complete or not self._held else [CallDelta(0, arguments=self._held)]


class MarkedCalls:
    """Calls between two markers, or after a marker up to the next one or the end."""

    def __init__(
        self,
        begin: str,
        end: str | None,
        read: Callable[[str], list[tuple[str, str]]],
        names: Collection[str],
        *,
        quote: str = '"',
        markers: tuple[str, ...] = (),
    ) -> None:
        self.markers = markers or (begin, *([end] if end else []), *([quote] if len(quote) > 1 else []))
        self._begin, self._end, self._read, self._names, self._quote = begin, end, read, names, quote
        self._held = ""
        self._inside = False
        self._space = ""  # before the held call; content only if the call turns out to be
        self._searched = 0  # how much of the held call has no end that counts
        self._calls = 0

    def push(self, text: str) -> list[Piece]:
        self._held += text
        out: list[Piece] = []
        while self._advance(out):
            pass
        return out

    def finish(self, *, complete: bool) -> list[Piece]:
        out: list[Piece] = []
        if self._inside:
            if self._end is None and complete:
                self._tell(self._held, self._begin + self._held, out)
            else:
                out.append(self._space + self._begin + self._held)
        elif self._held and not (self._calls and not self._held.strip()):
            out.append(self._held)
        self._held, self._inside = "", False
        return out

    def _advance(self, out: list[Piece]) -> bool:
        """Takes one step through what is held; False when it needs more text."""
        if not self._inside:
            at = self._held.find(self._begin)
            if at >= 0:
                before, self._held = self._held[:at], self._held[at + len(self._begin) :]
                content = before.rstrip()
                self._space = before[len(content) :]
                if content:
                    out.append(content)
                self._inside, self._searched = True, 0
                return True
            # White space belongs to the content only if content follows.
            sure = self._held[: len(self._held) - overlap(self._held, self._begin)].rstrip()
            if sure:
                out.append(sure)
                self._held = self._held[len(sure) :]
            return False
        close = self._end or self._begin
        at = self._held.find(close, self._searched)
        if at < 0:
            self._searched = max(self._searched, len(self._held) - len(close) + 1)
            return False
        body = self._held[:at]
        if _ends_in_quotes(body, self._quote):
            self._searched = at + 1
            return True
        whole = self._begin + body + (self._end or "")
        self._held = self._held[at + len(self._end) :] if self._end else self._held[at:]
        self._inside = False
        self._tell(body, whole, out)
        return True

    def _tell(self, body: str, whole: str, out: list[Piece]) -> None:
        try:
            calls = self._read(body)
        except (ValueError, RecursionError):
            calls = []
        if not calls or any(name not in self._names for name, _ in calls):
            out.append(self._space + whole)
            return
        for name, arguments in calls:
            out += [CallDelta(self._calls, name), CallDelta(self._calls, arguments=arguments)]
            self._calls += 1


class WholeAnswer:
    """Llama's calls: one JSON object after another and nothing else, perhaps after `<|python_tag|>`."""

    markers: tuple[str, ...] = ("<|python_tag|>",)
    _TAG = "<|python_tag|>"
    _BEGINNINGS = tuple(f'{{"{key}"' for key in ("name", "type", "parameters", "arguments"))

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._content = False

    def push(self, text: str) -> list[Piece]:
        if self._content:
            return [text] if text else []
        self._held += text
        if self._may_be_calls():
            return []
        self._content, held, self._held = True, self._held, ""
        return [held]

    def finish(self, *, complete: bool) -> list[Piece]:
        held, self._held = self._held, ""
        try:
            calls = _read_objects(held.strip().removeprefix(self._TAG)) if complete else []
        except (ValueError, RecursionError):
            calls = []
        if not calls or any(name not in self._names for name, _ in calls):
            return [held] if held else []
        return [
            delta
            for i, (name, arguments) in enumerate(calls)
            for delta in (CallDelta(i, name), CallDelta(i, arguments=arguments))
        ]

    def _may_be_calls(self) -> bool:
        text = self._held.lstrip()
        if text.startswith(self._TAG):
            text = text[len(self._TAG) :].lstrip()
        elif self._TAG.startswith(text):
            return True
        text = re.sub(r"^\{\s+", "{", text)
        return any(text.startswith(beginning) or beginning.startswith(text) for beginning in self._BEGINNINGS)


def _ends_in_quotes(text: str, quote: str) -> bool:
    if quote == '"':
        text = re.sub(r"\\.", "", text, flags=re.DOTALL)
    return text.count(quote) % 2 == 1


def _read_json(body: str) -> list[tuple[str, str]]:
    return [_call(_JSON.decode(body))]


def _read_mistral(body: str) -> list[tuple[str, str]]:
    body = body.strip()
    if body.startswith("["):
        return [_call(item) for item in _JSON.decode(body)]
    found = re.fullmatch(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*(\{.*\})", body, re.DOTALL)
    if found is None:
        raise ValueError("neither a list of calls nor a name and arguments")
    return [_call({"name": found[1], "arguments": _JSON.decode(found[2])})]


def _read_objects(text: str) -> list[tuple[str, str]]:
    calls, at = [], 0
    while at < len(text):
        item, at = _JSON.raw_decode(text, at)
        calls.append(_call(item))
        at += len(text[at:]) - len(text[at:].lstrip("; \t\r\n"))
    return calls


def _call(item: Any) -> tuple[str, str]:
    """Name and arguments, as JSON text, of a call written as JSON. Raises ValueError when it is none."""
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ValueError("not a call")
    arguments = item.get("arguments", item.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are not an object")
    return item["name"], _json_text(arguments)


def _json_text(arguments: Any) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    text.encode()  # raises for half a surrogate pair, which could not be sent
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_gemma(body: str) -> list[tuple[str, str]]:
    found = re.fullmatch(r"\s*call:\s*([\w.-]+)\s*(\{.*\})\s*", body, re.DOTALL)
    if found is None:
        raise ValueError("not call:name{…}")
    return [(found[1], _json_text(_GemmaValue(found[2]).read()))]


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
