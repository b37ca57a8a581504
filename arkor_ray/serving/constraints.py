"""Constraints made ready for decoding: compiled by llguidance for one tokenizer, then asked for a mask at each token.

Users choose what is compiled, so everything here ends in bounded time and memory: the engine's limits are set low, and
its search for text that a grammar forces, which knows no limit, is switched off.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.json_schema import subschemas
from arkor_ray.serving.chat_tokenizer import ChatTokenizer
from arkor_ray.serving.single_flight import SingleFlight

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_LIMIT_S = 10.0
_GRAMMARS = 256
# A run of white space between two parts of a document; without a bound a model can go on with it for ever. Wide enough
# for a line break and the indentation of a deeply nested, pretty-printed document.
_WHITESPACE = r"[ \t\n\r]{0,64}"
_NO_LEAP_SECOND = r"^[^:]*:[0-5][0-9]:[0-5][0-9]([^0-9:].*)?$"
# After the user's text, so that line numbers in errors are theirs.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_DIALECTS = {
    "regex": " as a regular expression (Rust's syntax, without look-around)",
    "grammar": " as a Lark grammar (as llguidance reads it)",
}


class MatcherGrammar:
    """One request's way through a compiled constraint; implements `engine.interface.TokenGrammar`."""

    def __init__(self, compiled: _Compiled, field: str) -> None:
        self._matcher = compiled.matcher.deep_copy()
        self._mask = compiled.first_mask.copy()
        self._filled = True
        self._field = field

    def mask(self) -> npt.NDArray[np.int32]:
        if not self._filled:
            _fill(self._matcher, self._mask)
            self._filled = True
            self._check()
            if not self._mask.any():
                raise _refusal(self._field, "no token of this model continues the text so far")
        return self._mask

    def accept(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._filled = False
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._field, f"became too complex while decoding: {_reason(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles constraints off the event loop, and keeps the latest."""

    def __init__(self, *, kept: int = _GRAMMARS, time_limit_s: float = COMPILE_LIMIT_S) -> None:
        self._kept = kept
        self._time_limit_s = time_limit_s
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._flights: SingleFlight[_Compiled] = SingleFlight()
        self._vocabularies = _Vocabularies()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar-compiler")

    async def grammar(
        self, constraint: dict[str, Any], tokenizer: ChatTokenizer, end_ids: frozenset[int]
    ) -> MatcherGrammar:
        """A fresh grammar that allows the texts of `constraint` (as `schemas.constraint` has it), then an end token.

        Raises InvalidRequestError naming the constraint's field when it cannot be enforced, or not in bounded time.
        """
        field = constraint["field"]
        text = json.dumps({key: value for key, value in constraint.items() if key != "field"}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        loop = asyncio.get_running_loop()

        async def compile_it() -> _Compiled:
            return await loop.run_in_executor(self._threads, self._compile, digest, constraint, tokenizer, end_ids)

        try:
            # By the tokenizer's id as well, which is good as long as it lives, and the flight holds it.
            flight = self._flights.run(f"{id(tokenizer)} {digest}", compile_it)
            compiled = await asyncio.wait_for(flight, self._time_limit_s)
        except TimeoutError as error:
            raise _refusal(field, f"did not compile within {self._time_limit_s:g} s; make it simpler") from error
        except GrammarError as error:
            raise _refusal(error.field or field, str(error)) from error
        return MatcherGrammar(compiled, field)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(
        self, digest: str, constraint: dict[str, Any], tokenizer: ChatTokenizer, end_ids: frozenset[int]
    ) -> _Compiled:
        vocabulary = self._vocabularies.of(tokenizer, end_ids)
        key = f"{vocabulary.key} {digest}"
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            compiled = _compile(_to_lark(constraint), vocabulary, _DIALECTS.get(constraint["kind"], ""))
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            while len(self._compiled) > self._kept:
                self._compiled.popitem(last=False)
        return compiled


class GrammarError(ValueError):
    """A constraint that decoding cannot enforce; the message says why, `field` where it is not the constraint's own."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class _Compiled:
    """Never advanced itself; requests walk on copies."""

    matcher: LLMatcher
    first_mask: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """What llguidance knows of a tokenizer: the bytes of each token, and which tokens end an answer."""

    key: str
    tokenizer: LLTokenizer


class _Vocabularies:
    """One for all tokenizers that are the same but for their chat template: it takes a second and some memory to build."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[ChatTokenizer, _Vocabulary] = WeakKeyDictionary()
        self._by_key: WeakValueDictionary[str, _Vocabulary] = WeakValueDictionary()

    def of(self, tokenizer: ChatTokenizer, end_ids: frozenset[int]) -> _Vocabulary:
        """`end_ids` must be the same in each call for a tokenizer."""
        with self._lock:
            vocabulary = self._of.get(tokenizer)
            if vocabulary is None:
                vocabulary = self._of[tokenizer] = self._make(tokenizer, end_ids)
            return vocabulary

    def _make(self, tokenizer: ChatTokenizer, end_ids: frozenset[int]) -> _Vocabulary:
        from llguidance import LLTokenizer

        backend = tokenizer.backend()
        if backend is None:
            raise GrammarError("needs a model with a fast tokenizer, and this one has none")
        # An end token that the tokenizer does not know is one that a constrained answer cannot end with.
        known = [i for i in sorted(end_ids) if backend.id_to_token(i) is not None]
        if not known:
            raise GrammarError("needs a model with an end-of-sequence token, and this one has none")
        backend.no_padding()
        backend.no_truncation()
        text = backend.to_str()
        key = hashlib.sha256(f"{known} {text}".encode()).hexdigest()
        vocabulary = self._by_key.get(key)
        if vocabulary is None:
            vocabulary = self._by_key[key] = _Vocabulary(key, LLTokenizer(text, eos_token=known))
        return vocabulary


def _compile(lark: str, vocabulary: _Vocabulary, dialect: str = "") -> _Compiled:
    import numpy as np
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary.tokenizer, lark, log_level=0, limits=_limits())
    if matcher.is_error():
        raise GrammarError(f"cannot be enforced{dialect}: {_reason(matcher.get_error())}")
    # On a copy: what shows at the first token only is refused as well.
    first, mask = matcher.deep_copy(), np.zeros((vocabulary.tokenizer.vocab_size + 31) // 32, dtype=np.int32)
    _fill(first, mask)
    if first.is_error() or not mask.any():
        raise GrammarError(f"cannot be enforced{dialect}: {_reason(first.get_error()) or 'no text satisfies it'}")
    return _Compiled(matcher, mask)


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=200_000,  # about 0.2 s, and more than any schema of MAX_SCHEMA_BYTES takes
        step_lexer_fuel=200_000,
        max_lexer_states=32_768,  # 1 to 2 kB each
        max_items_in_row=20_000,  # an object with several thousand optional properties
        step_max_items=200_000,
        verbose_errors=False,  # they would tell one user's grammar to whoever reads the log
    )


def _fill(matcher: LLMatcher, mask: npt.NDArray[np.int32]) -> None:
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)


def _to_lark(constraint: dict[str, Any]) -> str:
    kind = constraint["kind"]
    if kind == "json":
        return f"start: {_json_rule(constraint['schema'], constraint['whitespace'])}{_OPTIONS}"
    if kind == "regex":
        return f"start: {_regex_rule(constraint['regex'])}{_OPTIONS}"
    if kind == "choice":
        return f"start: {_regex_rule('|'.join(map(_literal, constraint['choice'])))}{_OPTIONS}"
    if kind == "grammar":
        return constraint["grammar"] + _OPTIONS
    if kind == "tool_call":
        return _call_rules(constraint["functions"])
    raise GrammarError(f"is of a kind this server does not know: {kind!r}")


def _json_rule(schema: dict[str, Any], whitespace: str | None) -> str:
    schema = json.loads(json.dumps(schema))
    for _, part in subschemas(schema):
        # The engine allows second 60 at any minute; most readers of dates refuse it, and it is hardly ever right.
        if part.get("format") in ("date-time", "time"):
            part["allOf"] = [*part.get("allOf", []), {"pattern": _NO_LEAP_SECOND}]
    # Replaces what the user may have put there: `lenient` would have keywords ignored.
    options = {"whitespace_flexible": False} if whitespace == "" else {"whitespace_pattern": whitespace or _WHITESPACE}
    return f"%json {json.dumps(schema | {'x-guidance': options})}"


def _call_rules(functions: list[dict[str, Any]]) -> str:
    """A call of one of the functions, as `tool_parsers.ForcedCall` reads it."""
    from llguidance import LLMatcher

    rules = ["start: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        arguments = _json_rule(function["parameters"], None)
        # Alone first, for an error that names the function.
        failed, messages = LLMatcher.validate_grammar_with_warnings(f"start: {arguments}{_OPTIONS}", limits=_limits())
        if failed:
            raise GrammarError(f"cannot be enforced: {_reason(messages[0])}", function["field"])
        head = json.dumps(f'{{"name": "{function["name"]}", "arguments": ')
        rules += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: {arguments}"]
    return "\n".join(rules) + _OPTIONS


def _regex_rule(regex: str) -> str:
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, use_ascii='')}/"


def _literal(text: str) -> str:
    """A regex for exactly this text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _reason(error: str) -> str:
    """The engine's first line, without the rule's place in a grammar that the user did not write."""
    line = error.strip().split("\n", 1)[0]
    line = re.sub(r"^at \d+\(\d+\): ", "", line).removeprefix("failed to compile JSON schema: ")
    return line if len(line) <= 300 else line[:297] + "..."


def _refusal(field: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {reason}", param=field)
