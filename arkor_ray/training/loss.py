"""The loss: cross-entropy summed over supervised tokens, with logits computed at these positions alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from arkor_ray.training.batches import MicroBatch

Forward = Callable[..., Any]


class SelectiveLoss:
    """Sums the cross-entropy of a causal language model over a micro-batch's targets.

    The hidden states are narrowed to the positions that have a target right before the output head, by a hook on it:
    with a large vocabulary, the head on every position of a padded batch costs more than the rest of the step.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._head = model.get_output_embeddings()  # type: ignore[operator]
        self._positions: torch.Tensor | None = None
        if self._head is not None:
            self._head.register_forward_pre_hook(self._narrow)

    def __call__(self, forward: Forward, batch: MicroBatch, device: torch.device) -> torch.Tensor:
        """A scalar in fp32: the sum, not the mean. Without targets a zero that still has a gradient path."""
        input_ids = torch.as_tensor(batch.input_ids, device=device)
        targets = torch.as_tensor(batch.targets, device=device).reshape(-1)
        positions = torch.nonzero(targets != -100).reshape(-1)
        logits = self.logits(
            forward,
            positions if len(positions) else positions.new_zeros(1),
            input_ids=input_ids,
            attention_mask=torch.as_tensor(batch.attention_mask, device=device),
        )
        if not len(positions):
            return logits.float().sum() * 0.0
        return F.cross_entropy(logits.float(), targets[positions], reduction="sum")

    def logits(self, forward: Forward, positions: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """(len(positions), vocabulary), for positions of the flattened (rows * length) batch."""
        with self._at(positions):
            logits = forward(**inputs, use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1])
        # A model that does not go through its head module (or has none) gave logits everywhere.
        return logits if len(logits) == len(positions) else logits[positions]

    @contextlib.contextmanager
    def _at(self, positions: torch.Tensor) -> Iterator[None]:
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _narrow(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._positions is None:
            return None
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self._positions].unsqueeze(0), *args[1:])
