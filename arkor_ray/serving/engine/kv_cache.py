"""Keys and values of every row, preallocated: row r of each layer holds the tokens of the sequence in row r."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per token: `kv_heads` x `head_dim` keys, and as many values of `value_dim`."""

    kv_heads: int
    head_dim: int
    value_dim: int


class KVCache:
    """`k[layer]` is [rows, kv_heads, max_len, head_dim], `v[layer]` the same with value_dim.

    Zeros, not empty memory: positions beyond a row's length are masked, but 0 * NaN would still be NaN. For the same reason
    `clear` is for rows that may hold such values. On CPU the pages of rows that were never used stay unallocated.
    """

    def __init__(
        self, shapes: dict[int, LayerShape], *, rows: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = rows
        self.max_len = max_len
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}
        for layer, shape in shapes.items():
            self.k[layer] = torch.zeros(rows, shape.kv_heads, max_len, shape.head_dim, dtype=dtype, device=device)
            self.v[layer] = torch.zeros(rows, shape.kv_heads, max_len, shape.value_dim, dtype=dtype, device=device)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of row `source` over row `target`."""
        for cache in (self.k, self.v):
            for tensor in cache.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, row: int, length: int) -> None:
        """Forgets the first `length` tokens of a row."""
        for cache in (self.k, self.v):
            for tensor in cache.values():
                tensor[row, :, :length] = 0

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for cache in (self.k, self.v) for t in cache.values())
