"""Jobs that are refused when they are submitted: nothing that could not train is accepted to fail later."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import CONFIG, MODEL, User

pytestmark = pytest.mark.anyio


async def test_model_is_compared_case_insensitively_and_echoed_as_written(user: User) -> None:
    job = (await user.post("/v1/jobs", {"name": "x", "config": {**CONFIG, "model": "TINY"}})).json()["job"]
    assert job["config"]["model"] == "TINY"


async def test_model_outside_the_catalogue_is_400_and_lists_the_accepted_names(user: User) -> None:
    answer = await user.post("/v1/jobs", {"name": "x", "config": {**CONFIG, "model": "gpt-5"}})
    assert answer.status_code == 400 and answer.json()["param"] == "config.model"
    assert MODEL in answer.json()["error"] and "Tiny" in answer.json()["error"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("model", ""),
        ("datasetSource", None),
        ("datasetSource", {"type": "ftp"}),
        ("datasetSource", {"type": "blob", "url": "ftp://host/x"}),
        ("datasetSource", {"type": "blob", "url": "file:///etc/passwd"}),
        ("datasetSource", {"type": "blob", "url": "http://127.0.0.1/x"}),
        ("datasetSource", {"type": "huggingface", "name": "../../etc"}),
        ("datasetFormat", {"type": "parquet"}),
        ("datasetSplit", {"enabled": True, "testSize": 2}),
        ("maxSteps", 0),
        ("maxSteps", 1.5),
        ("maxSteps", True),
        ("numTrainEpochs", 0),
        ("learningRate", -1),
        ("learningRate", "fast"),
        ("batchSize", 0),
        ("optim", "magic"),
        ("lrSchedulerType", "zigzag"),
        ("weightDecay", -0.1),
        ("warmupSteps", {"steps": 1, "ratio": 0.5}),
        ("loggingSteps", 0),
        ("saveSteps", {"ratio": 1.5}),
        ("evalSteps", -25),
        ("loraR", 0),
        ("loraAlpha", 0),
        ("maxLength", 1),
        ("loadIn4bit", "maybe"),
        ("trainOnResponsesOnly", "yes"),
        ("dryRun", "maybe"),
        ("gpuTypes", []),
        ("numWorkers", 0),
        ("numWorkers", 65),
        ("zeroStage", 4),
        ("precision", "int8"),
    ],
)
async def test_value_that_could_not_train_is_400_and_named(user: User, field: str, value: Any) -> None:
    config = {name: item for name, item in {**CONFIG, field: value}.items() if item is not None}
    answer = await user.post("/v1/jobs", {"name": "x", "config": config})
    assert answer.status_code == 400, answer.text
    assert answer.json()["param"].startswith(f"config.{field}") and f"config.{field}" in answer.json()["error"]
    assert (await user.get("/v1/jobs")).json() == {"jobs": []}


@pytest.mark.parametrize("name", [None, "", 5, "x" * 201])
async def test_unfit_name_is_400(user: User, name: Any) -> None:
    answer = await user.post("/v1/jobs", {"name": name, "config": CONFIG})
    assert answer.status_code == 400 and answer.json()["param"] == "name"


SECRET = "hf_k7Qv2mR9xT4w"


@pytest.mark.parametrize(
    "source",
    [
        {"type": "ftp", "url": "https://h/x", "token": SECRET},
        {"type": "blob", "token": SECRET},
        {"type": "blob", "url": "https://h/x", "token": [SECRET]},
        {"type": "blob", "url": f"https://user:{SECRET}@h/x"},
        {"type": "blob", "url": f"ftp://h/x?signature={SECRET}"},
        {"type": "blob", "url": {"token": SECRET}},
        [{"token": SECRET}],
    ],
)
async def test_refusal_does_not_repeat_secrets(user: User, source: Any) -> None:
    answer = await user.post("/v1/jobs", {"name": "x", "config": {**CONFIG, "datasetSource": source}})
    assert answer.status_code == 400 and answer.json()["param"].startswith("config.datasetSource")
    assert SECRET not in answer.text
