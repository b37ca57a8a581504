"""Calls in the families' own forms: read the same wherever the text is cut, and never made up."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from arkor_ray.serving.tool_parsers import (
    CallDelta,
    ForcedCall,
    MarkedCalls,
    Piece,
    ToolParser,
    WholeAnswer,
    parser_for,
)

NAMES = ["get_weather", "add"]
HERMES = 'In <tools>. {{ "<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args>}\\n</tool_call>" }}'
MISTRAL = "{{ '[TOOL_CALLS] [' }}"
LLAMA = 'Environment: ipython. Respond in the format {\\"name\\": name, \\"parameters\\": {}}'
GEMMA = "{{ '<|tool_call>call:' + name + '{' }}...{{ '}<tool_call|>' }}"
TEMPLATES = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA, "gemma": GEMMA}

Q = '<|"|>'
PARIS = ("get_weather", {"city": "Paris"})
#: form, what the model writes, the content, the calls
CASES: dict[str, tuple[str, str, str, list[tuple[str, dict[str, Any]]]]] = {
    "hermes, one": (
        "hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS],
    ),
    "hermes, text and two": (
        "hermes",
        'Let me see. \n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"a": [1, 2.5, null], "b": {"c": "é\\n\\"<"}}}</tool_call>\n',
        "Let me see.", [PARIS, ("add", {"a": [1, 2.5, None], "b": {"c": 'é\n"<'}})],
    ),
    "hermes, its end tag in a text": (
        "hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\"</tool_call>"}}</tool_call>', "",
        [("add", {"a": '"</tool_call>'})],
    ),
    "hermes, text after a call": (
        "hermes", '<tool_call>{"name": "add", "arguments": {}}</tool_call>\n done', "\n done", [("add", {})],
    ),
    "hermes, no arguments": ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    "hermes, broken": ("hermes", ' <tool_call>{"name": "add", </tool_call>', ' <tool_call>{"name": "add", </tool_call>', []),
    "hermes, then whole": (
        "hermes", '<tool_call>{}</tool_call><tool_call>{"name": "add"}</tool_call>', "<tool_call>{}</tool_call>",
        [("add", {})],
    ),
    "hermes, unknown tool": (
        "hermes", 'a\n<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        'a\n<tool_call>{"name": "rm", "arguments": {}}</tool_call>', [],
    ),
    "hermes, cut off": ("hermes", 'a <tool_call>{"name": "add"', 'a <tool_call>{"name": "add"', []),
    "hermes, half a tag": ("hermes", "a < b <tool_cal", "a < b <tool_cal", []),
    "hermes, plain": ("hermes", " Hello \n there ", " Hello \n there ", []),
    "hermes, not JSON's numbers": (
        "hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', [],
    ),
    "hermes, half a surrogate pair": (
        "hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>', [],
    ),
    "mistral, list": (
        "mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "add", "arguments": {}}]',
        "", [PARIS, ("add", {})],
    ),
    "mistral, names": (
        "mistral", 'Well.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]abc[ARGS]{"a": "[TOOL_CALLS]"}',
        "Well.", [PARIS, ("add", {"a": "[TOOL_CALLS]"})],
    ),
    "mistral, name and object": ("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", [PARIS]),
    "mistral, broken": ("mistral", "[TOOL_CALLS] hm", "[TOOL_CALLS] hm", []),
    "llama, one": ("llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    "llama, tagged, several": (
        "llama",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "add", "parameters": {}}\n',
        "", [PARIS, ("add", {})],
    ),
    "llama, JSON of another kind": ("llama", '{"city": "Paris", "name": 3}', '{"city": "Paris", "name": 3}', []),
    "llama, a name that is no tool": ("llama", '{"name": "Ada"}', '{"name": "Ada"}', []),
    "llama, plain": ("llama", "\n Hello <|python", "\n Hello <|python", []),
    "gemma, values": (
        "gemma",
        f"Sure.<|tool_call>call:get_weather{{city:{Q}Pa}}ris, {{\"é\"{Q},n:-1.5e2,ok:true,no:null,"
        f"xs:[1,{Q}a{Q},{{k:{Q}{Q}}}],o:{{}}}}<tool_call|><|tool_call>call:add{{}}<tool_call|>",
        "Sure.",
        [("get_weather", {"city": 'Pa}ris, {"é"', "n": -150.0, "ok": True, "no": None, "xs": [1, "a", {"k": ""}], "o": {}}),
         ("add", {})],
    ),
    "gemma, quoted as JSON": (
        "gemma", '<|tool_call>call:add{ a : "x\\"y", "b" : [ 1 , 2 ] }<tool_call|>', "", [("add", {"a": 'x"y', "b": [1, 2]})],
    ),
    "gemma, its end tag in a text": (
        "gemma", f"<|tool_call>call:add{{a:{Q}<tool_call|>{Q}}}<tool_call|>", "", [("add", {"a": "<tool_call|>"})],
    ),
    "gemma, broken": ("gemma", "<|tool_call>call:add{a:}<tool_call|>", "<|tool_call>call:add{a:}<tool_call|>", []),
}  # fmt: skip


def parser(form: str) -> ToolParser:
    found = parser_for(TEMPLATES[form], NAMES)
    assert found is not None
    return found


def read(reader: ToolParser, *texts: str, complete: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    """Content and calls. Checks that each call's name comes first and once."""
    pieces: list[Piece] = [piece for text in texts for piece in reader.push(text)]
    content, names, arguments = "", [], []
    for piece in pieces + reader.finish(complete=complete):
        if isinstance(piece, str):
            assert piece, "no empty content"
            content += piece
        elif piece.name is not None:
            assert piece.index == len(names)
            names.append(piece.name)
            arguments.append(piece.arguments)
        else:
            assert piece.index == len(names) - 1
            arguments[-1] += piece.arguments
    return content, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_calls_and_content_wherever_the_text_is_cut(case: str) -> None:
    form, text, content, calls = CASES[case]
    expected = (content, calls)
    assert read(parser(form), text) == expected
    assert read(parser(form), *text) == expected, "character by character"
    for at in range(len(text) + 1):
        assert read(parser(form), text[:at], "", text[at:]) == expected, f"cut at {at}"
    draw = random.Random(1)
    for _ in range(50):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(parser(form), *parts) == expected, parts


def test_content_is_passed_on_as_soon_as_it_is_certain() -> None:
    reader = parser("hermes")
    assert reader.push("The sum is < 3") == ["The sum is < 3"]
    assert reader.push(" and <tool") == [" and"]
    assert reader.push("box>") == [" <toolbox>"]
    reader = parser("llama")
    assert reader.push('{"city') == ['{"city']
    assert reader.push('": 1') == ['": 1']
    reader = parser("llama")
    assert reader.push("Hi") == ["Hi"]


def test_call_is_told_as_soon_as_it_is_whole() -> None:
    reader = parser("hermes")
    assert reader.push('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call') == []
    assert reader.push(">") == [CallDelta(0, "add"), CallDelta(0, arguments='{"a": 1}')]


@pytest.mark.parametrize("form", ["mistral", "llama"])
def test_call_that_was_cut_at_the_token_limit_is_none(form: str) -> None:
    text = {"mistral": '[TOOL_CALLS]add[ARGS]{"a": 1}', "llama": '{"name": "add", "parameters": {}}'}[form]
    assert read(parser(form), text, complete=False) == (text, [])
    assert read(parser(form), text)[1]


@pytest.mark.parametrize(
    ("template", "kind"),
    [(HERMES, MarkedCalls), (MISTRAL, MarkedCalls), (GEMMA, MarkedCalls), (LLAMA, WholeAnswer)],
)
def test_form_is_the_one_that_the_template_shows(template: str, kind: type) -> None:
    assert isinstance(parser_for(template, NAMES), kind)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "<tool_call>\n<function=name>\n<parameter=a> arguments </tool_call>",
        "<tool_call>name\n<arg_key>a</arg_key> arguments",
        "{{ tools | tojson }} Answer with the function's name and its parameters.",
    ],
)
def test_unknown_form_is_not_guessed(template: str) -> None:
    assert parser_for(template, NAMES) is None


FORCED = '{"name": "get_weather", "arguments": {"city": "}é\\""}}'


def test_arguments_of_a_forced_call_come_as_they_are_written() -> None:
    reader = ForcedCall()
    assert reader.push('{"name": "get_weather", "argu') == []
    assert reader.push('ments": {"ci') == [CallDelta(0, "get_weather"), CallDelta(0, arguments='{"c')]
    assert reader.push("ty") == [CallDelta(0, arguments="it")]


def test_forced_call_wherever_it_is_cut() -> None:
    expected = ("", [("get_weather", {"city": '}é"'})])
    for first in range(len(FORCED) + 1):
        for second in range(first, len(FORCED) + 1, 5):
            assert read(ForcedCall(), FORCED[:first], FORCED[first:second], FORCED[second:]) == expected


def test_forced_call_that_was_cut_off_keeps_all_it_has() -> None:
    reader = ForcedCall()
    pieces = [*reader.push('{"name": "add", "arguments": {"a": {}'), *reader.finish(complete=False)]
    assert "".join(piece.arguments for piece in pieces if isinstance(piece, CallDelta)) == '{"a": {}'
    reader = ForcedCall()
    assert [*reader.push('{"name": "a'), *reader.finish(complete=False)] == ['{"name": "a']
