"""LoRA weights of many adapters beside one base model, in memory that is allocated once.

Prefill of one request multiplies with its slot directly. In a decode step every row has an adapter of its own, so each
row keeps a copy of its adapter's weights ("row-resident") and the batch is one batched product, without gathering.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from arkor_ray.errors import AdapterError, ArkorError, ServiceUnavailableError
from arkor_ray.serving.engine.faults import out_of_memory
from arkor_ray.serving.engine.lora_weights import LoraWeights
from arkor_ray.serving.engine.slot_layout import SlotLayout, Views

_STALE = -1  # a row whose copy is of a slot that has been written since


@dataclass
class _GroupState:
    """What a group multiplies with in the current forward pass, and the last product."""

    a: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    low: torch.Tensor | None = None

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        # Compared by identity: holding `seen` keeps its address from being reused within the pass.
        if self.seen is not x:
            assert self.a is not None
            self.low = torch.bmm(x, self.a) if self.a.ndim == 3 else torch.matmul(x, self.a)
            self.seen = x
        assert self.low is not None
        return self.low


class _LinearState:
    """What one layer multiplies with in the current forward pass; `b` None leaves the base layer as it is."""

    __slots__ = ("b", "group", "index", "span")

    def __init__(self, group: _GroupState, index: int) -> None:
        self.b: torch.Tensor | None = None
        self.group = group
        self.index = index
        self.span = slice(0, 0)


class SlotLinear(nn.Module):
    """A linear layer of the base (any precision, also 4-bit) plus the LoRA update that is active now."""

    def __init__(self, base: nn.Module, state: _LinearState) -> None:
        super().__init__()
        self.base = base
        self.lora = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        lora = self.lora
        b = lora.b
        if b is None:
            return y
        low = lora.group.shrink(x)[..., lora.span]
        if b.ndim == 3:  # one token of each row, each row with its own matrix
            return y.baddbmm_(low, b)
        y.view(-1, y.shape[-1]).addmm_(low.reshape(-1, b.shape[0]), b)
        return y


@dataclass(frozen=True)
class _Memory:
    """The memory of one layout and the views of it, in one piece: with parts of two, one adapter's weights would be written
    where another's, or nobody's, are read."""

    layout: SlotLayout
    stack: torch.Tensor
    """[slots, size], an adapter each."""
    rows: torch.Tensor
    """[rows, size], the row-resident copies; zeros are the base."""
    slot_views: list[Views]
    row_views: dict[int, Views] = field(default_factory=dict)
    """Of the first n rows, by n; made when first needed."""

    @classmethod
    def allocate(
        cls, layout: SlotLayout, *, slots: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> _Memory:
        stack = torch.zeros(slots, layout.size, dtype=dtype, device=device)
        copies = torch.zeros(rows, layout.size, dtype=dtype, device=device)
        views = [
            [(a[0], [b[0] for b in bs]) for a, bs in layout.views(stack[slot : slot + 1])] for slot in range(slots)
        ]
        return cls(layout, stack, copies, views)


class LoraSlots:
    """The device memory of `slots` adapters and of the `rows` row-resident copies. Used by the engine's thread only."""

    def __init__(
        self, model: nn.Module, linears: Mapping[str, tuple[int, int]], *, slots: int, rows: int, rank: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._linears = dict(linears)
        self._dtype = dtype
        self._device = device
        self.slots = slots
        self.rows = rows
        self._memory = self._allocate(SlotLayout(linears, rank))
        self._groups = [_GroupState() for _ in self.layout.groups]
        self._states: list[list[_LinearState]] = []
        self._targets: list[frozenset[str]] = [frozenset()] * slots
        self._row_slot: list[int | None] = [None] * rows
        self._wrap(model)
        self._off: bool = True

    @property
    def layout(self) -> SlotLayout:
        """Of the rank that the memory has room for now."""
        return self._memory.layout

    def pack(self, weights: LoraWeights) -> tuple[SlotLayout, torch.Tensor]:
        """The flat buffer of an adapter in the current layout; may be called from a loader thread."""
        layout = self.layout
        if weights.rank > layout.rank:
            layout = SlotLayout(self._linears, weights.rank)
        packed = layout.pack(weights, self._dtype)
        return layout, packed.pin_memory() if self._device.type == "cuda" else packed

    def reserve(self, weights: LoraWeights) -> None:
        """Makes room for the adapter's rank in every slot, if there is none. When it fails, everything is as before.

        Raises AdapterError when the device could not hold that, ServiceUnavailableError when others use its memory now.
        """
        if weights.rank <= self.layout.rank:
            return
        layout = SlotLayout(self._linears, weights.rank)
        try:
            self._use_memory(self._grown(layout))
            return
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Raised out here, where nothing refers to the failure any more: its traceback would keep what was allocated.
        raise self._no_room(weights, layout)

    def write(self, slot: int, weights: LoraWeights, layout: SlotLayout, packed: torch.Tensor) -> None:
        """Copies an adapter, for whose rank `reserve` has made room, into a slot that no row uses."""
        if layout.rank != self.layout.rank:
            packed = self.layout.pack(weights, self._dtype)
        # A row that still holds this slot's former adapter must not be taken for a copy of the new one.
        self._row_slot = [_STALE if held == slot else held for held in self._row_slot]
        self._memory.stack[slot].copy_(packed, non_blocking=True)
        self._targets[slot] = frozenset(weights.pairs)

    def use(self, slots: Sequence[int | None]) -> None:
        """Chooses the weights of the next forward pass: `slots[i]` belongs to row i, or the only one to a prefill.

        A batch of one adapter uses its slot; only a mixed one needs the copies, made here for rows that lack theirs.
        """
        distinct = set(slots)
        if distinct == {None}:
            self._activate(None, frozenset())
        elif len(distinct) == 1:
            slot = slots[0]
            assert slot is not None
            self._activate(self._memory.slot_views[slot], self._targets[slot])
        else:
            for row, slot in enumerate(slots):
                self._hold(row, slot)
            targets = frozenset().union(*(self._targets[slot] for slot in distinct if slot is not None))
            self.use_rows(len(slots), targets)

    def use_rows(self, n: int, targets: frozenset[str] | None = None) -> None:
        """Each of the first `n` rows with its own copy, on the layers named by `targets` (None: all of them)."""
        memory = self._memory
        if n not in memory.row_views:
            memory.row_views[n] = memory.layout.views(memory.rows[:n])
        self._activate(memory.row_views[n], frozenset(self._linears) if targets is None else targets)

    def _hold(self, row: int, slot: int | None) -> None:
        """Makes the row-resident copy of a slot, or of the base (zeros)."""
        if self._row_slot[row] == slot:
            return
        self._row_slot[row] = _STALE  # until the copy is made
        if slot is None:
            self._memory.rows[row].zero_()
        else:
            self._memory.rows[row].copy_(self._memory.stack[slot])
        self._row_slot[row] = slot

    def forget(self) -> None:
        """Lets go of the last forward pass's activations."""
        for group in self._groups:
            group.seen = group.low = None

    def _activate(self, views: Views | None, targets: frozenset[str]) -> None:
        self.forget()
        if views is None:
            if not self._off:
                for group, states in zip(self._groups, self._states, strict=True):
                    group.a = None
                    for state in states:
                        state.b = None
            self._off = True
            return
        self._off = False
        for place, group, states, (a, bs) in zip(self.layout.groups, self._groups, self._states, views, strict=True):
            group.a = a
            for name, state, b in zip(place.linears, states, bs, strict=True):
                state.b = b if name in targets else None

    def _allocate(self, layout: SlotLayout) -> _Memory:
        return _Memory.allocate(layout, slots=self.slots, rows=self.rows, dtype=self._dtype, device=self._device)

    def _grown(self, layout: SlotLayout) -> _Memory:
        """New memory, with the slots' adapters in it. The rows are empty: each takes its copy out of its slot again."""
        grown = self._allocate(layout)
        layout.copy_padded(self.layout, self._memory.stack, grown.stack)
        return grown

    def _use_memory(self, memory: _Memory) -> None:
        """Lets go of the memory until now, and of all views of it."""
        self._activate(None, frozenset())
        self._memory = memory
        self._row_slot = [None] * self.rows
        self._set_spans()

    def _no_room(self, weights: LoraWeights, layout: SlotLayout) -> ArkorError:
        has = self.layout.rank
        needed = (self.slots + self.rows) * layout.size * self._dtype.itemsize
        said = (
            f"Adapter {weights.adapter_id} has rank {weights.rank}, and the {self.slots} slots and {self.rows} rows of this "
            f"replica have memory for rank {has}: {needed / 2**30:.1f} GiB more are not free. "
        )
        remedy = (
            f"Train with loraR {has} or less, or serve the base model with fewer slots or rows (ARKOR_RAY_SERVING_SLOTS, "
            "ARKOR_RAY_SERVING_ROWS, or its own in the catalogue)."
        )
        if self._device.type == "cuda":
            _, total = torch.cuda.mem_get_info(self._device)
            if needed <= total - torch.cuda.memory_allocated(self._device):
                return ServiceUnavailableError(f"{said}Others use the device's memory now. {remedy}", retry_after=30)
        return AdapterError(said + remedy)

    def _set_spans(self) -> None:
        for states in self._states:
            for state in states:
                state.span = slice(state.index * self.layout.rank, (state.index + 1) * self.layout.rank)

    def _wrap(self, model: nn.Module) -> None:
        for place, group in zip(self.layout.groups, self._groups, strict=True):
            states = [_LinearState(group, index) for index in range(len(place.linears))]
            self._states.append(states)
            for name, state in zip(place.linears, states, strict=True):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, SlotLinear(model.get_submodule(name), state))
        self._set_spans()


def lora_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers inside the numbered blocks of a model, name -> (in_features, out_features), in model order.

    The embedding and the output layer stand outside the blocks: LoRA on them is refused by the strict loader.
    """
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }
