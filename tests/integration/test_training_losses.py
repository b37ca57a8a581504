"""The loss curve is that of a plain PyTorch and PEFT loop on the same batches, however the work is cut up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arkor_ray.training.data import prepare_data
from arkor_ray.training.job_spec import JobSpec
from arkor_ray.training.model import load_tokenizer
from arkor_ray.training.train_loop import batch_plan
from tests.training.process_group import LoopRun, run_in_group
from tests.training.tiny import make_base_model, make_spec

pytestmark = pytest.mark.integration

STEPS = 8  # 21 rows in global batches of 8: the third of each epoch has only 5
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("losses")


def job(folder, base, name: str, **config) -> JobSpec:
    """Global batch 8 either way, and ragged lengths; 2 micro-batches a step."""
    return make_spec(folder / name, base, name, gradientAccumulationSteps=2, maxSteps=STEPS, warmupSteps=2, **config)


@pytest.fixture(scope="module")
def world_1(folder, base) -> dict[str, LoopRun]:
    specs = {f"w1-z{z}": job(folder, base, f"w1-z{z}", batchSize=4, zeroStage=z) for z in (0, 2, 3)}
    done = run_in_group([LoopRun(spec) for spec in specs.values()], 1, folder / "world-1")
    return dict(zip(specs, done, strict=True))


@pytest.fixture(scope="module")
def world_2(folder, base) -> dict[str, LoopRun]:
    specs = {f"w2-z{z}": job(folder, base, f"w2-z{z}", batchSize=2, numWorkers=2, zeroStage=z) for z in (0, 1, 2, 3)}
    specs |= {
        f"bf16-z{z}": job(folder, base, f"bf16-z{z}", batchSize=2, numWorkers=2, zeroStage=z, precision="bf16")
        for z in (0, 2, 3)
    }
    done = run_in_group([LoopRun(spec) for spec in specs.values()], 2, folder / "world-2")
    return dict(zip(specs, done, strict=True))


@pytest.fixture(scope="module")
def oracle(folder, base) -> list[float]:
    return plain_losses(job(folder, base, "oracle", batchSize=4))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_one_worker(world_1, oracle, zero_stage) -> None:
    assert list(world_1[f"w1-z{zero_stage}"].losses.values()) == pytest.approx(oracle, abs=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_workers(world_2, oracle, zero_stage) -> None:
    assert list(world_2[f"w2-z{zero_stage}"].losses.values()) == pytest.approx(oracle, abs=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bf16_follows_within_its_rounding(world_2, oracle, zero_stage) -> None:
    assert list(world_2[f"bf16-z{zero_stage}"].losses.values()) == pytest.approx(oracle, abs=0.1)


def test_the_curve_moves(oracle) -> None:
    """Otherwise the comparisons above would show nothing."""
    assert oracle[0] - oracle[-1] > 0.2


def plain_losses(spec: JobSpec) -> list[float]:
    """Whole global batches, full logits, torch's own clipping: nothing shared with the train loop but the order of the rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler

    config = spec.config
    tokenizer = load_tokenizer(spec.base_model)
    data = prepare_data(spec, tokenizer, 128).train
    plan = batch_plan(config, len(data), 1)
    model = AutoModelForCausalLM.from_pretrained(spec.base_model, dtype=torch.float32)
    torch.manual_seed(config.seed)
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    losses = []
    for step in range(1, STEPS + 1):
        samples = [data.sample(int(i)) for i in plan.global_indices(step)]
        longest = max(len(ids) for ids, _ in samples)
        ids = torch.full((len(samples), longest), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (tokens, supervised) in enumerate(samples):
            tokens, supervised = torch.tensor(tokens).long(), torch.tensor(supervised)
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)] = torch.where(supervised, tokens, -100)
        attention = torch.stack([torch.arange(longest) < len(tokens) for tokens, _ in samples]).long()
        logits = model(input_ids=ids, attention_mask=attention).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses
