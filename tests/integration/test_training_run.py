"""Whole runs: what they leave in storage, what they tell, and what they make of trouble."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch

from arkor_ray.errors import ServiceUnavailableError, StorageError, TrainingError
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.training.bare import run_bare
from arkor_ray.training.callbacks import ListEventSink
from arkor_ray.training.loop_config import StoragePatience
from tests.training.process_group import LoopRun, run_in_group
from tests.training.tiny import make_base_model, make_spec

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base_model(tmp_path_factory.mktemp("base"))


def run_here(spec, stop_after_step=None, **options) -> LoopRun:
    """In this process, without other workers."""
    run = LoopRun(spec, sink=ListEventSink(stop_after_step))
    run.result = run_bare(spec, run.sink, **options)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base) -> LoopRun:
    """8 steps with evaluation, a checkpoint every 4, and a log entry every 3."""
    folder = tmp_path_factory.mktemp("finished")
    return run_here(make_spec(folder, base, loggingSteps=3, evalSteps=4))


def manifest_of(run: LoopRun, adapter_id: str) -> CheckpointManifest:
    return CheckpointManifest.from_bytes(run.spec.open_store().get(f"adapters/{adapter_id}/manifest.json"))


def load_with_peft(run: LoopRun, adapter_id: str, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    store = run.spec.open_store()
    for item in store.list(f"adapters/{adapter_id}/"):
        store.get_file(item.key, folder / item.key)
    base = AutoModelForCausalLM.from_pretrained(run.spec.base_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "adapters" / adapter_id).eval()


@pytest.mark.parametrize("adapter_id", ["job-1-step-4", "job-1-final"])
def test_adapter_loads_with_peft_and_says_what_training_said(finished, tmp_path, adapter_id) -> None:
    model = load_with_peft(finished, adapter_id, tmp_path)
    probe = manifest_of(finished, adapter_id).probe
    ids = torch.tensor(probe.token_ids)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        with model.disable_adapter():
            base = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(probe.logprobs, abs=1e-4)
    assert (base - logprobs).abs().max() > 0.1, "the adapter changes something"


def test_manifest_tells_the_files_by_hash(finished) -> None:
    import hashlib

    store = finished.spec.open_store()
    for manifest in (CheckpointManifest.model_validate(m) for m in finished.sink.of("checkpoint")):
        names = {file.path for file in manifest.files}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= names
        for file in manifest.files:
            data = store.get(f"adapters/{manifest.adapter_id}/{file.path}")
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size_bytes, file.sha256)


def test_events_are_in_order(finished) -> None:
    calls = finished.sink.calls
    told = [(c[0], c[1].get("step")) if c[0] in ("log", "checkpoint") else c[:2] for c in calls if c[0] != "started"]
    assert calls[0][0] == "started"
    assert [t for t in told if t[0] == "log"] == [("log", 3), ("log", 4), ("log", 6), ("log", 8), ("log", 8)]
    for step in (4, 8):
        staged, committed = told.index(("stage", f"job-1-step-{step}")), told.index(("checkpoint", step))
        assert told.index(("log", step)) < staged < committed
    assert calls[-1][0] == "checkpoint" and calls[-1][1]["final"]
    assert finished.result.final_manifest == calls[-1][1]


def test_evaluation_is_the_mean_over_the_held_out_rows(finished, tmp_path) -> None:
    from arkor_ray.training.data import prepare_data
    from arkor_ray.training.model import load_tokenizer

    data = prepare_data(finished.spec, load_tokenizer(finished.spec.base_model), 128)
    assert (len(data.train), len(data.evaluation)) == (18, 3)
    model = load_with_peft(finished, "job-1-step-8", tmp_path)
    summed = 0.0
    for index in range(3):
        ids, supervised = (torch.tensor(array) for array in data.evaluation.sample(index))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None].long()).logits[0, :-1], -1)
        picked = logprobs.gather(1, ids[1:, None].long())[:, 0]
        summed -= float(picked[supervised[1:]].sum())
    expected = summed / int(data.evaluation.supervised.sum())
    entry = next(e for e in finished.sink.of("log") if e["step"] == 8 and "eval_loss" in e)
    assert entry["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_log_entries_average_over_tokens_since_the_last_also_across_a_restart(base, tmp_path) -> None:
    each = run_here(make_spec(tmp_path / "each", base, maxSteps=6, loggingSteps=1))
    some = make_spec(tmp_path / "some", base, maxSteps=6, loggingSteps=3, saveSteps=2)
    stopped = run_here(some, stop_after_step=3)  # stops at 4, with step 4 counted but not logged
    assert stopped.result.stopped and stopped.result.step == 4 and stopped.result.final_manifest is None
    resumed = run_here(some)
    assert list(stopped.losses) == [3] and list(resumed.losses) == [6]
    tokens = _supervised_tokens(each.spec)
    for last, losses in ((3, stopped.losses), (6, resumed.losses)):
        steps = range(last - 2, last + 1)
        mean = sum(each.losses[s] * tokens[s] for s in steps) / sum(tokens[s] for s in steps)
        assert losses[last] == pytest.approx(mean, abs=1e-5)


class UnheardSink(ListEventSink):
    """Tells of no log entry that it is durable, as when the recorder is away until the process dies."""

    def unrecorded(self):
        return self.of("log")


def test_log_entries_that_were_not_recorded_when_a_checkpoint_was_made_are_told_again(base, tmp_path) -> None:
    spec = make_spec(tmp_path, base, maxSteps=6, saveSteps=2)
    stopped, resumed = UnheardSink(stop_after_step=2), ListEventSink()
    run_bare(spec, stopped)
    run_bare(spec, resumed)
    before, after = stopped.of("log"), resumed.of("log")
    assert [entry["step"] for entry in before] == [1, 2, 3]
    assert after[:3] == before
    assert [entry["step"] for entry in after] == [1, 2, 3, 4, 5, 6]
    assert resumed.calls[0][0] == "started"


def test_a_batch_that_does_not_fit_into_memory_is_cut_up_and_trains_the_same(base, tmp_path, monkeypatch) -> None:
    from arkor_ray.training import trainer
    from arkor_ray.training.data import prepare_data
    from arkor_ray.training.loss import SelectiveLoss
    from arkor_ray.training.model import load_tokenizer
    from arkor_ray.training.train_loop import train_loop_per_worker

    whole = run_here(make_spec(tmp_path / "whole", base, batchSize=5))
    cut = LoopRun(make_spec(tmp_path / "cut", base, batchSize=5), sink=ListEventSink())
    forward = SelectiveLoss.__call__

    def small_card(loss, engine, batch, device):
        if len(batch.input_ids) > 2 and 5 in cut.losses:  # as with longer rows, after the checkpoint of step 4
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(loss, engine, batch, device)

    monkeypatch.setattr(SelectiveLoss, "__call__", small_card)
    monkeypatch.setattr(trainer, "_fit", lambda loop: train_loop_per_worker(replace(loop, make_sink=lambda: cut.sink)))
    monkeypatch.setattr(trainer.ray, "put", lambda value: value)
    data = prepare_data(cut.spec, load_tokenizer(cut.spec.base_model), 128)
    assert trainer.fit(cut.spec, data, recorder=None).step == 8
    assert [told["batch_size"] for told in cut.sink.of("started")] == [5, 2]
    assert [told["global_batch_size"] for told in cut.sink.of("started")] == [5, 5]
    assert [entry["step"] for entry in cut.sink.of("log")] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert cut.losses == pytest.approx(whole.losses, abs=1e-4)


def _supervised_tokens(spec) -> dict[int, int]:
    from arkor_ray.training.data import prepare_data
    from arkor_ray.training.model import load_tokenizer
    from arkor_ray.training.train_loop import batch_plan

    data = prepare_data(spec, load_tokenizer(spec.base_model), 128).train
    plan = batch_plan(spec.config, len(data), 1)
    return {step: data.supervised_tokens(plan.global_indices(step)) for step in range(1, 7)}


def test_only_the_newest_resume_states_are_kept(finished, base, tmp_path) -> None:
    run = run_here(make_spec(tmp_path, base, maxSteps=5, saveSteps=1))
    prefixes = {item.key.split("/")[2] for item in run.spec.open_store().list("resume/")}
    assert prefixes == {"step-00000004", "step-00000005"}
    assert [m["adapter_id"] for m in run.sink.of("checkpoint")] == [
        *(f"job-1-step-{n}" for n in range(1, 6)),
        "job-1-final",
    ]


def test_a_damaged_newest_resume_state_costs_its_steps_and_not_the_job(base, tmp_path) -> None:
    spec = make_spec(tmp_path, base, maxSteps=6, saveSteps=2, loggingSteps=1)
    stopped = run_here(spec, stop_after_step=4)  # stops at 5
    store, key = spec.open_store(), "resume/job-1/step-00000005/state.safetensors"
    store.put(key, store.get(key)[:-1] + b"!")
    resumed = run_here(spec)
    assert list(resumed.losses) == [5, 6]
    assert resumed.losses[5] == pytest.approx(stopped.losses[5], abs=1e-5)
    told = {m["step"]: m for m in resumed.sink.of("checkpoint")}
    assert told[2] == stopped.sink.of("checkpoint")[0] and told[6]["final"]


def test_dry_run_passes_every_stage(base, tmp_path) -> None:
    run = run_here(make_spec(tmp_path, base, rows=80, maxSteps=200, dryRun=True, saveSteps=5, evalSteps=5))
    assert run.result.step == 10
    assert run.sink.of("started")[0]["train_samples"] == 45
    assert [m["adapter_id"] for m in run.sink.of("checkpoint")] == ["job-1-step-5", "job-1-step-10", "job-1-final"]


def test_a_finished_job_leaves_nothing_on_the_disk_of_its_node(finished) -> None:
    assert list(finished.spec.scratch_dir.glob("checkpoints/*")) == []


def test_a_finished_job_started_again_only_tells_its_checkpoints(finished) -> None:
    again = run_here(finished.spec)
    assert again.sink.of("log") == []
    assert again.result.final_manifest == finished.result.final_manifest
    assert [m["adapter_id"] for m in again.sink.of("checkpoint")] == ["job-1-step-4", "job-1-step-8", "job-1-final"]


class SilentAtTheEnd(ListEventSink):
    """Nothing reaches the recorder once training is over."""

    def flush(self, timeout: float) -> None:
        raise ServiceUnavailableError("no recorder")


def test_a_recorder_that_is_away_at_the_end_leaves_the_next_attempt_only_the_last_word(base, tmp_path) -> None:
    spec, silent = make_spec(tmp_path, base, maxSteps=4, saveSteps=2), SilentAtTheEnd()
    with pytest.raises(ServiceUnavailableError):
        run_bare(spec, silent)
    again = run_here(spec)
    assert again.sink.of("log") == []
    assert again.result.final_manifest == silent.of("checkpoint")[-1]


def test_diverged_loss_fails_with_the_step(base, tmp_path) -> None:
    sink = ListEventSink()
    spec = make_spec(tmp_path, base, maxSteps=20, learningRate=10, optim="sgd", saveSteps=50)
    spec.config.learning_rate = float("inf")
    with pytest.raises(TrainingError, match="not a finite number in 3 steps") as raised:
        run_bare(spec, sink)
    last = sink.of("log")[-1]
    assert math.isnan(last["loss"]) and last["step"] == raised.value.fields["step"]


class FailingStore:
    """A store whose puts fail, from the first checkpoint on, until `seconds` have passed; for ever when None."""

    def __init__(self, inner, seconds: float | None) -> None:
        self._inner, self._seconds, self._until = inner, seconds, None

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put_file(self, key, path, *, if_absent=False) -> None:
        if self._until is None:
            self._until = time.monotonic() + (math.inf if self._seconds is None else self._seconds)
        if time.monotonic() < self._until:
            raise StorageError("503 Slow Down")
        self._inner.put_file(key, path, if_absent=if_absent)


def test_storage_fault_delays_a_checkpoint(base, tmp_path) -> None:
    spec = make_spec(tmp_path, base, maxSteps=4, saveSteps=2)
    run = run_here(spec, store=FailingStore(spec.open_store(), 3.0))
    assert [m["adapter_id"] for m in run.sink.of("checkpoint")] == ["job-1-step-2", "job-1-step-4", "job-1-final"]
    delayed = [call[2] for call in run.sink.calls if call[:2] == ("notice", "checkpoint.delayed")]
    assert delayed and delayed[0]["step"] == 2 and "503" in delayed[0]["reason"]


def test_storage_that_stays_away_ends_the_job_and_keeps_the_adapters(base, tmp_path) -> None:
    spec = make_spec(tmp_path, base, maxSteps=400, saveSteps=1)
    patience = StoragePatience(RetryPolicy(budget_seconds=0.5, first_delay_seconds=0.05), consecutive_failures=2)
    sink = ListEventSink()
    with pytest.raises(TrainingError, match=r"2 checkpoints in a row could not be stored.*503") as raised:
        run_bare(spec, sink, store=FailingStore(spec.open_store(), None), patience=patience)
    assert sink.of("checkpoint") == []
    (kept,) = spec.scratch_dir.glob("checkpoints/job-1.*/job-1-step-1/adapter/adapter_model.safetensors")
    assert str(kept.parents[2]) in str(raised.value)


def test_qlora_on_two_workers(base, tmp_path) -> None:
    config = {"loadIn4bit": True, "numWorkers": 2, "maxSteps": 6, "learningRate": 1e-2}
    # Checkpoints and evaluations run the model in eval mode, which must not change what training does.
    jobs = {"z0": {"zeroStage": 0, "saveSteps": 1, "evalSteps": 2}, "z2": {"zeroStage": 2, "saveSteps": 6}}
    jobs["z2"]["datasetSplit"] = {"enabled": True}  # the same rows, looked at only in the end
    specs = [make_spec(tmp_path / name, base, name, **config, **job) for name, job in jobs.items()]
    zero_0, zero_2 = run_in_group([LoopRun(spec) for spec in specs], 2, tmp_path / "group")
    assert zero_0.losses == pytest.approx(zero_2.losses, abs=1e-4)
    assert zero_0.losses[1] - zero_0.losses[6] > 0.1
    assert manifest_of(zero_0, "z0-final").base_precision == "nf4"
