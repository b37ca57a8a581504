"""The writer's promises, with a store that fails on purpose. No training: the snapshots are made up."""

from __future__ import annotations

import errno
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from arkor_ray.errors import ModelError, ObjectExistsError, StorageError, TrainingError
from arkor_ray.schemas.checkpoint import WEIGHTS_FILE, CheckpointManifest, ParityProbe
from arkor_ray.storage.local import LocalStore
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.telemetry import metrics
from arkor_ray.training.adapter_export import AdapterExport
from arkor_ray.training.callbacks import ListEventSink
from arkor_ray.training.checkpoint import CheckpointContext, CheckpointWriter, Snapshot
from arkor_ray.training.figures import TrainingFigures
from arkor_ray.training.loop_config import StoragePatience
from arkor_ray.training.model import add_lora, load_base_model
from arkor_ray.training.portable_state import WEIGHTS, PortableState
from arkor_ray.training.resume_state import (
    Identity,
    Progress,
    committed_manifests,
    load_resume_state,
    resumable_steps,
)
from arkor_ray.training.spool import Spool
from arkor_ray.training.train_loop import newest_state
from arkor_ray.training.workers import Worker
from tests.training.tiny import make_spec

ALONE = Worker(0, 1, torch.device("cpu"))
IDENTITY = Identity(global_batch=8, samples=21, seed=42, optim="adamw_torch")
QUICK = StoragePatience(RetryPolicy(budget_seconds=1.0, first_delay_seconds=0.01), consecutive_failures=2)


@pytest.fixture(scope="module")
def export(base_model, tokenizer, tmp_path_factory) -> AdapterExport:
    config = make_spec(tmp_path_factory.mktemp("spec"), base_model).config
    model = add_lora(load_base_model(str(base_model), config, "fp32", torch.device("cpu")), config, str(base_model))
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    made = AdapterExport(model, shapes, tokenizer, torch.float32)
    made.shapes = shapes  # for the snapshots below
    return made


class WatchedStore(LocalStore):
    """Notes every write in order; `fail` may raise before one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written: list[str] = []
        self.fail = lambda key: None
        self._lock = threading.Lock()

    def put(self, key, data, *, if_absent=False) -> None:
        self._note(key)
        super().put(key, data, if_absent=if_absent)

    def put_file(self, key, path, *, if_absent=False) -> None:
        self._note(key)
        super().put_file(key, path, if_absent=if_absent)

    def _note(self, key: str) -> None:
        self.fail(key)
        with self._lock:
            self.written.append(key)


@pytest.fixture
def store(tmp_path) -> WatchedStore:
    return WatchedStore(tmp_path / "store")


@pytest.fixture
def sink() -> ListEventSink:
    return ListEventSink()


@pytest.fixture
def writer(export, store, sink, tmp_path) -> CheckpointWriter:
    return make_writer(export, store, sink, tmp_path)


def make_writer(export, store, sink, folder: Path, patience: StoragePatience = QUICK) -> CheckpointWriter:
    """Of one attempt."""
    context = CheckpointContext("job-1", "/base", None, "fp32", IDENTITY, Spool(folder, "job-1"))
    return CheckpointWriter(context, export, store, sink, patience, TrainingFigures("job-1", "base"))


PROBE = ParityProbe(token_ids=[1, 2], logprobs=[-0.5])


def snapshot(export: AdapterExport, step: int, value: float = 1.0, final: bool = False) -> Snapshot:
    kinds = (WEIGHTS, "exp_avg", "exp_avg_sq")
    tensors = {kind: {name: torch.full(shape, value) for name, shape in export.shapes.items()} for kind in kinds}
    state = PortableState(tensors, optimizer_steps=step)
    return Snapshot(state, Progress(step=step), {"final_loss": 1.5}, PROBE, final)


def test_the_manifest_comes_last_and_a_resume_index_after_its_tensors(writer, export, store) -> None:
    writer.submit(snapshot(export, 3))
    writer.finish()
    written = store.written
    assert written[-1] == "adapters/job-1-step-3/manifest.json"
    assert written[-2] == "resume/job-1/step-00000003/state.json"
    assert "resume/job-1/step-00000003/state.safetensors" in written[:-2]


def test_what_is_loaded_is_what_was_saved(writer, export, store) -> None:
    writer.submit(snapshot(export, 3, value=0.25))
    writer.finish()
    assert list(resumable_steps(store, "job-1")) == [3]
    state, progress = load_resume_state(store, "job-1", 3, IDENTITY)
    assert progress == Progress(step=3) and state.optimizer_steps == 3
    assert all(torch.equal(t, torch.full_like(t, 0.25)) for kind in state.tensors.values() for t in kind.values())


def test_files_that_arrived_are_not_sent_again(writer, export, store, sink) -> None:
    failures = iter([StorageError("503")] * 2)

    def fail(key: str) -> None:
        if key.endswith("adapter_model.safetensors") and (error := next(failures, None)):
            raise error

    store.fail = fail
    writer.submit(snapshot(export, 1))
    writer.finish()
    assert sorted(store.written) == sorted(set(store.written))
    assert [call[1] for call in sink.calls] == ["job-1-step-1", "checkpoint.delayed", sink.calls[-1][1]]


def test_a_fault_of_one_checkpoint_leaves_the_next_alone(writer, export, store, sink) -> None:
    def fail(key: str) -> None:
        if "step-1/" in key:
            raise StorageError("503")

    store.fail = fail
    for step in (1, 2, 3):
        writer.submit(snapshot(export, step))
    writer.finish()
    assert [m["step"] for m in sink.of("checkpoint")] == [2, 3]
    assert [c[2]["step"] for c in sink.calls if c[:2] == ("notice", "checkpoint.failed")] == [1]


def test_stages_outcomes_and_faults_are_counted(writer, export, store, recorded) -> None:
    faults = iter([StorageError("503")] * 2)

    def fail(key: str) -> None:
        if "step-1/" in key or (key.endswith("step-2/manifest.json") and next(faults, None)):
            raise StorageError("503")

    store.fail = fail
    for step in (1, 2):
        writer.submit(snapshot(export, step))
    writer.finish()
    assert recorded.total(metrics.TRAINING_CHECKPOINTS, base_model="base", outcome="failed") == 1
    assert recorded.total(metrics.TRAINING_CHECKPOINTS, base_model="base", outcome="committed") == 1
    assert len(recorded.all(metrics.TRAINING_CHECKPOINT_SECONDS, stage="upload")) == 1
    assert recorded.total(metrics.TRAINING_STORAGE_FAILURES, base_model="base") >= 2 + 1


def test_a_committed_adapter_is_never_written_again(writer, export, store, sink) -> None:
    writer.submit(snapshot(export, 2))
    writer.submit(snapshot(export, 2, value=9.0))
    writer.finish()
    assert [key for key in store.written if key.endswith("manifest.json")] == ["adapters/job-1-step-2/manifest.json"]
    first, second = sink.of("checkpoint")
    assert first == second


def test_losing_the_race_for_the_manifest_counts_as_committed(writer, export, store, sink) -> None:
    winner: list[CheckpointManifest] = []

    def fail(key: str) -> None:
        if key.endswith("manifest.json") and not winner:
            here = CheckpointManifest(
                adapter_id="job-1-step-2", job_id="job-1", step=2, base_model="/base", base_precision="fp32", r=4,
                lora_alpha=8, target_modules=[], files=[], created_at="2026-01-01T00:00:00Z",
            )  # fmt: skip
            winner.append(here)
            LocalStore.put(store, key, here.to_bytes())
            raise ObjectExistsError("taken")

    store.fail = fail
    writer.submit(snapshot(export, 2))
    writer.finish()
    assert sink.of("checkpoint") == [winner[0].model_dump(mode="json")]


class Stored:
    """What is in storage of the adapter of a step."""

    def __init__(self, store: LocalStore, step: int) -> None:
        prefix = f"adapters/job-1-step-{step}/"
        self.manifest = CheckpointManifest.from_bytes(store.get(prefix + "manifest.json"))
        self.files = {file.path: store.get(prefix + file.path) for file in self.manifest.files}
        self.weights = safetensors.torch.load(self.files[WEIGHTS_FILE])

    @property
    def value(self) -> float:
        (value,) = {float(tensor.max()) for tensor in self.weights.values()}
        return value

    def assert_whole(self) -> None:
        assert all(file.is_of(self.files[file.path]) for file in self.manifest.files)


def test_a_put_of_an_attempt_that_stood_still_changes_nothing_that_a_manifest_names(
    export, store, sink, tmp_path
) -> None:
    """The first is frozen with its weights under way; the second commits the same step; then the first goes on."""
    frozen, woken = threading.Event(), threading.Event()

    def freeze(key: str) -> None:
        if key.endswith(WEIGHTS_FILE) and not frozen.is_set():
            frozen.set()
            assert woken.wait(60)

    store.fail = freeze
    first, told = make_writer(export, store, sink, tmp_path), ListEventSink()
    first.submit(snapshot(export, 2, value=1.0))
    assert frozen.wait(60)
    second = make_writer(export, store, told, tmp_path / "second")
    second.submit(snapshot(export, 2, value=1.5))
    second.finish()
    woken.set()
    first.finish()
    stored = Stored(store, 2)
    stored.assert_whole()
    assert stored.value == 1.5 and stored.manifest.probe == PROBE
    assert sink.of("checkpoint") == told.of("checkpoint") == [stored.manifest.model_dump(mode="json")]


def die_before_the_manifest(export, store, folder: Path, value: float) -> None:
    """An attempt at the checkpoint of step 2."""

    def fail(key: str) -> None:
        if key.endswith("manifest.json"):
            raise StorageError("503")

    store.fail = fail
    dead = make_writer(export, store, ListEventSink(), folder)
    dead.submit(snapshot(export, 2, value=value))
    dead.finish()
    store.fail = lambda key: None


def test_files_of_an_attempt_that_did_not_get_to_commit_are_adopted(export, store, sink, tmp_path) -> None:
    die_before_the_manifest(export, store, tmp_path / "dead", value=1.5)
    writer = make_writer(export, store, sink, tmp_path)
    writer.submit(snapshot(export, 2, value=1.0))
    writer.finish()
    stored = Stored(store, 2)
    stored.assert_whole()
    assert stored.value == 1.5 and stored.manifest.probe is None
    assert [call[2] for call in sink.calls if call[0] == "stage"][-1] == stored.files[WEIGHTS_FILE]


def test_files_that_are_ours_to_the_bit_keep_their_probe(export, store, sink, tmp_path) -> None:
    """An earlier attempt's, or our own whose answer was lost."""
    die_before_the_manifest(export, store, tmp_path / "dead", value=1.0)
    writer = make_writer(export, store, sink, tmp_path)
    writer.submit(snapshot(export, 2, value=1.0))
    writer.finish()
    assert Stored(store, 2).manifest.probe == PROBE
    assert len([call for call in sink.calls if call[0] == "stage"]) == 1


def test_weights_in_storage_that_cannot_be_read_are_not_adopted(writer, export, store) -> None:
    LocalStore.put(store, f"adapters/job-1-step-2/{WEIGHTS_FILE}", b"no weights")
    writer.submit(snapshot(export, 2))
    with pytest.raises(TrainingError, match=r"adapter of step 2 .* cannot be read"):
        writer.finish()
    assert store.head("adapters/job-1-step-2/manifest.json") is None


@pytest.mark.parametrize("damaged", [True, False])
def test_who_comes_by_a_committed_checkpoint_again_mends_its_resume_state(
    writer, export, store, sink, tmp_path, damaged
) -> None:
    writer.submit(snapshot(export, 2, value=1.5))
    writer.finish()
    if damaged:
        damage(store, 2)
    again = make_writer(export, store, sink, tmp_path)
    again.submit(snapshot(export, 2, value=1.0))
    again.finish()
    state, _ = load_resume_state(store, "job-1", 2, IDENTITY)
    assert all(float(t.max()) == (1.0 if damaged else 1.5) for t in state.tensors[WEIGHTS].values())
    assert Stored(store, 2).value == 1.5


def test_a_snapshot_that_fails_the_gate_ends_the_run(writer, export, store, sink) -> None:
    writer.submit(snapshot(export, 2, value=float("nan")))
    with pytest.raises(TrainingError, match=r"step 2 has values .* not finite"):
        writer.finish()
    assert store.written == [] and sink.calls == []


def test_a_full_disk_costs_an_attempt_and_not_the_job(writer, export, monkeypatch) -> None:
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write", full)
    writer.submit(snapshot(export, 2))
    with pytest.raises(OSError, match="No space left"):
        writer.finish()


def test_submit_raises_once_the_writer_has_given_up(writer, export, store) -> None:
    def fail(key: str) -> None:
        raise StorageError("503")

    store.fail = fail
    with pytest.raises(TrainingError, match="2 checkpoints in a row could not be stored, the last one of step 2: 503"):
        for step in range(1, 10):
            writer.submit(snapshot(export, step))


def test_a_final_adapter_that_cannot_be_stored_is_a_failure(writer, export, store) -> None:
    def fail(key: str) -> None:
        if "final" in key:
            raise StorageError("503")

    store.fail = fail
    writer.submit(snapshot(export, 5, final=True))
    with pytest.raises(TrainingError, match="could not be stored"):
        writer.finish()


def test_the_final_adapter_has_no_resume_state(writer, export, store) -> None:
    writer.submit(snapshot(export, 5, final=True))
    manifest = writer.finish()
    assert manifest.final and manifest.resume_prefix is None
    assert not any(key.startswith("resume/") for key in store.written)
    assert committed_manifests(store, "job-1") == []


def damage(store: LocalStore, step: int, keep: int | None = None) -> None:
    """Of a resume state's tensors, `keep` bytes stay; without it, all of them but for one bit."""
    key = f"resume/job-1/step-{step:08d}/state.safetensors"
    data = bytearray(store.get(key))
    data[-1] ^= 1
    LocalStore.put(store, key, bytes(data[:keep]))


@pytest.mark.parametrize("keep", [100, None])
def test_a_damaged_newest_resume_state_gives_way_to_the_one_before(writer, export, store, caplog, keep) -> None:
    for step in (1, 2):
        writer.submit(snapshot(export, step))
    writer.finish()
    damage(store, 2, keep)
    state, progress = newest_state(store, "job-1", IDENTITY, ALONE)
    assert (progress.step, state.optimizer_steps) == (1, 1)
    if keep is None:
        assert "does not go on from step 2 but from step 1" in caplog.text


def test_where_every_resume_state_is_damaged_the_job_begins_anew(writer, export, store) -> None:
    writer.submit(snapshot(export, 1))
    writer.finish()
    damage(store, 1)
    assert newest_state(store, "job-1", IDENTITY, ALONE) == (None, Progress())


@pytest.mark.parametrize("rank", [0, 1])
def test_states_that_a_ghost_took_away_give_way_to_those_that_it_stored(
    export, store, sink, tmp_path, monkeypatch, rank
) -> None:
    """Of an attempt that storage still hears and Ray no longer: it goes on while its successor reads."""
    ghost = make_writer(export, store, sink, tmp_path)
    for step in (1, 2):
        ghost.submit(snapshot(export, step))
    ghost.finish()
    read, listed = store.get, [[2, 1], [4, 3]]
    going_on = iter([3, 4])

    def get(key: str) -> bytes:
        if key.endswith("state.safetensors"):
            for step in going_on:
                later = make_writer(export, store, sink, tmp_path)
                later.submit(snapshot(export, step))
                later.finish()
        return read(key)

    monkeypatch.setattr(store, "get", get)
    worker = Told(rank, 1, torch.device("cpu"))
    object.__setattr__(worker, "told", listed)
    assert newest_state(store, "job-1", IDENTITY, worker)[1].step == 4
    assert listed == []


class Told(Worker):
    """A worker that hears from the first what there is, or is that one and tells it."""

    def from_first(self, value):
        first = self.told.pop(0)
        assert value == (first if self.is_first else []), "the others look nothing up"
        return first


def test_a_job_without_resume_states_begins_at_its_first_step(store) -> None:
    assert newest_state(store, "job-1", IDENTITY, ALONE) == (None, Progress())


class OneOfTwo(Worker):
    """A worker whose peer could not read the newest state."""

    def total(self, *values: float) -> list[float]:
        peer, self.peer[:] = self.peer[0], self.peer[1:]
        return [value + peer for value in values]


def test_workers_go_on_from_the_newest_state_that_all_of_them_could_read(writer, export, store) -> None:
    for step in (1, 2):
        writer.submit(snapshot(export, step))
    writer.finish()
    worker = OneOfTwo(0, 1, torch.device("cpu"))
    object.__setattr__(worker, "peer", [1, 0])
    assert newest_state(store, "job-1", IDENTITY, worker)[1].step == 1


def test_resume_states_of_checkpoints_that_were_never_committed_push_out_none(export, store, sink, tmp_path) -> None:
    """Steps 3 and 4 failed at their manifests, 5 was under way at a death; the next attempt goes on from 2."""

    def fail(key: str) -> None:
        if key.endswith(("step-3/manifest.json", "step-4/manifest.json", "step-5/manifest.json")):
            raise StorageError("503")

    store.fail = fail
    first = make_writer(export, store, sink, tmp_path, patience=replace(QUICK, consecutive_failures=4))
    for step in (2, 3, 4, 5):
        first.submit(snapshot(export, step))
    first.finish()
    store.fail = lambda key: None
    second = make_writer(export, store, sink, tmp_path)
    second.submit(snapshot(export, 3))
    second.finish()
    assert list(resumable_steps(store, "job-1")) == [3, 2]
    third = make_writer(export, store, sink, tmp_path)
    for step in (4, 5):
        third.submit(snapshot(export, step))
    third.finish()
    assert {item.key.split("/")[2] for item in store.list("resume/")} == {"step-00000004", "step-00000005"}


def test_a_state_of_another_run_is_refused(writer, export, store) -> None:
    writer.submit(snapshot(export, 1))
    writer.finish()
    other = Identity(global_batch=16, samples=21, seed=42, optim="adamw_torch")
    with pytest.raises(StorageError, match="global_batch differ"):
        load_resume_state(store, "job-1", 1, other)


def test_a_state_of_another_base_model_ends_the_job(writer, export, store) -> None:
    """The operator gave its name to another base, or another revision, between two attempts."""
    writer.submit(snapshot(export, 1))
    writer.finish()
    index = json.loads(store.get("resume/job-1/step-00000001/state.json"))
    index["identity"]["base_model"] = "a/b@v1"
    LocalStore.put(store, "resume/job-1/step-00000001/state.json", json.dumps(index).encode())
    assert load_resume_state(store, "job-1", 1, replace(IDENTITY, base_model="a/b@v1"))
    with pytest.raises(ModelError, match="began on base model a/b@v1, and the catalogue now has a/b@v2"):
        load_resume_state(store, "job-1", 1, replace(IDENTITY, base_model="a/b@v2"))


def test_a_state_that_does_not_tell_its_base_model_is_continued(writer, export, store) -> None:
    """Those written before states told it."""
    writer.submit(snapshot(export, 1))
    writer.finish()
    index = json.loads(store.get("resume/job-1/step-00000001/state.json"))
    del index["identity"]["base_model"]
    LocalStore.put(store, "resume/job-1/step-00000001/state.json", json.dumps(index).encode())
    assert load_resume_state(store, "job-1", 1, replace(IDENTITY, base_model="a/b@v1"))[1].step == 1
