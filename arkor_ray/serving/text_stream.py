"""From tokens to text as they come: never half a character, never a part of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 64  # tokens without a readable character; more than any character has


class Detokenizer:
    """Turns tokens into pieces of text whose concatenation is the decoded whole.

    A token can hold a part of a character, and some tokenizers drop a leading space of whatever they decode. So each piece
    is the difference between two decodings that begin at the same earlier token.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # decoding begins here...
        self._shown = 0  # ...and the text of the tokens before this one has been given out

    def push(self, token: int) -> str:
        """The text that became readable with this token, often but not always its own."""
        self._ids.append(token)
        before, now = self._before(), self._decode(self._ids[self._context :])
        stuck = len(self._ids) - self._shown > _MAX_PENDING
        if len(now) <= len(before) or (now.endswith(_REPLACEMENT) and not stuck):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left at the end, without a character that never became whole."""
        before, now = self._before(), self._decode(self._ids[self._context :])
        self._context = self._shown = len(self._ids)
        return now[len(before) :].rstrip(_REPLACEMENT)

    def _before(self) -> str:
        return self._decode(self._ids[self._context : self._shown])


class StopMatcher:
    """Passes text on until one of the stop texts appears in it, wherever the pieces are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certainly before any stop text, and whether one has appeared: then nothing follows."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            out, self._held = self._held[: min(found)], ""
            return out, True
        keep = max(overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def finish(self) -> str:
        """What was held back because it might have become a stop text."""
        out, self._held = self._held, ""
        return out


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
