"""Attention over the row cache, registered with transformers as "arkor_slots", so that models stay unmodified.

A forward pass is either one chunk of one row's prompt (`PrefillBatch`) or one token of each of the first n rows
(`DecodeBatch`). It travels through the model as the keyword argument `arkor_batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from arkor_ray.errors import ModelError
from arkor_ray.serving.engine.kv_cache import KVCache, LayerShape

ATTENTION_NAME = "arkor_slots"

# Keyword arguments of transformers' attention layers that do not change the result here: positions are already in the
# rotated queries and keys, and the cache is ours. Anything else that is set (sinks...) would be ignored silently.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states",
             "output_router_logits", "return_dict", "is_causal", "layer_idx"}  # fmt: skip


@dataclass
class RecordBatch:
    """A dry run of one token that finds out what each layer stores."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)


@dataclass
class PrefillBatch:
    """Tokens `start` to `start + length` of the sequence in `row`."""

    cache: KVCache
    row: int
    start: int
    length: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass
class DecodeBatch:
    """One new token for each of rows 0 to n - 1. `positions` [n] on the device; `longest` is their maximum plus one."""

    cache: KVCache
    rows: torch.Tensor
    positions: torch.Tensor
    longest: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    arkor_batch: RecordBatch | PrefillBatch | DecodeBatch | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, tokens, ...] of the new tokens only.

    Returns [batch, tokens, heads, value_dim]. Raises ModelError for a layer that asks for something else.
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown or attention_mask is not None or arkor_batch is None:
        reason = f"its attention needs {', '.join(unknown)}" if unknown else "its attention is not the plain causal one"
        raise ModelError(f"This base model cannot be served: {reason}.")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(arkor_batch, DecodeBatch):
        out = _decode(arkor_batch, layer, query, key, value, scaling, sliding_window, softcap)
    elif isinstance(arkor_batch, PrefillBatch):
        out = _prefill(arkor_batch, layer, query, key, value, scaling, sliding_window, softcap)
    else:
        arkor_batch.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        groups = query.shape[1] // key.shape[1]
        out = value.repeat_interleave(groups, dim=1)  # one token attends to itself only
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)


def _decode(
    batch: DecodeBatch, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scaling: float | None, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    n, heads, _, head_dim = query.shape
    keys, values = batch.cache.k[layer], batch.cache.v[layer]
    keys[batch.rows, :, batch.positions] = key[:, :, 0]
    values[batch.rows, :, batch.positions] = value[:, :, 0]
    mask = batch.masks.get(window)
    if mask is None:
        index = torch.arange(batch.longest, device=query.device)
        mask = index <= batch.positions[:, None]
        if window is not None:
            mask &= index > batch.positions[:, None] - window
        mask = batch.masks[window] = mask[:, None, None, :]
    # The heads that share a key head become the queries of that head, so keys are read once and never repeated.
    packed = query.reshape(n, key.shape[1], heads // key.shape[1], head_dim)
    out = _attend(packed, keys[:n, :, : batch.longest], values[:n, :, : batch.longest], mask, scaling, softcap)
    return out.reshape(n, heads, 1, -1)


def _prefill(
    batch: PrefillBatch, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scaling: float | None, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    start, end = batch.start, batch.start + batch.length
    keys, values = batch.cache.k[layer], batch.cache.v[layer]
    keys[batch.row, :, start:end] = key[0]
    values[batch.row, :, start:end] = value[0]
    whole = start == 0 and softcap is None and (window is None or window >= end)
    if whole:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = batch.masks.get(window)
    if mask is None:
        positions = torch.arange(start, end, device=query.device)[:, None]
        index = torch.arange(end, device=query.device)
        mask = index <= positions
        if window is not None:
            mask &= index > positions - window
        mask = batch.masks[window] = mask[None, None]
    past_keys, past_values = keys[batch.row : batch.row + 1, :, :end], values[batch.row : batch.row + 1, :, :end]
    return _attend(query, past_keys, past_values, mask, scaling, softcap)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
    scaling: float | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Masked attention; query heads may be a multiple of key heads."""
    if softcap is None:
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values
