"""A run that was stopped and went on, elsewhere or not, has the loss curve of one that never stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arkor_ray.training.job_spec import JobSpec
from tests.training.process_group import LoopRun, run_in_group
from tests.training.tiny import make_base_model, make_spec

pytestmark = pytest.mark.integration

STEPS, STOP = 8, 3
# At r = 64 every LoRA tensor has the 4096 elements from which on bitsandbytes uses 8 bits.
JOBS = {
    "z0": {"zeroStage": 0},
    "z2": {"zeroStage": 2},
    "z3": {"zeroStage": 3},
    "z2-bf16": {"zeroStage": 2, "precision": "bf16"},
    "z0-8bit": {"zeroStage": 0, "optim": "adamw_8bit", "loraR": 64},
    "z2-8bit": {"zeroStage": 2, "optim": "adamw_8bit", "loraR": 64},
    "z3-8bit": {"zeroStage": 3, "optim": "paged_adamw_8bit", "loraR": 64},
    "z2-sgd": {"zeroStage": 2, "optim": "sgd"},
}
MOVED = ["z0", "z2", "z3", "z2-8bit"]  # from two workers to one
RESHARDED = {"z2": 3, "z3": 0}  # to another ZeRO stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def curves(folder) -> dict[str, dict[int, float]]:
    """Loss by step: "<job>" uninterrupted, "<job> again" stopped and resumed by two workers, "<job> moved" by one."""
    base = make_base_model(folder / "base")

    def job(name: str, kind: str) -> JobSpec:
        config = {
            "numWorkers": 2,
            "gradientAccumulationSteps": 2,
            "maxSteps": STEPS,
            "saveSteps": 50,
            "learningRate": 3e-3,
        }
        return make_spec(folder / f"{name}-{kind}", base, f"{name}-{kind}", **(config | JOBS[name]))

    runs: dict[str, LoopRun] = {}
    for name in JOBS:
        runs[name] = LoopRun(job(name, "whole"))
        runs[f"{name} stopped"] = LoopRun(job(name, "again"), stop_after_step=STOP - 1)
        runs[f"{name} again"] = LoopRun(job(name, "again"))
    for name in MOVED:
        runs[f"{name} left"] = LoopRun(job(name, "moved"), stop_after_step=STOP - 1)
    for name, stage in RESHARDED.items():
        first = job(name, "resharded")
        second = replace(first, config=first.config.model_copy(update={"zero_stage": stage}))
        runs[f"{name} dropped"] = LoopRun(first, stop_after_step=STOP - 1)
        runs[f"{name} resharded"] = LoopRun(second)
    done = dict(zip(runs, run_in_group(list(runs.values()), 2, folder / "two"), strict=True))
    moved = {f"{name} moved": LoopRun(job(name, "moved")) for name in MOVED}
    moved_done = run_in_group(list(moved.values()), 1, folder / "one")
    done |= dict(zip(moved, moved_done, strict=True))
    return {name: run.losses for name, run in done.items()}


@pytest.mark.parametrize("name", JOBS)
def test_same_workers(curves, name) -> None:
    assert list(curves[f"{name} stopped"]) == [1, 2, 3]
    assert curves[f"{name} stopped"] | curves[f"{name} again"] == pytest.approx(curves[name], abs=1e-5)
    assert list(curves[f"{name} again"]) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", MOVED)
def test_two_workers_then_one(curves, name) -> None:
    """8-bit moments are quantised anew, in blocks that lie elsewhere."""
    tolerance = 0.01 if "8bit" in name else 1e-5
    assert list(curves[f"{name} moved"]) == [4, 5, 6, 7, 8]
    assert curves[f"{name} left"] | curves[f"{name} moved"] == pytest.approx(curves[name], abs=tolerance)


@pytest.mark.parametrize("name", RESHARDED)
def test_another_zero_stage(curves, name) -> None:
    assert list(curves[f"{name} resharded"]) == [4, 5, 6, 7, 8]
    assert curves[f"{name} dropped"] | curves[f"{name} resharded"] == pytest.approx(curves[name], abs=1e-5)
