"""From the tokens of one generation to the items of its answer: text, and pieces of calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from arkor_ray.serving.text_stream import Detokenizer, StopMatcher
from arkor_ray.serving.tool_parsers import CallDelta, Piece, ToolParser


class AnswerReader:
    """Stop texts end content only: in the middle of a call they would leave arguments that nobody can read."""

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str], parser: ToolParser | None = None
    ) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stops = StopMatcher(stops)
        self._parser = parser
        self._items: list[dict[str, Any]] = []
        self.called = False
        """Whether the answer has a call."""

    def push(self, token: int) -> bool:
        """Reads a token that is no end token. True when a stop text has appeared: the answer ends before it."""
        text = self._detokenizer.push(token)
        return self._add([text] if self._parser is None else self._parser.push(text))

    def finish(self, *, complete: bool) -> bool:
        """Reads what is still held back; `complete` unless the answer was cut at its token limit. As `push`."""
        text = self._detokenizer.finish()
        stopped = self._add(
            [text] if self._parser is None else self._parser.push(text) + self._parser.finish(complete=complete)
        )
        if not stopped:
            self._add_text(self._stops.finish())
        return stopped

    def take(self) -> list[dict[str, Any]]:
        """The items since the last call of this, as `LLMServer.chat` yields them."""
        items, self._items = self._items, []
        return items

    def _add(self, pieces: list[Piece]) -> bool:
        for piece in pieces:
            if isinstance(piece, CallDelta):
                self._add_call(piece)
            else:
                text, stopped = self._stops.push(piece)
                self._add_text(text)
                if stopped:
                    return True
        return False

    def _add_text(self, text: str) -> None:
        if not text:
            return
        if self._items and self._items[-1]["type"] == "delta":
            self._items[-1]["text"] += text
        else:
            self._items.append({"type": "delta", "text": text})

    def _add_call(self, piece: CallDelta) -> None:
        self.called = True
        item: dict[str, Any] = {"type": "tool_call_delta", "index": piece.index, "arguments": piece.arguments}
        if piece.name is not None:
            # Nine letters and digits are what Mistral's templates accept as an id.
            item |= {"id": uuid.uuid4().hex[:9], "name": piece.name}
        elif self._items and self._items[-1].get("index") == piece.index:
            self._items[-1]["arguments"] += piece.arguments
            return
        self._items.append(item)
