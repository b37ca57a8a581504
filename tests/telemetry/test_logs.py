"""Log lines: what they say about their subject, and what they never say."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from arkor_ray.telemetry import logs

logger = logging.getLogger("arkor_ray.some.module")


@pytest.fixture
def lines(monkeypatch, capsys):
    """Configures logging in a form and gives what was written since."""
    root, ours = logging.getLogger(), logging.getLogger("arkor_ray")
    before = (list(root.handlers), root.level, ours.level)
    monkeypatch.setattr(logs, "_of_process", {})

    def configure(form: str, **of_process):
        monkeypatch.setenv(logs.FORMAT_VARIABLE, form)
        logs.configure(**of_process)
        return lambda: capsys.readouterr().err.splitlines()

    yield configure
    root.handlers, root.level = before[0], before[1]
    ours.setLevel(before[2])


def test_json_lines_name_time_level_logger_job_and_request(lines):
    read = lines("json", job_id="j-1", attempt=2)
    with logs.about(request_id="r-1", adapter_id=None):
        logger.info("loaded %s", "it")
    logger.warning("done")
    first, second = map(json.loads, read())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "arkor_ray.some.module",
        "message": "loaded it",
        "job_id": "j-1",
        "attempt": 2,
        "request_id": "r-1",
    }
    assert "request_id" not in second


def test_an_exception_is_a_field_of_its_line(lines):
    read = lines("json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("It failed")
    [line] = map(json.loads, read())
    assert line["message"] == "It failed"
    assert line["exception"].startswith("Traceback") and line["exception"].endswith("two\nlines")


def test_text_lines_have_the_subject_at_the_end_of_the_first(lines):
    read = lines("text")
    with logs.about(request_id="r-1"):
        logger.error("first\nsecond")
    first, second = read()
    assert first.endswith("ERROR arkor_ray.some.module: first [request_id=r-1]") and second == "second"


def test_tasks_take_their_subject_along_and_keep_it_apart(lines):
    read = lines("json")

    async def work(name: str) -> None:
        logs.note(request_id=name)
        await asyncio.sleep(0)
        logger.info(name)

    async def main() -> None:
        await asyncio.gather(work("a"), work("b"))

    asyncio.run(main())
    assert all((said := json.loads(line))["message"] == said["request_id"] for line in read())


def test_other_libraries_are_heard_from_warnings_on_and_nobody_twice(lines):
    from ray._private.log import PlainRayHandler

    logging.getLogger().addHandler(PlainRayHandler())  # as Ray Train does
    lines("text")
    read = lines("text")
    logging.getLogger("httpx").info("GET https://bucket/key")
    logging.getLogger("httpx").warning("slow")
    assert [line.rpartition(": ")[2] for line in read()] == ["slow"]


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("GET https://b.s3/k?X-Amz-Signature=SECRET&X-Amz-Date=2 failed", "X-Amz-Date=2 failed"),
        ("headers {'Authorization': 'Bearer SECRET'}", "'}"),
        ("cannot reach postgresql://arkor:SECRET@db:5432/arkor", "@db:5432/arkor"),
        ("postgresql://arkor@db/arkor?sslmode=require&password=SECRET&x=1", "&x=1"),
        ("connection to host=db password=SECRET user=arkor failed", " user=arkor failed"),
        ("https://host/rows.jsonl?token=SECRET", "https://host/rows.jsonl"),
    ],
)
def test_secrets_that_others_quote_are_hidden(lines, form, said, kept):
    read = lines(form)
    try:
        raise RuntimeError(said)
    except RuntimeError:
        logger.exception(said)
    text = "\n".join(read())
    assert "SECRET" not in text and kept in text and "[hidden]" in text
