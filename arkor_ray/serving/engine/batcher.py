"""Which requests run in which rows, and which wait. No model and no clock of its own here.

Rows are kept compact: the decoding sequences sit in rows 0 to d - 1, the one whose prompt is being read sits in row d.
One prompt is read at a time, in chunks, so that a decode step comes between any two chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch

from arkor_ray.serving.engine.interface import GenRequest, TokenEvent
from arkor_ray.serving.engine.lora_weights import LoraWeights
from arkor_ray.serving.engine.sampler import RowSampler
from arkor_ray.serving.engine.slot_layout import SlotLayout
from arkor_ray.serving.engine.slot_table import SlotTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Packed:
    """An adapter ready to be copied into a slot."""

    weights: LoraWeights
    layout: SlotLayout
    flat: torch.Tensor


class Placing(Enum):
    """What became of an attempt to give a sequence its slot."""

    READY = "ready"
    FULL = "every slot has live requests"
    ABSENT = "the weights must be read first"
    REFUSED = "it cannot be had, and the sequence has been told why"


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine. `emit` receives its tokens, then nothing more; or one exception."""

    request: GenRequest
    emit: Callable[[TokenEvent | list[float] | Exception], None]
    reread: Callable[[], Future[Packed]]
    """Begins to read the adapter's weights again, if it was evicted while the request waited."""
    submitted: float
    scoring: bool = False
    packed: Packed | None = None
    reading: Future[Packed] | None = None
    slot: int | None = None
    pinned: bool = False
    read: int = 0
    """Prompt tokens that are in the cache."""
    tokens: list[int] = field(default_factory=list)
    """Generated so far."""
    logprobs: list[float] = field(default_factory=list)
    """Of a scored prompt."""
    finite: bool = False
    """Whether the logits that it led to last were looked at and found finite, hence also what is in the cache."""
    mask: Future[npt.NDArray[np.int32]] | None = None
    """What the request's grammar allows next, perhaps still being computed; asked for at `mask_asked`."""
    mask_asked: float = 0.0
    sampler: RowSampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = RowSampler(self.request.temperature, self.request.top_p, self.request.seed)

    @property
    def length(self) -> int:
        """Tokens in the cache: the prompt so far, and each generated token but the last, which the next step reads."""
        return self.read + max(len(self.tokens) - 1, 0)

    @property
    def last_token(self) -> int:
        """The one whose logits the next token is drawn from; of the prompt, as long as none was generated."""
        return (self.tokens or self.request.prompt_ids)[-1]

    @property
    def position(self) -> int:
        """Where the last token stands in the sequence."""
        return self.read + len(self.tokens) - 1

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt_ids) - self.read


@dataclass(frozen=True)
class Move:
    """Row `source` must be copied over row `target`, `length` tokens of it."""

    source: int
    target: int
    length: int


class Batcher:
    """First come, first served, except that a request waiting for its weights or for a slot lets others pass. After
    `patience` seconds it lets no request for an adapter pass any more, so that slots run empty and it cannot starve."""

    def __init__(self, rows: int, table: SlotTable, *, patience: float = 0.25) -> None:
        self.rows = rows
        self.table = table
        self.patience = patience
        self.waiting: deque[Sequence] = deque()
        self.decoding: list[Sequence] = []
        self.prefilling: Sequence | None = None

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence that is waiting or running."""
        yield from self.waiting
        yield from self.running

    @property
    def running(self) -> list[Sequence]:
        """By row."""
        return [*self.decoding, *([] if self.prefilling is None else [self.prefilling])]

    @property
    def busy(self) -> int:
        return len(self.decoding) + (self.prefilling is not None)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def expired(self, now: float) -> list[Sequence]:
        """Takes out the waiting sequences whose time is over."""
        over = [s for s in self.waiting if now - s.submitted > s.request.queue_timeout]
        for sequence in over:
            self.waiting.remove(sequence)
        return over

    def next_prompt(self, now: float, place: Callable[[Sequence], Placing]) -> Sequence | None:
        """The next waiting sequence that can run, its prompt now to be read in row `len(decoding)`; None if none can.

        `place` gives a sequence its slot, or tells why not; a refused one waits no longer.
        """
        if self.prefilling is not None or self.busy >= self.rows:
            return None
        draining = False
        for sequence in tuple(self.waiting):
            if sequence.request.adapter_id is not None:
                if draining:
                    continue
                outcome = place(sequence)
                if outcome is Placing.REFUSED:
                    self.waiting.remove(sequence)
                    continue
                if outcome is not Placing.READY:
                    draining = outcome is Placing.FULL and now - sequence.submitted > self.patience
                    continue
            self.waiting.remove(sequence)
            self.prefilling = sequence
            return sequence
        return None

    def start_decoding(self) -> None:
        """The prompt is read: its sequence joins the decoding rows, in the row it already has."""
        assert self.prefilling is not None
        self.decoding.append(self.prefilling)
        self.prefilling = None

    def remove(self, gone: set[int]) -> list[Move]:
        """Takes out sequences (by `id`) wherever they are, unpins them, and closes the holes with few moves."""
        for sequence in self:
            if id(sequence) in gone and sequence.pinned:
                assert sequence.request.adapter_id is not None
                self.table.unpin(sequence.request.adapter_id)
                sequence.pinned = False
        self.waiting = deque(s for s in self.waiting if id(s) not in gone)
        old_row = len(self.decoding)
        kept = sum(id(s) not in gone for s in self.decoding)
        moves = []
        holes = iter([row for row in range(kept) if id(self.decoding[row]) in gone])
        for row in range(kept, len(self.decoding)):
            if id(self.decoding[row]) not in gone:
                hole = next(holes)
                self.decoding[hole] = self.decoding[row]
                moves.append(Move(row, hole, self.decoding[row].length))
        del self.decoding[kept:]
        if self.prefilling is not None and id(self.prefilling) in gone:
            self.prefilling = None
        if self.prefilling is not None and old_row != kept:
            moves.append(Move(old_row, kept, self.prefilling.length))
        return moves
