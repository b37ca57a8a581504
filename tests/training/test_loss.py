"""The narrowed head gives the same sum and gradients as full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arkor_ray.training.batches import TokenizedDataset, collate
from arkor_ray.training.loss import SelectiveLoss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(base_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)


def ragged() -> TokenizedDataset:
    lengths = [5, 9, 3]
    rng = np.random.default_rng(0)
    ids = rng.integers(7, 250, sum(lengths)).astype(np.int32)
    return TokenizedDataset(ids, rng.random(sum(lengths)) < 0.4, np.cumsum([0, *lengths]))


def gradient(model) -> torch.Tensor:
    grad = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    return grad


def test_equals_full_logits(model) -> None:
    batch = collate(ragged(), np.array([0, 1, 2]), pad_token_id=0)
    logits = model(torch.tensor(batch.input_ids), attention_mask=torch.tensor(batch.attention_mask)).logits
    full = F.cross_entropy(logits.flatten(0, 1), torch.tensor(batch.targets).flatten(), reduction="sum")
    full.backward()
    expected = gradient(model)
    summed = SelectiveLoss(model)(model, batch, CPU)
    summed.backward()
    assert float(summed.detach()) == pytest.approx(float(full.detach()), rel=1e-5)
    assert torch.allclose(gradient(model), expected, atol=1e-5)


def test_the_head_sees_only_positions_with_a_target(model) -> None:
    batch = collate(ragged(), np.array([0, 1, 2]), pad_token_id=0)
    loss, seen = SelectiveLoss(model), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    loss(model, batch, CPU)
    handle.remove()
    assert seen == [int((batch.targets != -100).sum())]


def test_without_targets_a_zero_with_a_gradient(model) -> None:
    nothing = SelectiveLoss(model)(model, collate(ragged(), np.array([], dtype=int), 0), CPU)
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    assert not gradient(model).any()


def test_outside_of_the_loss_logits_are_whole(model) -> None:
    SelectiveLoss(model)
    assert model(torch.tensor([[7, 8, 9]])).logits.shape[:2] == (1, 3)
