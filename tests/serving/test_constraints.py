"""Compiled constraints, walked at random without a model: whatever a mask allows ends in a text that satisfies it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from arkor_ray.errors import InvalidRequestError
from arkor_ray.serving import constraints
from arkor_ray.serving.chat_tokenizer import ChatTokenizer
from arkor_ray.serving.constraints import GrammarCompiler, MatcherGrammar
from tests.serving.schemas import INTEGER, SCHEMAS, SHORT, UNSUPPORTED, strict
from tests.serving.tiny import TEMPLATE, make_tokenizer

pytestmark = pytest.mark.anyio

TOKENIZER = ChatTokenizer(make_tokenizer(), "tiny")
END, OTHER_END = 2, 3
END_IDS = frozenset({END, OTHER_END})
CLOSING = {i for i in range(len(TOKENIZER.tokenizer)) if TOKENIZER.decode([i]) in ('"', "}", "]")}


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler()
    yield compiler
    compiler.close()


async def grammar(compiler: GrammarCompiler, tokenizer: ChatTokenizer = TOKENIZER, **constraint: Any) -> MatcherGrammar:
    return await compiler.grammar({"field": "theField", **constraint}, tokenizer, END_IDS)


async def json_grammar(compiler: GrammarCompiler, schema: Any, whitespace: str | None = None) -> MatcherGrammar:
    return await grammar(compiler, kind="json", schema=schema, whitespace=whitespace)


def allowed(grammar: MatcherGrammar) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")).tolist())


def walk(grammar: MatcherGrammar, seed: int, *, steps: int = 400) -> str | None:
    """A random text of the grammar; None when it did not come to an end. It leans towards what closes something."""
    draw, tokens = random.Random(seed), []
    for _ in range(steps):
        choices = sorted(allowed(grammar))
        assert (END in choices) == (OTHER_END in choices), "the end tokens come and go together"
        closing = [token for token in choices if token in CLOSING or token in END_IDS]
        token = draw.choice(closing if closing and draw.random() < 0.25 else choices)
        if token in END_IDS:
            break
        tokens.append(token)
        if grammar.accept(token):
            assert allowed(grammar) == set(END_IDS)
            break
    else:
        return None
    return TOKENIZER.decode(tokens)


def spell(grammar: MatcherGrammar, text: str) -> bool | None:
    """Accepts `text` token by token. None if it is not allowed, else whether it may end there."""
    for token in TOKENIZER.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token not in allowed(grammar):
            return None
        grammar.accept(token)
    return END in allowed(grammar)


@pytest.mark.parametrize("name", SCHEMAS)
async def test_whatever_is_generated_satisfies_the_schema(compiler: GrammarCompiler, name: str) -> None:
    schema = SCHEMAS[name]
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    check = validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    texts = [walk(await json_grammar(compiler, schema), seed) for seed in range(40)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 10, "or this test shows nothing"
    for text in ended:
        check.validate(json.loads(text))


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_schema_that_cannot_be_enforced_is_refused(compiler: GrammarCompiler, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^theField: cannot be enforced: ") as raised:
        await json_grammar(compiler, UNSUPPORTED[name])
    assert raised.value.param == "theField" and "\n" not in raised.value.message


async def test_white_space_is_bounded_chosen_or_none(compiler: GrammarCompiler) -> None:
    schema = {"type": "object"}
    assert spell(await json_grammar(compiler, schema), '{\n    "a": 1\n}') is True
    assert spell(await json_grammar(compiler, schema), '{"a":1}') is True
    assert spell(await json_grammar(compiler, schema), '{"a":' + " " * 65) is None, (
        "a model could go on with it for ever"
    )
    assert spell(await json_grammar(compiler, schema, whitespace=""), '{"a":1}') is True
    assert spell(await json_grammar(compiler, schema, whitespace=""), '{"a": 1') is None
    assert spell(await json_grammar(compiler, schema, whitespace="[ ]{0,2}"), '{"a":  1}') is True
    assert spell(await json_grammar(compiler, schema, whitespace="[ ]{0,2}"), '{"a":   ') is None


@pytest.mark.parametrize(
    "regex", [r"[a-c]{2,4}\d?", "(yes|no)!*", "^a$", r"\p{Lu}x", "a/b\nc", "", "(a+)+b", "(a|a)*(a|ab)*c"]
)
async def test_regex_is_matched_as_a_whole(compiler: GrammarCompiler, regex: str) -> None:
    texts = [walk(await grammar(compiler, kind="regex", regex=regex), seed) for seed in range(10)]
    ended = [text for text in texts if text is not None]
    assert ended
    assert all(re.fullmatch(regex.replace(r"\p{Lu}", "[^\\W\\d_a-z]"), text) for text in ended)


@pytest.mark.parametrize("regex", ["(?=a)b", r"(a)\1", "(", "[", "(" * 4000, "a" + "{1000}" * 6])
async def test_regex_that_cannot_be_enforced_is_refused(compiler: GrammarCompiler, regex: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^theField: cannot be enforced as a regular expression") as raised:
        await grammar(compiler, kind="regex", regex=regex)
    assert len(raised.value.message) < 400, "the regex itself is not repeated"


async def test_choice_is_one_of_the_texts(compiler: GrammarCompiler) -> None:
    choices = ["yes", "no", "no way", 'a"b\\c/d', "zwei\nZeilen", "é😀\x7f\u2028", ".*", "%json {}"]
    found = {walk(await grammar(compiler, kind="choice", choice=choices), seed) for seed in range(100)}
    assert found == set(choices)


async def test_choice_may_be_nothing(compiler: GrammarCompiler) -> None:
    assert allowed(await grammar(compiler, kind="choice", choice=[""])) == set(END_IDS)


async def test_many_long_choices(compiler: GrammarCompiler) -> None:
    choices = [f"{i:04d}" * 16 for i in range(1000)]
    assert walk(await grammar(compiler, kind="choice", choice=choices), 1) in choices


LARK = """
start: "SELECT " column ("," column)* " FROM t"
column: NAME | "count(" NAME ")"
NAME: /[a-c]{1,3}/
"""


async def test_grammar_is_lark(compiler: GrammarCompiler) -> None:
    column = r"(?:[a-c]{1,3}|count\([a-c]{1,3}\))"
    texts = [walk(await grammar(compiler, kind="grammar", grammar=LARK), seed) for seed in range(10)]
    assert any(texts)
    assert all(re.fullmatch(f"SELECT {column}(,{column})* FROM t", text) for text in texts if text)


@pytest.mark.parametrize(
    ("lark", "said"),
    [
        ('start: "a" nothing', "nothing"),
        ('start: "a"\nb: "x" |', r"2\("),
        ('x: "a"', "start"),
        ("start: start", ""),
        ("start: " + "(" * 20_000, "nested"),
    ],
)
async def test_grammar_that_is_none_is_refused(compiler: GrammarCompiler, lark: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^theField: cannot be enforced as a Lark grammar .*: .*{said}"):
        await grammar(compiler, kind="grammar", grammar=lark)


def doubling(terminals: bool) -> str:
    """A small grammar for a text of 8**10 characters."""
    names = "ABCDEFGHIJK" if terminals else "abcdefghijk"
    rules = [f"{a}: {' '.join([b] * 8)}" for a, b in itertools.pairwise(names)]
    return "\n".join([f"start: {names[0]}", *rules, f'{names[-1]}: "x"'])


EXPLODING: dict[str, dict[str, Any]] = {
    "terminals": {"kind": "grammar", "grammar": doubling(True)},
    "rules": {"kind": "grammar", "grammar": doubling(False)},
    "repetition": {"kind": "regex", "regex": "x{1000000000}"},
    "nested repetition": {"kind": "regex", "regex": "((a{1,1000}){1,1000}){1,1000}"},
    "catastrophe for a backtracking matcher": {"kind": "regex", "regex": "(x+x+)+y|(.*a){25}"},
    "anyOf times anyOf": {"kind": "json", "whitespace": None, "schema": {"allOf": [
        {"anyOf": [{"properties": {f"a{i}{j}": INTEGER}} for j in range(6)]} for i in range(12)]}},
    "references that double": {"kind": "json", "whitespace": None, "schema": {
        "$ref": "#/$defs/d0", "$defs": {"d40": INTEGER} | {
            f"d{i}": strict({"a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}}) for i in range(40)}}},
    "a long constant": {"kind": "json", "whitespace": None, "schema": {"const": "x" * 60_000}},
    "a very long string": {"kind": "json", "whitespace": None, "schema": {
        "type": "string", "pattern": "^x*$", "minLength": 10**9}},
    "a very long array": {"kind": "json", "whitespace": None, "schema": {"type": "array", "minItems": 10**6}},
    "many optional properties": {"kind": "json", "whitespace": None, "schema": {
        "type": "object", "properties": {f"p{i}": SHORT for i in range(900)}}},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLODING)
@pytest.mark.timeout(60)
async def test_constraint_that_explodes_is_refused_or_walked_step_by_step(compiler: GrammarCompiler, name: str) -> None:
    try:
        found = await grammar(compiler, **EXPLODING[name])
        walk(found, 1, steps=50)
    except InvalidRequestError as error:
        assert error.param == "theField"


async def test_compile_that_takes_too_long_is_refused_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(time_limit_s=0.05)
    release, slowly = asyncio.Event(), constraints._compile
    loop = asyncio.get_running_loop()

    def compile_slowly(lark: str, *rest: Any) -> Any:
        if "slow" in lark:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return slowly(lark, *rest)

    monkeypatch.setattr(constraints, "_compile", compile_slowly)
    with pytest.raises(InvalidRequestError, match=r"theField: did not compile within 0\.05 s"):
        await grammar(compiler, kind="regex", regex="slow")
    assert walk(await grammar(compiler, kind="regex", regex="fast"), 1) == "fast"
    release.set()
    compiler.close()


async def test_same_constraint_is_compiled_once_for_each_vocabulary(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, really = [], constraints._compile
    monkeypatch.setattr(
        constraints, "_compile", lambda lark, words, dialect: compiled.append(words.key) or really(lark, words, dialect)
    )
    other_template = ChatTokenizer(make_tokenizer(TEMPLATE + " "), "an adapter")
    other_words = ChatTokenizer(make_tokenizer(), "another")
    other_words.tokenizer = make_tokenizer(TEMPLATE + "  ")
    other_words.tokenizer.add_tokens(["entirely new"])
    for tokenizer in (TOKENIZER, TOKENIZER, other_template):
        await asyncio.gather(*(grammar(compiler, tokenizer, kind="regex", regex="a") for _ in range(3)))
    assert len(compiled) == 1
    await grammar(compiler, other_words, kind="regex", regex="a")
    await grammar(compiler, kind="regex", regex="b")
    assert len(compiled) == 3 and len(set(compiled)) == 2


async def test_only_the_latest_are_kept() -> None:
    compiler = GrammarCompiler(kept=2)
    for regex in "abcd":
        assert walk(await grammar(compiler, kind="regex", regex=regex), 1) == regex
    assert len(compiler._compiled) == 2
    compiler.close()


async def test_requests_do_not_walk_on_each_others_grammar(compiler: GrammarCompiler) -> None:
    first, second = [await grammar(compiler, kind="regex", regex="abc") for _ in range(2)]
    assert spell(first, "ab") is False
    assert spell(second, "abc") is True


async def test_text_is_never_a_special_token(compiler: GrammarCompiler) -> None:
    special = set(TOKENIZER.tokenizer.all_special_ids) - END_IDS
    assert not special & allowed(await grammar(compiler, kind="regex", regex=".*"))


async def test_model_without_an_end_token_is_told(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError, match="theField: needs a model with an end-of-sequence token"):
        await compiler.grammar({"kind": "regex", "regex": "a", "field": "theField"}, TOKENIZER, frozenset({9999}))
