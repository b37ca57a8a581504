from __future__ import annotations

import pytest
import torch

from arkor_ray.errors import TrainingError
from arkor_ray.training.adapter_export import check_adapter

A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
SHAPES = {A: torch.Size([2, 8]), B: torch.Size([8, 2])}


def good() -> dict[str, torch.Tensor]:
    return {A: torch.ones(2, 8), B: torch.ones(8, 2)}


def test_a_good_adapter_passes() -> None:
    check_adapter(good(), SHAPES, step=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({A: torch.empty(0)}, r"lora_A.weight of shape \(0,\), not \(2, 8\)"),
        ({B: torch.ones(2, 8)}, r"lora_B.weight of shape"),
        ({B: torch.full((8, 2), float("nan"))}, "not finite: training has diverged"),
        ({A: torch.full((2, 8), float("inf"))}, "not finite"),
        ({B: torch.zeros(8, 2)}, "still zero in every lora_B"),
        ({"other": torch.ones(1)}, r"has besides \['other'\]"),
        ({A: None}, r"lacks \['base_model.model.x.lora_A.weight'\]"),
    ],
)
def test_the_gate_names_what_is_wrong(change, reason) -> None:
    tensors = {name: t for name, t in (good() | change).items() if t is not None}
    with pytest.raises(TrainingError, match=reason):
        check_adapter(tensors, SHAPES, step=3)


def test_before_the_first_update_b_is_zero() -> None:
    check_adapter(good() | {B: torch.zeros(8, 2)}, SHAPES, step=0)
