"""Which samples each step sees, and how they become tensors.

The order is a function of seed, epoch and global sample index alone, so it does not depend on the number of workers,
and a run can go on from any step on another number of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class TokenizedDataset:
    """Samples end to end: `input_ids` int32 and `supervised` bool, both (tokens,); sample i is offsets[i]:offsets[i + 1].

    Flat arrays, so that Ray's object store hands them to all workers of a machine without a copy.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(samples,) tokens per sample."""
        return np.diff(self.offsets)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.input_ids[start:end], self.supervised[start:end]

    def supervised_tokens(self, indices: np.ndarray) -> int:
        """How many tokens of these samples the loss covers."""
        return sum(int(np.count_nonzero(self.sample(int(i))[1])) for i in indices)


@dataclass(frozen=True)
class BatchPlan:
    """How `samples` are cut into steps: the global batch is the user's, whatever number of workers there is.

    `micro_batch` rows go through one worker's forward pass; `accumulation` of these make a step.
    """

    samples: int
    global_batch: int
    micro_batch: int
    world_size: int
    seed: int

    @property
    def accumulation(self) -> int:
        return math.ceil(self.global_batch / (self.micro_batch * self.world_size))

    @property
    def steps_per_epoch(self) -> int:
        """The last, partial batch of an epoch is a step too."""
        return math.ceil(self.samples / self.global_batch)

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + rest / self.steps_per_epoch

    def samples_seen(self, step: int) -> int:
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole * self.samples + rest * self.global_batch

    def global_indices(self, step: int) -> np.ndarray:
        """The samples of step `step` (from 1), at most `global_batch` of them."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return _epoch_order(self.seed, epoch, self.samples)[index * self.global_batch : (index + 1) * self.global_batch]

    def micro_indices(self, step: int, rank: int) -> list[np.ndarray]:
        """This worker's share of the step: `accumulation` slices of up to `micro_batch` samples, some perhaps empty."""
        batch, size = self.global_indices(step), self.micro_batch
        starts = ((micro * self.world_size + rank) * size for micro in range(self.accumulation))
        return [batch[start : start + size] for start in starts]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(samples)


@dataclass(frozen=True)
class MicroBatch:
    """`input_ids` and `attention_mask` int64 (rows, length), padded at the right; `targets` int64 (rows, length): the token
    that position t must predict, or -100 where the loss does not look."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    targets: np.ndarray


def collate(dataset: TokenizedDataset, indices: np.ndarray, pad_token_id: int) -> MicroBatch:
    """Without samples, a batch of two pad tokens and no target: the worker must still take part in the step's collectives."""
    samples = [dataset.sample(int(i)) for i in indices]
    shape = (max(1, len(samples)), max([2, *(len(ids) for ids, _ in samples)]))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, -100, dtype=np.int64)
    for row, (ids, supervised) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        targets[row, : len(ids) - 1] = np.where(supervised[1:], ids[1:], -100)
    if not samples:
        attention_mask[:] = 1
    return MicroBatch(input_ids, attention_mask, targets)
