"""From logits to tokens, each row by its own rules and its own random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch


@dataclass
class RowSampler:
    """How one request draws its tokens. The n-th token of a seed uses the n-th number of that seed's own generator, so
    that neither the neighbours in the batch nor the row the request sits in can change it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _numbers: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._numbers = random.Random(self.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature <= 0.0

    def draw(self) -> float:
        """The next number in [0, 1)."""
        return self._numbers.random()


def sample(
    logits: torch.Tensor, rows: Sequence[RowSampler], masks: Sequence[npt.NDArray[np.int32] | None] = ()
) -> list[int | None]:
    """One token for each row of `logits` [n, vocab]; None for a row whose logits are not finite.

    `masks`, if given, has for each row None or the bits of the tokens it may draw, as `TokenGrammar.mask` gives them.
    """
    logits = logits.float()
    if any(mask is not None for mask in masks):
        logits = logits.masked_fill(_forbidden(masks, logits.shape[-1]).to(logits.device), -torch.inf)
    best, tokens = logits.max(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if drawn:
        tokens = tokens.clone()
        for nucleus in (False, True):
            part = [i for i in drawn if (rows[i].top_p < 1.0) == nucleus]
            if part:
                tokens[part] = _draw(logits[part], [rows[i] for i in part], nucleus)
    finite = torch.isfinite(best)
    return [token if ok else None for token, ok in zip(tokens.tolist(), finite.tolist(), strict=True)]


def _forbidden(masks: Sequence[npt.NDArray[np.int32] | None], vocab: int) -> torch.Tensor:
    """Booleans [masks, vocab]. A model's vocabulary is often padded beyond its tokenizer's: the padding is forbidden."""
    words = -(-vocab // 32)
    packed = np.zeros((len(masks), words), dtype=np.int32)
    for row, mask in zip(packed, masks, strict=True):
        if mask is not None:
            row[:] = -1
            row[: len(mask)] = ~mask[:words]
    bits = np.unpackbits(packed.view(np.uint8), axis=1, count=vocab, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool)


def _draw(logits: torch.Tensor, rows: list[RowSampler], nucleus: bool) -> torch.Tensor:
    """Inverse transform sampling; sorting, which is slow on large vocabularies, only where top_p asks for it."""
    device = logits.device
    # Shifted before the division: a tiny temperature must sharpen, not overflow.
    shifted = (logits - logits.max(dim=-1, keepdim=True).values).double()
    temperature = torch.tensor([row.temperature for row in rows], device=device, dtype=torch.float64)
    probabilities = torch.softmax(shifted / temperature[:, None], dim=-1)
    order = None
    if nucleus:
        probabilities, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        top_p = torch.tensor([row.top_p for row in rows], device=device, dtype=torch.float64)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        outside = before >= top_p[:, None]
        outside[:, 0] = False
        probabilities = probabilities.masked_fill(outside, 0.0)
    cumulative = torch.cumsum(probabilities, dim=-1)
    total = cumulative[:, -1]
    points = torch.tensor([row.draw() for row in rows], device=device, dtype=torch.float64) * total
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not reach the end
    picks = torch.searchsorted(cumulative, points[:, None], right=True)
    return (picks if order is None else order.gather(1, picks))[:, 0]
