from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.job import LR_SCHEDULERS, OPTIMIZERS
from arkor_ray.training.batches import BatchPlan
from arkor_ray.training.deepspeed import LearningRate, engine_config, make_optimizer
from tests.training.tiny import make_spec

TOTAL = 20


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rate_is_that_of_transformers(base_model, tmp_path, name, warmup) -> None:
    spec = make_spec(tmp_path, base_model, lrSchedulerType=name, warmupSteps=warmup, maxSteps=TOTAL)
    ours = LearningRate(spec.config, TOTAL)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=spec.config.learning_rate)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL)
    for step in range(1, TOTAL + 1):
        assert ours.at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        theirs.step()


def test_warmup_may_be_a_share_of_the_run(base_model, tmp_path) -> None:
    config = make_spec(tmp_path, base_model, warmupSteps={"ratio": 0.25}, maxSteps=TOTAL).config
    rates = [LearningRate(config, TOTAL).at(step) for step in range(1, 8)]
    assert rates.index(max(rates)) == 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_accepted_optimizer_updates(name) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = make_optimizer(name, [parameter], 0.1, 0.01)
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


def test_other_optimizers_are_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequestError, match=r"adafactor.*adamw_torch, adamw_torch_fused"):
        make_optimizer("adafactor", [], 0.1, 0.0)


@pytest.mark.parametrize(("precision", "asked", "stage"), [("fp32", 0, 0), ("bf16", 0, 1), ("fp16", 3, 3)])
def test_half_precision_keeps_master_weights(base_model, tmp_path, precision, asked, stage) -> None:
    config = make_spec(tmp_path, base_model, zeroStage=asked).config
    made = engine_config(config, BatchPlan(20, 8, 2, 2, 0), precision)
    assert made["zero_optimization"]["stage"] == stage
    assert (made["bf16"]["enabled"], made["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (2, 2)
