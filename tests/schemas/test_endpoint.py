"""Endpoints: which bodies publish or change one, and which sentences refuse the others."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from arkor_ray.schemas.base import invalid_request
from arkor_ray.schemas.endpoint import Endpoint, EndpointCreate, EndpointKeyCreate, EndpointPatch, ServedAdapter

FINAL = {"kind": "adapter", "adapter": {"kind": "final", "jobId": "j"}}
CHECKPOINT = {"kind": "adapter", "adapter": {"kind": "checkpoint", "jobId": "j", "step": 3}}
BASE = {"kind": "base_model", "baseModel": "tiny"}


def create(**fields: Any) -> EndpointCreate:
    return EndpointCreate.model_validate({"slug": "triage", "target": BASE, "authMode": "none", **fields})


def refusal(make: Any, *args: Any, **fields: Any) -> Any:
    with pytest.raises(ValidationError) as raised:
        make(*args, **fields)
    return invalid_request(raised.value)


@pytest.mark.parametrize(("target", "model"), [(FINAL, "j"), (CHECKPOINT, "j:3"), (BASE, "tiny")])
def test_target_is_a_final_adapter_a_checkpoint_or_a_base_model(target: dict[str, Any], model: str) -> None:
    assert create(target=target).target.model == model
    assert EndpointPatch.model_validate({"target": target}).target.model == model  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ({"kind": "model_menu"}, "target"),
        ({"kind": ["adapter"]}, "target"),
        ({}, "target"),
        ("j", "target"),
        (None, "target"),
        ({"kind": "base_model"}, "target.baseModel"),
        ({"kind": "base_model", "baseModel": ""}, "target.baseModel"),
        ({"kind": "adapter"}, "target.adapter"),
        ({"kind": "adapter", "adapter": {"kind": "final"}}, "target.adapter.jobId"),
        ({"kind": "adapter", "adapter": {"kind": "checkpoint", "jobId": "j"}}, "target.adapter.step"),
        ({"kind": "adapter", "adapter": {"kind": "checkpoint", "jobId": "j", "step": -1}}, "target.adapter.step"),
    ],
)
def test_other_targets_are_refused_by_the_field_at_fault(target: Any, field: str) -> None:
    assert refusal(create, target=target).param == field
    assert refusal(EndpointPatch.model_validate, {"target": target}).param == field


@pytest.mark.parametrize("slug", ["ab", "a1", "0-0", "a--b", "x" * 50])
def test_slug_is_a_label_of_a_host_name(slug: str) -> None:
    assert create(slug=slug).slug == slug


@pytest.mark.parametrize(
    "slug", ["", "a", "x" * 51, "-ab", "ab-", "Ab", "a_b", "a.b", "ä1", "ab\n", "www", "v1", "api"]
)
def test_other_slugs_and_reserved_ones_are_refused(slug: str) -> None:
    error = refusal(create, slug=slug)
    assert error.param == "slug" and repr(slug)[:60] in error.message


@pytest.mark.parametrize(
    ("fields", "retention"),
    [
        ({}, ("days", 7)),
        ({"runRetentionMode": "days", "runRetentionDays": 1}, ("days", 1)),
        ({"runRetentionMode": "unlimited"}, ("unlimited", None)),
        ({"runRetentionMode": "disabled"}, ("disabled", None)),
    ],
)
def test_retention_is_a_week_unless_said_otherwise(fields: dict[str, Any], retention: tuple[str, int | None]) -> None:
    assert create(**fields).retention == retention


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"runRetentionDays": 7}, "runRetentionDays"),
        ({"runRetentionMode": "days"}, "runRetentionDays"),
        ({"runRetentionMode": "unlimited", "runRetentionDays": 7}, "runRetentionDays"),
        ({"runRetentionMode": "disabled", "runRetentionDays": 7}, "runRetentionDays"),
        *(
            ({"runRetentionMode": "days", "runRetentionDays": days}, "runRetentionDays")
            for days in (0, -1, 1.5, "7", True)
        ),
        ({"runRetentionMode": "weeks", "runRetentionDays": 7}, "runRetentionMode"),
    ],
)
def test_retention_that_does_not_fit_together_is_refused(fields: dict[str, Any], field: str) -> None:
    assert refusal(create, **fields).param == field
    assert refusal(EndpointPatch.model_validate, fields).param == field


@pytest.mark.parametrize("body", [{}, {"enabled": False}, {"authMode": "none"}, {"runRetentionMode": "unlimited"}])
def test_patch_holds_any_part(body: dict[str, Any]) -> None:
    assert EndpointPatch.model_validate(body).model_dump(by_alias=True, exclude_unset=True) == body


@pytest.mark.parametrize("body", [{"slug": "new"}, {"slug": None}, {"slug": "new", "enabled": False}])
def test_slug_is_immutable(body: dict[str, Any]) -> None:
    error = refusal(EndpointPatch.model_validate, body)
    assert error.param == "slug" and "immutable" in error.message


@pytest.mark.parametrize(
    "body",
    [{"target": None}, {"authMode": None}, {"enabled": None}, {"enabled": 1}, {"enabled": "yes"}, {"authMode": "open"}],
)
def test_patch_with_a_value_that_says_nothing_is_refused(body: dict[str, Any]) -> None:
    assert refusal(EndpointPatch.model_validate, body).param == next(iter(body))


def test_label_of_a_key_is_trimmed_before_it_is_measured() -> None:
    assert EndpointKeyCreate(label="  " + "x" * 80 + "\n").label == "x" * 80
    for label in ("", "   ", "x" * 81):
        assert refusal(EndpointKeyCreate, label=label).param == "label"


def test_what_clients_reject_as_null_is_left_out() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    fields: dict[str, Any] = {
        "id": "e", "slug": "triage", "org_id": "o", "project_id": "p", "auth_mode": "none", "enabled": True,
        "target": ServedAdapter.model_validate(CHECKPOINT), "url_format": "openai_compat", "custom_domain": None,
        "created_at": moment, "updated_at": moment, "run_retention_mode": "unlimited", "run_retention_days": None,
    }  # fmt: skip
    wire = Endpoint(**fields).model_dump(mode="json", by_alias=True)
    assert "runRetentionDays" not in wire and wire["customDomain"] is None
    assert wire["target"] == CHECKPOINT and wire["createdAt"] == "2026-01-01T00:00:00.000Z"
    assert Endpoint(**{**fields, "run_retention_days": 3}).to_wire()["runRetentionDays"] == 3
