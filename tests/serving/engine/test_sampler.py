from __future__ import annotations

from collections import Counter

import numpy as np
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


def mask(*tokens: int, words: int = 1) -> np.ndarray:
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_masked_row_draws_what_its_mask_allows(options):
    logits = torch.zeros(1, 70)
    logits[0, 5] = 50.0
    rows = [RowSampler(seed=1, **options)]
    found = {sample(logits, rows, [mask(0, 31, 32, 69, words=3)])[0] for _ in range(200)}
    assert found <= {0, 31, 32, 69} and (len(found) == 4 or not options)
    assert sample(logits, rows, [None]) == [5]


def test_tokens_beyond_the_mask_are_forbidden_and_masks_beyond_the_logits_cut():
    logits = torch.arange(100.0)[None]
    assert sample(logits, [RowSampler()], [mask(3, 31)]) == [31]
    assert sample(logits[:, :40], [RowSampler()], [mask(3, 90, words=3)]) == [3]


def test_masks_touch_their_own_rows_only():
    torch.manual_seed(0)
    logits = torch.randn(3, 64)
    before = logits.clone()
    rows = [RowSampler(temperature=1.0, seed=i) for i in range(3)]
    alone = [RowSampler(temperature=1.0, seed=i) for i in range(3)]
    for _ in range(20):
        found = sample(logits, rows, [None, mask(7, words=2), None])
        assert found[1] == 7
        assert [found[0], found[2]] == [sample(logits[i : i + 1], [alone[i]])[0] for i in (0, 2)]
    assert torch.equal(logits, before)


def test_mask_that_allows_nothing_draws_nothing():
    assert sample(torch.zeros(1, 40), [RowSampler()], [mask(words=2)]) == [None]
