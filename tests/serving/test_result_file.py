from __future__ import annotations

import json

import pytest

from arkor_ray.errors import ConflictError
from arkor_ray.serving.result_file import ResultFile
from arkor_ray.storage.local import LocalStore

RUN = {"data": "d", "adapter": "a"}


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path)


def answers(*rows: int) -> list[dict]:
    return [{"index": row, "answer": f"ä{row}"} for row in rows]


def test_what_was_added_is_there_after_a_restart_and_errors_are_tried_again(store):
    first = ResultFile(store, "out.jsonl", RUN)
    first.add(answers(3, 0))
    first.add([{"index": 1, "error": "too long"}])
    again = ResultFile(store, "out.jsonl", RUN)
    assert again.missing(range(5)) == [1, 2, 4]
    again.add(answers(1, 2))
    assert ResultFile(store, "out.jsonl", RUN).missing(range(5)) == [4]


def test_the_file_is_in_the_order_of_the_rows_and_leaves_nothing_beside_it(store):
    file = ResultFile(store, "out.jsonl", RUN)
    for row in (2, 0, 1):
        file.add(answers(row))
    file.finish()
    lines = store.get("out.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == answers(0, 1, 2)
    assert [info.key for info in store.list("")] == ["out.jsonl"]


def test_a_finished_file_is_not_written_over(store):
    ResultFile(store, "out.jsonl", RUN).finish()
    with pytest.raises(ConflictError, match=r"out\.jsonl is there already"):
        ResultFile(store, "out.jsonl", RUN)


def test_parts_of_another_run_are_not_mixed_in(store):
    ResultFile(store, "out.jsonl", RUN).add(answers(0))
    with pytest.raises(ConflictError, match="another run: adapter differ"):
        ResultFile(store, "out.jsonl", {**RUN, "adapter": "b"})
