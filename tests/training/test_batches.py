from __future__ import annotations

import numpy as np
import pytest

from arkor_ray.training.batches import BatchPlan, TokenizedDataset, collate


def plan(**changes) -> BatchPlan:
    return BatchPlan(**({"samples": 21, "global_batch": 8, "micro_batch": 2, "world_size": 2, "seed": 1} | changes))


def dataset(lengths: list[int]) -> TokenizedDataset:
    total = sum(lengths)
    supervised = np.arange(total) % 2 == 1
    return TokenizedDataset(np.arange(100, 100 + total, dtype=np.int32), supervised, np.cumsum([0, *lengths]))


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    epochs = [[int(i) for step in steps for i in plan().global_indices(step)] for steps in ((1, 2, 3), (4, 5, 6))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(21))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 2), (2, 4), (4, 2), (2, 3)])
def test_workers_share_the_same_global_batch(world_size, micro_batch) -> None:
    reference, cut = plan(), plan(world_size=world_size, micro_batch=micro_batch)
    for step in range(1, 8):
        slices = [cut.micro_indices(step, rank) for rank in range(world_size)]
        assert {len(s) for s in slices} == {cut.accumulation}, "all workers make as many forward passes"
        seen = sorted(int(i) for worker in slices for micro in worker for i in micro)
        assert seen == sorted(reference.global_indices(step).tolist())


def test_the_last_batch_is_kept() -> None:
    assert plan().steps_per_epoch == 3
    assert len(plan().global_indices(3)) == 5
    assert [len(m) for m in plan().micro_indices(3, 0)] == [2, 1]
    assert [len(m) for m in plan().micro_indices(3, 1)] == [2, 0]


def test_epochs_and_samples_count_from_steps() -> None:
    assert [plan().epoch(step) for step in (0, 3, 4)] == [0, 1, pytest.approx(4 / 3)]
    assert [plan().samples_seen(step) for step in (0, 2, 3, 4)] == [0, 16, 21, 29]


def test_another_seed_is_another_order() -> None:
    assert plan().global_indices(1).tolist() != plan(seed=2).global_indices(1).tolist()


def test_collate_pads_at_the_right_and_shifts_targets() -> None:
    batch = collate(dataset([2, 3]), np.array([1, 0]), pad_token_id=9)
    assert batch.input_ids.tolist() == [[102, 103, 104], [100, 101, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets.tolist() == [[103, -100, -100], [101, -100, -100]]


def test_collate_of_nothing_has_no_target() -> None:
    batch = collate(dataset([2]), np.array([], dtype=int), pad_token_id=9)
    assert batch.input_ids.tolist() == [[9, 9]]
    assert (batch.targets == -100).all() and (batch.attention_mask == 1).all()
