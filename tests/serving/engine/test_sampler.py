from __future__ import annotations

from collections import Counter

import pytest
import torch

from arkor_ray.serving.engine.sampler import RowSampler, sample


def draws(logits: list[float], count: int, **options: float) -> Counter[int | None]:
    sampler = RowSampler(seed=1, **options)  # type: ignore[arg-type]
    return Counter(sample(torch.tensor([logits]), [sampler])[0] for _ in range(count))


def test_temperature_zero_takes_the_largest():
    assert draws([0.0, 3.0, 2.9], 50) == {1: 50}


def test_frequencies_follow_the_probabilities():
    found = draws(torch.tensor([0.5, 0.3, 0.2]).log().tolist(), 4000, temperature=1.0)
    assert [found[i] / 4000 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_temperature_flattens():
    logits = torch.tensor([0.64, 0.36]).log().tolist()
    found = draws(logits, 4000, temperature=2.0)
    assert found[0] / 4000 == pytest.approx(0.8 / 1.4, abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().tolist()
    assert set(draws(logits, 500, temperature=1.0, top_p=0.79)) == {1, 2}
    assert set(draws(logits, 500, temperature=1.0, top_p=0.49)) == {1}
    assert set(draws(logits, 500, temperature=1.0, top_p=1e-9)) == {1}


def test_tiny_temperature_is_nearly_greedy():
    assert draws([0.0, 90.0, 89.0], 50, temperature=1e-6) == {1: 50}
    assert draws([0.0, 90.0, 89.0], 50, temperature=1e-6, top_p=0.9) == {1: 50}


def test_rows_draw_by_their_own_rules_in_any_company():
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    options = [{"temperature": 1.0, "seed": 3}, {}, {"temperature": 0.7, "top_p": 0.8, "seed": 4}]
    together = [RowSampler(**o) for o in options]
    alone = [RowSampler(**o) for o in options]
    for _ in range(20):
        mixed = sample(logits, together)
        assert mixed == [sample(logits[i : i + 1], [alone[i]])[0] for i in range(3)]
        assert mixed[1] == int(logits[1].argmax())


def test_row_that_is_not_finite_is_told_apart():
    logits = torch.zeros(2, 5)
    logits[0, 2] = float("nan")
    assert sample(logits, [RowSampler(), RowSampler(temperature=1.0, seed=1)])[0] is None
