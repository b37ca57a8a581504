"""Rows of a data set as questions to a model: for batch inference and evaluation, which take the shapes that training does.

The last assistant turn of a row is the answer wanted, if it ends the row; a row may also end before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkor_ray.errors import DatasetError
from arkor_ray.schemas.dataset import BlobSource, HuggingFaceSource, is_local_path
from arkor_ray.storage import locations
from arkor_ray.training.chat_format import Message, PlainText, RowError, detect_format, parse_row, role_of
from arkor_ray.training.data_sources import Row, fetch_blob, load_split, parse_rows
from arkor_ray.training.job_spec import DatasetPolicy

_OPEN: Message = {"role": "assistant", "content": ""}  # stands where the answer would be


@dataclass(frozen=True)
class Question:
    """`answer` is None where the row has none, or one of tool calls."""

    messages: list[Message]
    tools: list[Any] | None
    answer: str | None

    def request(self) -> dict[str, Any]:
        """As part of a chat request."""
        return {"messages": self.messages, **({"tools": self.tools} if self.tools else {})}


def read_rows(source: str, *, split: str | None = None, subset: str | None = None) -> list[Row]:
    """The rows of a JSONL or JSON file: a path, a URL or s3://bucket/file.jsonl; or of the Hub's data set owner/name.

    Raises DatasetError, StorageError or InvalidRequestError.
    """
    policy = DatasetPolicy(allow_private_hosts=True, allow_local_paths=True)  # what runs this may read them anyway
    if source.startswith("s3://"):
        store, key = locations.open_file(source, param="--data")
        return list(parse_rows(store.get(key)))
    if is_local_path(source) or Path(source).is_file():
        source = Path(source).expanduser().absolute().as_uri()
    if "://" in source:
        return list(parse_rows(fetch_blob(BlobSource(type="blob", url=source), policy)))
    return load_split(HuggingFaceSource(type="huggingface", name=source, subset=subset), split or "train", policy)


def questions_of(rows: Sequence[Row]) -> tuple[dict[int, Question], dict[int, str]]:
    """The questions by row, from 0; and of rows that ask nothing, why."""
    questions: dict[int, Question] = {}
    refused: dict[int, str] = {}
    for index, row in enumerate(rows):
        try:
            questions[index] = question_of(row)
        except RowError as error:
            refused[index] = f"row {index + 1} {error}"
    return questions, refused


def question_of(row: Row) -> Question:
    """Raises RowError when the row asks nothing."""
    if not isinstance(row, Mapping):
        raise RowError("is no JSON object")
    whole, has_answer = _with_answer(row)
    try:
        example = parse_row(whole, detect_format(whole))
    except DatasetError as error:
        raise RowError(error.message) from error
    if isinstance(example, PlainText):
        raise RowError("is plain text, which asks nothing; use messages, or prompt and completion")
    *messages, last = example.messages
    if last["role"] != "assistant" or not messages:
        raise RowError("has no question before its answer")
    answer = last["content"] if has_answer and not last.get("tool_calls") else None
    return Question(messages, example.tools, answer)


def _with_answer(row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row as training would have it, and whether its answer is its own."""
    for column in ("messages", "conversations", "conversation"):
        turns = row.get(column)
        if isinstance(turns, list) and turns:
            last = turns[-1] if isinstance(turns[-1], Mapping) else {}
            if role_of(last) == "assistant":
                return dict(row), True
            return {**row, column: [*turns, _OPEN]}, False
    for column, answer in (("instruction", "output"), ("prompt", "completion")):
        if row.get(column) is not None and row.get(answer) is None:
            return {**row, answer: [_OPEN] if isinstance(row[column], list) else ""}, False
    return dict(row), True
