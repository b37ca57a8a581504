from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest

from arkor_ray.storage import layout
from arkor_ray.storage.keys import check_folder, check_key

JOB = str(uuid4())


def test_keys_are_the_documented_ones() -> None:
    assert layout.adapter_id(JOB, 40) == f"{JOB}-step-40"
    assert layout.final_adapter_id(JOB) == f"{JOB}-final"
    assert layout.adapter_prefix(f"{JOB}-step-40") == f"adapters/{JOB}-step-40/"
    assert layout.manifest_key(f"{JOB}-final") == f"adapters/{JOB}-final/manifest.json"
    assert layout.resume_prefix(JOB, 40) == f"resume/{JOB}/step-00000040/"
    assert layout.resume_root(JOB) == f"resume/{JOB}/"
    assert layout.dataset_prefix(JOB) == f"datasets/{JOB}/"
    assert layout.adapter_prefix(f"{JOB}-step-40").startswith(layout.job_adapters_prefix(JOB))


def test_keys_are_ones_that_stores_take() -> None:
    check_key(layout.manifest_key(layout.adapter_id(JOB, 10**7)))
    for folder in (layout.resume_root(JOB), layout.resume_prefix(JOB, 0), layout.dataset_prefix(JOB)):
        check_folder(folder)


def test_adapter_ids_tell_job_and_step() -> None:
    assert layout.parse_adapter_id(layout.adapter_id(JOB, 0)) == (JOB, 0)
    assert layout.parse_adapter_id(layout.adapter_id(JOB, 1234)) == (JOB, 1234)
    assert layout.parse_adapter_id(layout.final_adapter_id(JOB)) == (JOB, None)


def test_resume_states_sort_by_step() -> None:
    steps = [2, 10, 9, 100, 12345678]
    assert sorted(layout.resume_prefix(JOB, step) for step in steps) == [
        layout.resume_prefix(JOB, step) for step in sorted(steps)
    ]


@pytest.mark.parametrize(
    "adapter_id",
    [
        "",
        JOB,
        f"{JOB}-step-",
        f"{JOB}-step-01",
        f"{JOB}-step-1/../x",
        f"{JOB}-step-x",
        f"{JOB}-final\n",
        "-final",
        "a_b-final",
    ],
)
def test_other_adapter_ids_are_refused(adapter_id: str) -> None:
    for key in (layout.parse_adapter_id, layout.adapter_prefix, layout.manifest_key):
        with pytest.raises(ValueError, match="no adapter id"):
            key(adapter_id)


@pytest.mark.parametrize("job_id", ["", "..", "a/b", "../x", "a b", "-a", "a.b", "é", "a\n", "x" * 101])
def test_other_ids_are_refused(job_id: str) -> None:
    keys: list[Callable[[str], str]] = [
        layout.final_adapter_id,
        layout.resume_root,
        layout.dataset_prefix,
        layout.job_adapters_prefix,
        lambda job_id: layout.adapter_id(job_id, 1),
        lambda job_id: layout.resume_prefix(job_id, 1),
    ]
    for key in keys:
        with pytest.raises(ValueError, match="no id"):
            key(job_id)


def test_negative_steps_are_refused() -> None:
    for key in (layout.adapter_id, layout.resume_prefix):
        with pytest.raises(ValueError, match="no step"):
            key(JOB, -1)


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        (layout.manifest_key(layout.adapter_id(JOB, 7)), (layout.Kind.ADAPTER, JOB, 7, "manifest.json")),
        (layout.manifest_key(layout.final_adapter_id(JOB)), (layout.Kind.ADAPTER, JOB, None, "manifest.json")),
        (layout.adapter_prefix(layout.adapter_id(JOB, 7)) + "a/b", (layout.Kind.ADAPTER, JOB, 7, "manifest.json")),
        (layout.resume_prefix(JOB, 7) + "state.safetensors", (layout.Kind.RESUME, JOB, 7, "state.json")),
        (layout.dataset_prefix(JOB) + "train.jsonl", (layout.Kind.DATASET, JOB, None, "index.json")),
        (layout.doctor_prefix(JOB) + "small", (layout.Kind.PROBE, "", None, "")),
        (layout.shared_probe_key("x"), (layout.Kind.PROBE, "", None, "")),
        (layout.log_key(JOB, 2), (layout.Kind.LOG, JOB, None, "")),
        (layout.job_config_key(JOB), (layout.Kind.JOB, JOB, None, "")),
    ],
)
def test_a_key_tells_its_folder(key: str, folder: tuple[object, ...]) -> None:
    found = layout.folder_of(key)
    assert found is not None
    assert key.startswith(found.prefix)
    assert (found.kind, found.job_id, found.step, found.last_written) == folder


@pytest.mark.parametrize(
    "key", ["", "notes.txt", "adapters/x", f"adapters/{JOB}/manifest.json", f"resume/{JOB}/7/state.json",
            "models/llama/config.json", f"old/adapters/{JOB}-final/manifest.json", f"adapters/{JOB}-final/"]
)  # fmt: skip
def test_a_key_that_is_not_ours_has_no_folder(key: str) -> None:
    assert layout.folder_of(key) is None
