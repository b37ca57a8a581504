"""Where the LoRA weights of an adapter lie in memory.

All weights of a slot lie in one flat buffer, in the order in which a forward pass reads them, so that moving an adapter
is one copy. Layers that read the same input (q, k and v; gate and up) form a group whose A matrices lie one below the
other: one product gives the low-rank input of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from arkor_ray.serving.engine.lora_weights import LoraWeights

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ALIGN = 16  # elements; keeps every matrix on a cache line

Views = list[tuple[torch.Tensor, list[torch.Tensor]]]


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

    def views(self, flat: torch.Tensor) -> Views:
        """Of each group the A and the Bs in the flat buffers [n, size], as a forward pass multiplies with them."""
        return [
            (self.a(flat, group).transpose(1, 2), [self.b(flat, group, i) for i in range(len(group.linears))])
            for group in self.groups
        ]

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
