"""`config`: generous in form, strict in meaning, and every refusal names its field."""

from __future__ import annotations

from typing import Any

import pytest

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.job import JobConfig, JobStatus, StepSpec, hide_token

REQUIRED = {"model": "tiny", "datasetSource": {"type": "huggingface", "name": "owner/data"}}
# What the vendor's three templates send.
TEMPLATE = {
    "model": "unsloth/gemma-4-E4B-it",
    "datasetSource": {"type": "huggingface", "name": "arkorlab/triage-demo"},
    "datasetFormat": {"type": "chatml"},
    "maxSteps": 100,
    "evalSteps": 25,
    "loraR": 16,
    "loraAlpha": 16,
    "loadIn4bit": False,
}


def parse(**fields: Any) -> JobConfig:
    return JobConfig.parse({**REQUIRED, **fields})


def test_defaults_are_those_of_the_contract() -> None:
    config = parse()
    assert (config.learning_rate, config.batch_size, config.weight_decay) == (2e-4, 4, 0.01)
    assert (config.lora_r, config.lora_alpha, config.load_in_4bit, config.dry_run) == (16, 16, False, False)
    assert config.logging_steps.resolve(100) == 1 and config.save_steps.resolve(100) == 25
    assert config.eval_steps is None and config.warmup_steps.resolve(100) == 0
    assert config.max_steps is config.num_train_epochs is config.dataset_split is config.dataset_format is None


def test_config_of_the_templates_is_understood() -> None:
    config = JobConfig.parse(TEMPLATE)
    assert config.max_steps == 100 and config.eval_steps == StepSpec(steps=25) and config.dataset_format == "chatml"


@pytest.mark.parametrize("name", ["warmupSteps", "loggingSteps", "saveSteps", "evalSteps"])
@pytest.mark.parametrize(
    ("value", "of_200"),
    [(25, 25), ("25", 25), (25.0, 25), ({"steps": 25}, 25), ({"ratio": 0.1}, 20), ({"ratio": 0.001}, 1)],
)
def test_step_fields_take_every_form(name: str, value: Any, of_200: int) -> None:
    spec = getattr(parse(**{name: value}), {"warmupSteps": "warmup_steps"}.get(name, name.replace("Steps", "_steps")))
    assert spec.resolve(200) == of_200


@pytest.mark.parametrize("name", ["warmupSteps", "loggingSteps", "saveSteps", "evalSteps"])
@pytest.mark.parametrize(
    "value",
    [
        *(-1, "-1", 2.5, "many", True, [], {}),
        *({"steps": 1, "ratio": 0.1}, {"steps": -1}, {"ratio": -0.1}, {"ratio": 1}, {"ratio": 5}),
    ],
)
def test_nonsense_in_step_fields_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse(**{name: value})
    assert raised.value.param is not None and raised.value.param.startswith(f"config.{name}")


def test_zero_steps_mean_something_only_for_warmup() -> None:
    assert parse(warmupSteps=0).warmup_steps.resolve(10) == 0
    assert parse(warmupSteps={"ratio": 0}).warmup_steps.resolve(10) == 0
    for refused in ({"loggingSteps": 0}, {"saveSteps": {"ratio": 0}}, {"evalSteps": {"ratio": 0}}):
        with pytest.raises(InvalidRequestError):
            parse(**refused)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("chatml", "chatml"),
        ({"type": "chatml"}, "chatml"),
        ({"type": "Alpaca"}, "alpaca"),
        ("messages", "chatml"),
        ("conversations", "sharegpt"),
    ],
)
def test_dataset_format_takes_every_form(value: Any, expected: str | None) -> None:
    assert parse(datasetFormat=value).dataset_format == expected


@pytest.mark.parametrize(("value", "expected"), [(True, True), ({"enabled": False}, False), ({}, True), (None, None)])
def test_train_on_responses_only_takes_both_forms(value: Any, expected: bool | None) -> None:
    assert parse(trainOnResponsesOnly=value).train_on_responses_only is expected


def test_dataset_split_is_a_share_or_a_name() -> None:
    assert parse(datasetSplit="train").dataset_split == "train"
    split = parse(datasetSplit={"enabled": True}).dataset_split
    assert split is not None and not isinstance(split, str)
    assert (split.enabled, split.test_size, split.seed) == (True, 0.1, 42)


@pytest.mark.parametrize("field", ["maxSteps", "batchSize", "loraR", "loraAlpha", "maxLength", "numWorkers"])
@pytest.mark.parametrize("value", [0, -1, True, "x", 1.5, 10**12, [1]])
def test_counts_are_whole_and_positive(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse(**{field: value})
    assert raised.value.param == f"config.{field}" and f"config.{field}: " in raised.value.message


@pytest.mark.parametrize("field", ["learningRate", "weightDecay", "numTrainEpochs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, -1, "fast", False])
def test_rates_are_finite_and_not_negative(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse(**{field: value})
    assert raised.value.param == f"config.{field}"


def test_numbers_may_come_as_strings() -> None:
    config = parse(maxSteps="10", learningRate="2e-4", batchSize="8")
    assert (config.max_steps, config.learning_rate, config.batch_size) == (10, 2e-4, 8)


def test_names_of_optimizers_and_schedules_are_known() -> None:
    assert parse(optim="ADAMW_8BIT", lrSchedulerType="Cosine").optim == "adamw_8bit"
    for field in ("optim", "lrSchedulerType"):
        with pytest.raises(InvalidRequestError, match="must be one of"):
            parse(**{field: "magic"})


def test_impossible_combinations_are_refused_with_their_numbers() -> None:
    with pytest.raises(InvalidRequestError, match="zeroStage 3"):
        parse(loadIn4bit=True, zeroStage=3)
    with pytest.raises(InvalidRequestError, match="warmupSteps is 20, more than maxSteps 10"):
        parse(warmupSteps=20, maxSteps=10)


def test_unknown_fields_are_kept() -> None:
    assert parse(futureField={"a": 1}).to_wire()["futureField"] == {"a": 1}


@pytest.mark.parametrize("config", [None, [], "x", {}, {"model": "x"}, {"datasetSource": {}}])
def test_config_without_what_it_needs_is_refused(config: Any) -> None:
    with pytest.raises(InvalidRequestError):
        JobConfig.parse(config)


def test_status_knows_which_of_them_are_the_end() -> None:
    assert {status.value for status in JobStatus if status.is_terminal} == {"completed", "failed", "cancelled"}
    assert {status.value for status in JobStatus} == {"queued", "running", "completed", "failed", "cancelled"}


def test_hidden_token_leaves_the_rest_and_the_original() -> None:
    config = {"model": "x", "datasetSource": {"type": "blob", "url": "u", "token": "secret"}}
    assert hide_token(config) == {"model": "x", "datasetSource": {"type": "blob", "url": "u"}}
    assert config["datasetSource"]["token"] == "secret"  # type: ignore[index]
    assert hide_token({"model": "x", "datasetSource": None}) == {"model": "x", "datasetSource": None}
