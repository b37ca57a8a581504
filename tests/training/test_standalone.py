"""A job without the service, as far as no Ray is needed; `integration/test_job_scripts.py` has the rest."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from arkor_ray.errors import InvalidRequestError, ModelError
from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile
from arkor_ray.storage import layout
from arkor_ray.training import standalone
from arkor_ray.training.standalone import EventLog, check_same_job, check_shared, job_id_of, standalone_spec

SOURCE = {"type": "blob", "url": "https://example.com/rows.jsonl"}


def spec_of(tmp_path: Path, model: str = "owner/base", job_id: str = "job", **config):
    return standalone_spec(job_id, {"model": model, "datasetSource": SOURCE, **config}, str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch):
    for name in ("ARKOR_RAY_MODELS", "ARKOR_RAY_CATALOGUE", "ARKOR_RAY_STORAGE_URL", "ARKOR_RAY_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "job_id"), [("triage", "triage"), ("My run, v2!", "My-run-v2"), ("…", "job"), ("x" * 200, "x" * 100)]
)
def test_a_jobs_name_makes_its_id(name, job_id):
    assert job_id_of(name) == job_id


@pytest.mark.parametrize("model", ["owner/base", "s3://bucket/models/base"])
def test_a_model_is_its_own_name(tmp_path, model):
    assert spec_of(tmp_path, model).base_model == model


def test_a_name_of_the_catalogue_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_MODELS", "house=owner/other@v1")
    assert spec_of(tmp_path, "house").base_model == "owner/other@v1"
    with pytest.raises((InvalidRequestError, ModelError), match="nonesuch"):
        spec_of(tmp_path, "nonesuch")


def test_settings_of_a_service_do_not_stand_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("ARKOR_RAY_CLUSTER", "1")
    monkeypatch.setenv("ARKOR_RAY_STORAGE_URL", "s3://bucket/service")
    monkeypatch.setenv("ARKOR_RAY_S3_ENDPOINT_URL", "http://ceph:8080")
    spec = spec_of(tmp_path)
    assert (spec.storage_url, spec.s3_endpoint_url) == ((tmp_path / "out").as_uri(), "http://ceph:8080")
    assert spec.dataset_policy.allow_local_paths and spec.dataset_policy.allow_private_hosts


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"job_id": "a/b"}, "--job-id: 'a/b' is no id"),
        ({"maxSteps": 0}, "config.maxSteps: .* greater than or equal to 1"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, arguments, sentence):
    with pytest.raises(InvalidRequestError, match=sentence):
        spec_of(tmp_path, **arguments)
    with pytest.raises(InvalidRequestError, match="--output: 'runs' must be an absolute path"):
        standalone_spec("job", {"model": "a/b", "datasetSource": SOURCE}, "runs")


def trained(spec) -> None:
    """As if the job had got to its first checkpoint."""
    spec.open_store().put(layout.manifest_key(layout.adapter_id(spec.job_id, 1)), b"{}")


def test_a_job_goes_on_with_other_workers_but_not_as_another_job(tmp_path):
    spec = spec_of(tmp_path, numWorkers=2, batchSize=4)
    check_same_job(spec)
    trained(spec)
    check_same_job(spec_of(tmp_path, numWorkers=1, batchSize=8, zeroStage=2, loggingSteps=5))
    with pytest.raises(
        InvalidRequestError, match=r"learning_rate is 0.1, was 0.0002; global_batch is 4, was 8\. Put them back"
    ):
        check_same_job(spec_of(tmp_path, learningRate=0.1))
    check_same_job(spec_of(tmp_path, job_id="another", learningRate=0.1))


def test_a_job_that_has_not_trained_may_be_put_right(tmp_path):
    wrong, right = (
        spec_of(tmp_path),
        spec_of(tmp_path, datasetSource={**SOURCE, "url": "https://example.com/right.jsonl"}),
    )
    check_same_job(wrong)
    rows = layout.dataset_prefix("job") + "index.json"
    wrong.open_store().put(rows, b"[]")
    check_same_job(right)
    assert right.open_store().head(rows) is None, "the wrong rows are not trained on"
    trained(right)
    with pytest.raises(InvalidRequestError, match="dataset_source is"):
        check_same_job(wrong)


def test_a_local_data_set_may_move_but_not_change(tmp_path):
    """Ray unpacks the working directory somewhere else for each job, and a job that goes on is another one to it."""
    here, there = tmp_path / "_ray_pkg_1" / "my rows.jsonl", tmp_path / "_ray_pkg_2" / "my rows.jsonl"
    for path in (here, there):
        path.parent.mkdir()
        path.write_text('{"text": "one"}\n')

    def spec(path: Path):
        return spec_of(tmp_path, datasetSource={"type": "blob", "url": path.as_uri()})

    check_same_job(spec(here))
    trained(spec(here))
    check_same_job(spec(there))
    there.write_text('{"text": "two"}\n')
    with pytest.raises(
        InvalidRequestError, match=r"the data set's file has other contents .*, was \w{12}…\)\. Put them back"
    ):
        check_same_job(spec(there))
    there.unlink()
    with pytest.raises(InvalidRequestError, match=r"dataset: .*_2/my rows\.jsonl cannot be read: No such file"):
        check_same_job(spec(there))
    with pytest.raises(InvalidRequestError, match=r"dataset_source is .*'url': .*, was .*'sha256'"):
        check_same_job(spec_of(tmp_path))


def test_a_token_is_not_written_down(tmp_path):
    spec = spec_of(tmp_path, datasetSource={**SOURCE, "token": "secret"})
    check_same_job(spec)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or "secret" not in path.read_text()


class FakeTask:
    """`_has` on nodes of which some see the directory."""

    def __init__(self, seen_by: set[str]) -> None:
        self._seen_by = seen_by

    def options(self, scheduling_strategy):
        self._node = scheduling_strategy.node_id
        return self

    def remote(self, url: str, key: str) -> bool:
        assert standalone.open_store(url).head(key) is not None, "it was written before anybody looks"
        return self._node in self._seen_by


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes that are alive, and one that is not."""
    nodes = [("a", "10.0.0.1", True), ("b", "10.0.0.2", True), ("c", "10.0.0.3", False)]
    listed = [{"NodeID": id * 56, "NodeManagerAddress": address, "Alive": alive} for id, address, alive in nodes]
    monkeypatch.setattr(standalone.ray, "nodes", lambda: listed)
    monkeypatch.setattr(standalone.ray, "get", lambda answers: answers)

    def seen_by(*nodes: str) -> None:
        monkeypatch.setattr(standalone, "_has", FakeTask({node * 56 for node in nodes}))

    return seen_by


def test_a_directory_that_a_node_does_not_have_is_refused(cluster, tmp_path):
    cluster("a")
    with pytest.raises(InvalidRequestError, match=r"is not shared: 10\.0\.0\.2 cannot see .* Use s3://"):
        check_shared(tmp_path.as_uri())
    cluster("a", "b")
    check_shared(tmp_path.as_uri())
    check_shared("s3://bucket/runs")  # which every node has
    assert not list(tmp_path.rglob("probes"))


MANIFEST = CheckpointManifest(
    adapter_id="job-step-4", job_id="job", step=4, base_model="m", base_precision="fp32", r=4, lora_alpha=8,
    target_modules=[], files=[ManifestFile(path="adapter_model.safetensors", size_bytes=1, sha256="0")],
    created_at=utcnow(),
)  # fmt: skip


def test_events_are_numbered_and_told_once():
    async def story():
        log = EventLog("job", "s3://bucket/runs")
        waiting = asyncio.ensure_future(log.after(0))
        for _ in range(2):  # the workers began anew and tell everything again
            await log.tell([("started", ({"steps": 8},)), ("log", ({"step": 1, "loss": float("nan")},))])
            await log.checkpoint(MANIFEST.model_dump(mode="json"))
        first, _ = await waiting
        final = MANIFEST.model_copy(update={"final": True, "step": 8, "adapter_id": "job-final"}).model_dump(
            mode="json"
        )
        await log.checkpoint(final)
        await log.completed(final, {"finalLoss": 0.5})
        await log.close()
        return first, await log.after(0), await log.after(4)

    first, (events, closed), (last, _) = asyncio.run(story())
    assert [event.id for event in events] == [1, 2, 3, 4] and closed and not last
    assert first == events[: len(first)] and first
    assert [event.type for event in events] == [
        "training.started", "training.log", "checkpoint.saved", "training.completed",
    ]  # fmt: skip
    assert events[1].data["loss"] is None and events[1].data["jobId"] == "job"
    assert events[2].data["url"] == "s3://bucket/runs/adapters/job-step-4"
    assert events[3].data["metrics"] == {"finalLoss": 0.5}


def test_the_base_may_not_change_under_a_job(tmp_path):
    spec = spec_of(tmp_path)
    check_same_job(spec)
    trained(spec)
    with pytest.raises(InvalidRequestError, match="base_model is 'owner/other', was 'owner/base'"):
        check_same_job(replace(spec, base_model="owner/other"))
