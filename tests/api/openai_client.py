"""OpenAI's own client on the application in this process, and the errors that it reads."""

from __future__ import annotations

from typing import Any

import httpx
import openai

from tests.api.conftest import User


def client_of(user: User, **options: Any) -> openai.AsyncOpenAI:
    """OpenAI's client with the user's token; it speaks to the application in this process."""
    given = {"base_url": "http://arkor.localhost/v1", "api_key": user.token, "http_client": user.http, "max_retries": 0}
    return openai.AsyncOpenAI(**{**given, **options})


def assert_openai_error(answer: httpx.Response, status: int, code: str, type: str = "invalid_request_error") -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert list(answer.json()) == ["error"] and set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (code, type)
    return error
