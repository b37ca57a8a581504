from __future__ import annotations

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.training.chat_format import PlainText, RowError, detect_format, parse_row

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": []}, "chatml"),
        ({"conversations": [], "id": 3}, "sharegpt"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"text": "t", "messages": None}, "text"),
    ],
)
def test_detected_from_columns(row, name) -> None:
    assert detect_format(row) == name


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(DatasetError, match=r"\(answer, question\)"):
        detect_format({"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [QUESTION, ANSWER]}, "chatml", [QUESTION, ANSWER]),
        ({"conversations": [QUESTION, ANSWER]}, "chatml", [QUESTION, ANSWER]),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [{"role": "system", "content": "s"}, QUESTION, ANSWER],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [QUESTION, ANSWER]),
        (
            {"instruction": "q", "input": "more", "output": "a"},
            "alpaca",
            [{"role": "user", "content": "q\n\nmore"}, ANSWER],
        ),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [QUESTION, ANSWER]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "prompt_completion", [QUESTION, ANSWER]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
            "chatml",
            [QUESTION, ANSWER],
        ),
    ],
)
def test_formats_become_messages(row, name, messages) -> None:
    parsed = parse_row(row, name)
    assert parsed.messages == messages
    assert parsed.trained == tuple(m["role"] == "assistant" for m in messages)


def test_text() -> None:
    assert parse_row({"text": "hello"}, "text") == PlainText("hello")


def test_assistant_turns_of_the_prompt_are_not_trained() -> None:
    parsed = parse_row({"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}, "prompt_completion")
    assert parsed.trained == (False, False, False, True)


def test_weight_zero_keeps_a_turn_out_and_stays_out_of_the_template() -> None:
    parsed = parse_row({"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "weight": 1}]}, "chatml")
    assert parsed.trained == (False, False, False, True)
    assert all("weight" not in message for message in parsed.messages)


def test_tool_calls_and_tools_pass_through() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    parsed = parse_row({"messages": [QUESTION, call], "tools": [{"type": "function"}]}, "chatml")
    assert parsed.messages[1] == {**call, "content": ""}
    assert parsed.tools == [{"type": "function"}]


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ({"text": "x"}, "chatml", "has no 'messages'"),
        ({"messages": "hi"}, "chatml", "'messages' is text, not a list of messages"),
        ({"messages": [QUESTION]}, "chatml", "no assistant turn"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "chatml", "unknown role 'wizard'"),
        ({"messages": [{"role": "user"}]}, "chatml", r"content of 'messages\[0\]' is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "chatml", "is a list, not text"),
        ({"instruction": "q"}, "alpaca", "'output' is missing"),
        ({"instruction": " ", "output": "a"}, "alpaca", "'instruction' is empty"),
        ({"prompt": "q", "completion": [ANSWER]}, "prompt_completion", "both must be text or both messages"),
        ({"text": ""}, "text", "'text' is empty"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, name, reason) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(row, name)
