"""LoRA weights of many adapters beside one base model, in memory that is allocated once.

All weights of a slot lie in one flat buffer, in the order in which a forward pass reads them, so that moving an adapter
is one copy. Layers that read the same input (q, k and v; gate and up) form a group whose A matrices lie one below the
other: one product gives the low-rank input of all of them.

Prefill of one request multiplies with its slot directly. In a decode step every row has an adapter of its own, so each
row keeps a copy of its adapter's weights ("row-resident") and the batch is one batched product, without gathering.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from arkor_ray.serving.engine.lora_weights import LoraWeights

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ALIGN = 16  # elements; keeps every matrix on a cache line
_STALE = -1  # a row whose copy is of a slot that has been written since


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input, and where their weights lie in a flat buffer."""

    linears: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    a_offset: int
    b_offsets: tuple[int, ...]


class SlotLayout:
    """Where each matrix of an adapter of `rank` lies in a flat buffer of `size` elements."""

    def __init__(self, linears: Mapping[str, tuple[int, int]], rank: int) -> None:
        self.rank = rank
        self.groups: list[Group] = []
        offset = 0

        def take(count: int) -> int:
            nonlocal offset
            start = offset
            offset += -(-count // _ALIGN) * _ALIGN
            return start

        for names in _grouped(linears):
            in_features = linears[names[0]][0]
            outs = tuple(linears[name][1] for name in names)
            a_offset = take(in_features * rank * len(names))
            self.groups.append(Group(names, in_features, outs, a_offset, tuple(take(rank * out) for out in outs)))
        self.size = offset

    def a(self, flat: torch.Tensor, group: Group) -> torch.Tensor:
        """[n, layers * rank, in] of flat buffers [n, size]: the A of the group's layers, one below the other."""
        height = self.rank * len(group.linears)
        part = flat[:, group.a_offset : group.a_offset + height * group.in_features]
        return part.view(flat.shape[0], height, group.in_features)

    def b(self, flat: torch.Tensor, group: Group, index: int) -> torch.Tensor:
        """[n, rank, out] of the flat buffers [n, size]: the transposed, scaled B of one layer of the group."""
        out, offset = group.out_features[index], group.b_offsets[index]
        return flat[:, offset : offset + self.rank * out].view(flat.shape[0], self.rank, out)

    def pack(self, weights: LoraWeights, dtype: torch.dtype) -> torch.Tensor:
        """The adapter as one flat buffer [size] in host memory; smaller ranks are padded with zeros."""
        full = all(
            name in weights.pairs and weights.pairs[name].rank == self.rank
            for group in self.groups
            for name in group.linears
        )
        flat = torch.empty(1, self.size, dtype=dtype) if full else torch.zeros(1, self.size, dtype=dtype)
        for group in self.groups:
            a = self.a(flat, group)
            for index, name in enumerate(group.linears):
                pair = weights.pairs.get(name)
                if pair is not None:
                    top = index * self.rank
                    a[0, top : top + pair.rank] = pair.a
                    self.b(flat, group, index)[0, : pair.rank] = (pair.b.float() * pair.scale).t()
        return flat[0]

    def copy_padded(self, source: SlotLayout, old: torch.Tensor, new: torch.Tensor) -> None:
        """Copies buffers [n, source.size] of a smaller rank into zeroed buffers [n, size] of this layout."""
        n = old.shape[0]
        for mine, theirs in zip(self.groups, source.groups, strict=True):
            layers = len(mine.linears)
            tall = self.a(new, mine).view(n, layers, self.rank, mine.in_features)
            tall[:, :, : source.rank] = source.a(old, theirs).view(n, layers, source.rank, mine.in_features)
            for index in range(layers):
                self.b(new, mine, index)[:, : source.rank] = source.b(old, theirs, index)


def _grouped(linears: Mapping[str, tuple[int, int]]) -> Iterable[tuple[str, ...]]:
    """The names in model order, those with the same parent and input together."""
    done: set[str] = set()
    for name in linears:
        if name in done:
            continue
        parent, _, leaf = name.rpartition(".")
        family = next((f for f in _SAME_INPUT if leaf in f), (leaf,))
        names = tuple(f"{parent}.{member}" for member in family if f"{parent}.{member}" in linears)
        if len({linears[member][0] for member in names}) != 1:
            names = (name,)
        done.update(names)
        yield names


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


_Views = list[tuple[torch.Tensor, list[torch.Tensor]]]


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
        self.layout = SlotLayout(linears, rank)
        self._groups = [_GroupState() for _ in self.layout.groups]
        self._states: list[list[_LinearState]] = []
        self._targets: list[frozenset[str]] = [frozenset()] * slots
        self._row_slot: list[int | None] = [None] * rows
        self._allocate()
        self._wrap(model)
        self._off: bool = True

    def pack(self, weights: LoraWeights) -> tuple[SlotLayout, torch.Tensor]:
        """The flat buffer of an adapter in the current layout; may be called from a loader thread."""
        layout = self.layout
        if weights.rank > layout.rank:
            layout = SlotLayout(self._linears, weights.rank)
        packed = layout.pack(weights, self._dtype)
        return layout, packed.pin_memory() if self._device.type == "cuda" else packed

    def write(self, slot: int, weights: LoraWeights, layout: SlotLayout, packed: torch.Tensor) -> None:
        """Copies an adapter into a slot that no row uses. A larger rank re-allocates all slots first."""
        if weights.rank > self.layout.rank:
            self._grow(layout.rank if layout.rank >= weights.rank else weights.rank)
        if layout.rank != self.layout.rank:
            packed = self.layout.pack(weights, self._dtype)
        self._stack[slot].copy_(packed, non_blocking=True)
        self._targets[slot] = frozenset(weights.pairs)
        # A row that still holds this slot's former adapter must not be taken for a copy of the new one.
        self._row_slot = [_STALE if held == slot else held for held in self._row_slot]

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
            self._activate(self._slot_views[slot], self._targets[slot])
        else:
            for row, slot in enumerate(slots):
                self._hold(row, slot)
            targets = frozenset().union(*(self._targets[slot] for slot in distinct if slot is not None))
            self.use_rows(len(slots), targets)

    def use_rows(self, n: int, targets: frozenset[str] | None = None) -> None:
        """Each of the first `n` rows with its own copy, on the layers named by `targets` (None: all of them)."""
        if n not in self._row_views:
            self._row_views[n] = self._views(self._row_flat[:n])
        self._activate(self._row_views[n], frozenset(self._linears) if targets is None else targets)

    def _hold(self, row: int, slot: int | None) -> None:
        """Makes the row-resident copy of a slot, or of the base (zeros)."""
        if self._row_slot[row] == slot:
            return
        if slot is None:
            self._row_flat[row].zero_()
        else:
            self._row_flat[row].copy_(self._stack[slot])
        self._row_slot[row] = slot

    def forget(self) -> None:
        """Lets go of the last forward pass's activations."""
        for group in self._groups:
            group.seen = group.low = None

    def _activate(self, views: _Views | None, targets: frozenset[str]) -> None:
        self.forget()
        if views is None:
            if not self._off:
                for states in self._states:
                    for state in states:
                        state.b = None
            self._off = True
            return
        self._off = False
        for place, group, states, (a, bs) in zip(self.layout.groups, self._groups, self._states, views, strict=True):
            group.a = a
            for name, state, b in zip(place.linears, states, bs, strict=True):
                state.b = b if name in targets else None

    def _views(self, flat: torch.Tensor) -> _Views:
        return [
            (
                self.layout.a(flat, group).transpose(1, 2),
                [self.layout.b(flat, group, i) for i in range(len(group.linears))],
            )
            for group in self.layout.groups
        ]

    def _allocate(self) -> None:
        size = self.layout.size
        self._stack = torch.zeros(self.slots, size, dtype=self._dtype, device=self._device)
        self._row_flat = torch.zeros(self.rows, size, dtype=self._dtype, device=self._device)
        self._slot_views = [
            [(a[0], [b[0] for b in bs]) for a, bs in self._views(self._stack[slot : slot + 1])]
            for slot in range(self.slots)
        ]
        self._row_views: dict[int, _Views] = {}

    def _grow(self, rank: int) -> None:
        old_layout, stack, rows = self.layout, self._stack, self._row_flat
        self.layout = SlotLayout(self._linears, rank)
        self._allocate()
        self.layout.copy_padded(old_layout, stack, self._stack)
        self.layout.copy_padded(old_layout, rows, self._row_flat)
        self._set_spans()

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
