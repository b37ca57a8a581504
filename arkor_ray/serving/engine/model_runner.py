"""The model with its row cache and its adapter slots, checked once against the plain model."""

from __future__ import annotations

import torch

from arkor_ray.errors import ModelError
from arkor_ray.serving.engine.attention import DecodeBatch, PrefillBatch
from arkor_ray.serving.engine.base_model import BaseModel, reference_logits, use_slot_attention
from arkor_ray.serving.engine.kv_cache import KVCache
from arkor_ray.serving.engine.lora_slots import LoraSlots, lora_linears

_CHECK_TOKENS = 24
_CHECK_CHUNKS = (13, 7)  # the rest is decoded
# Of the largest logit. A wrong mask, scale or position gives differences of the order of the logits themselves.
_CHECK_TOLERANCE = {torch.float32: 2e-3}
_CHECK_TOLERANCE_LOW = 0.1


class ModelRunner:
    """Used by one thread. Raises ModelError when the model does not compute the same with slots as without."""

    def __init__(self, base: BaseModel, *, rows: int, slots: int, max_len: int, rank: int) -> None:
        self.base = base
        self.max_len = min(max_len, base.context)
        self.vocab_size = int(base.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self._rows = torch.arange(rows, device=base.device)
        ids = torch.randint(
            0, self.vocab_size, (min(_CHECK_TOKENS, self.max_len),), generator=torch.Generator().manual_seed(0)
        )
        expected = reference_logits(base, ids.to(base.device))
        shapes = use_slot_attention(base)
        self.cache = KVCache(shapes, rows=rows, max_len=self.max_len, dtype=base.dtype, device=base.device)
        self.linears = lora_linears(base.model)
        self.lora = LoraSlots(
            base.model, self.linears, slots=slots, rows=rows, rank=rank, dtype=base.dtype, device=base.device
        )
        with torch.inference_mode():
            self._self_check(ids.tolist(), expected)

    def prefill(
        self, row: int, start: int, ids: tuple[int, ...] | list[int], slot: int | None, *, all_logits: bool = False
    ) -> torch.Tensor:
        """Reads prompt tokens `ids`, which follow the `start` tokens that the row has already.

        Returns the logits after the last of them, [1, vocab], or after each, [len(ids), vocab].
        """
        self.lora.use([slot])
        device = self.base.device
        tokens = torch.tensor([ids], device=device)
        positions = torch.arange(start, start + len(ids), device=device)[None]
        batch = PrefillBatch(self.cache, row, start, len(ids))
        return self._forward(tokens, positions, batch, 0 if all_logits else 1)[0]

    def decode(self, tokens: list[int], positions: list[int], slots: list[int | None]) -> torch.Tensor:
        """Row i reads `tokens[i]` at `positions[i]` with the adapter in `slots[i]`. Returns logits [rows, vocab]."""
        self.lora.use(slots)
        return self._decode(tokens, positions)

    def _decode(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        both = torch.tensor([tokens, positions]).to(self.base.device)
        place = both[1]
        batch = DecodeBatch(self.cache, self._rows[: len(tokens)], place, max(positions) + 1)
        return self._forward(both[0][:, None], place[:, None], batch, 1)[:, 0]

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, batch: PrefillBatch | DecodeBatch, keep: int
    ) -> torch.Tensor:
        out = self.base.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep, arkor_batch=batch
        )
        return out.logits

    def _self_check(self, ids: list[int], expected: torch.Tensor) -> None:
        """A prompt in chunks, then decoding in two rows with (empty) adapters switched on: the model's own logits."""
        first, second = _CHECK_CHUNKS
        read = min(first + second, len(ids) - 1)
        first = min(first, read)
        found = [self.prefill(0, 0, ids[:first], None, all_logits=True)]
        if read > first:
            found.append(self.prefill(0, first, ids[first:read], None, all_logits=True))
        rows = min(2, len(self._rows))
        if rows == 2:
            self.prefill(1, 0, ids[:read], None)
        for position in range(read, len(ids)):
            self.lora.use_rows(rows)
            logits = self._decode([ids[position]] * rows, [position] * rows)
            found.append(logits[rows - 1 :])
        self.lora.use([None])
        difference = float((torch.cat(found).float() - expected).abs().max())
        allowed = _CHECK_TOLERANCE.get(self.base.dtype, _CHECK_TOLERANCE_LOW) * float(expected.abs().max())
        if not difference <= allowed:
            raise ModelError(
                f"{type(self.base.model).__name__} cannot be served: step by step its logits differ "
                f"by {difference:.3g} from those of a whole pass (allowed: {allowed:.3g})."
            )
