from __future__ import annotations

import json

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.storage.local import LocalStore
from arkor_ray.training import questions
from arkor_ray.training.questions import question_of, questions_of, read_rows

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "messages", "answer"),
    [
        ({"messages": [ASK, ANSWER]}, [ASK], "a"),
        ({"messages": [ASK]}, [ASK], None),
        ({"messages": [ASK, ANSWER, ASK]}, [ASK, ANSWER, ASK], None),
        ({"messages": [ASK, CALL]}, [ASK], None),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASK], "a"),
        ({"conversations": [{"from": "human", "value": "q"}]}, [ASK], None),
        ({"instruction": "q", "output": "a", "system": "s"}, [{"role": "system", "content": "s"}, ASK], "a"),
        ({"instruction": "q"}, [ASK], None),
        ({"prompt": "q", "completion": "a"}, [ASK], "a"),
        ({"prompt": "q"}, [ASK], None),
        ({"prompt": [ASK], "completion": [ANSWER]}, [ASK], "a"),
        ({"prompt": [ASK]}, [ASK], None),
    ],
)
def test_every_shape_asks_with_or_without_the_answer_wanted(row, messages, answer):
    found = question_of(row)
    assert (found.messages, found.answer) == (messages, answer)


def test_tools_are_part_of_the_question():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert question_of({"messages": [ASK], "tools": tools}).request() == {"messages": [ASK], "tools": tools}


def test_rows_that_ask_nothing_are_told_by_number_and_reason():
    rows = [
        {"text": "x"},
        {"messages": [ASK]},
        "x",
        {"messages": [ANSWER]},
        {"question": "?"},
        {"messages": [{"role": "x"}]},
    ]
    found, refused = questions_of(rows)
    assert list(found) == [1]
    assert list(refused) == [0, 2, 3, 4, 5]
    for index, reason in {0: "row 1 is plain text", 2: "is no JSON", 3: "no question", 4: "columns", 5: "role"}.items():
        assert reason in refused[index]


def test_rows_come_from_a_path_a_url_or_a_bucket(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q"}\n')
    monkeypatch.setattr(questions.locations, "open_file", lambda text, param: (LocalStore(tmp_path), "rows.jsonl"))
    monkeypatch.chdir(tmp_path)
    for source in (str(path), "rows.jsonl", path.as_uri(), "s3://bucket/rows.jsonl"):
        assert read_rows(source) == [{"prompt": "q"}]
    with pytest.raises(DatasetError, match="cannot be read"):
        read_rows("none.jsonl")


def test_names_of_the_hub_are_passed_on_with_their_split(monkeypatch):
    asked = []
    monkeypatch.setattr(questions, "load_split", lambda source, split, policy: asked.append((source, split)) or [])
    read_rows("owner/data", split="test[:5]", subset="de")
    [(source, split)] = asked
    assert (source.name, source.subset, split) == ("owner/data", "de", "test[:5]")
    assert json.loads(source.model_dump_json())["type"] == "huggingface"
