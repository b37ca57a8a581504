"""Adapters in slots: the table says which is where, the memory holds their weights, and both change together."""

from __future__ import annotations

from arkor_ray.errors import ArkorError, InternalError
from arkor_ray.serving.engine.batcher import Packed
from arkor_ray.serving.engine.lora_slots import LoraSlots
from arkor_ray.serving.engine.slot_table import SlotTable

_UNHEALTHY_AFTER = 3  # different adapters in a row that could not be copied


class AdapterSlots:
    """For the engine's thread, but for reading `table` and `loads`."""

    def __init__(self, lora: LoraSlots, count: int) -> None:
        self.table = SlotTable(count)
        self.loads = 0  # adapters copied into a slot so far
        self._lora = lora
        self._unplaced: set[str] = set()  # adapters that failed to be copied since one last was

    def place(self, packed: Packed) -> bool:
        """Copies an adapter into a free or idle slot; it is evictable until someone pins it. False while all are pinned.

        Raises AdapterError or ServiceUnavailableError for one that there is no memory for, and what the copy raised; the
        slots are then as before.
        """
        adapter_id = packed.weights.adapter_id
        if self.table.resident(adapter_id):
            return True
        try:
            placed = self._copy(packed)
        except ArkorError:  # refused for what it is
            raise
        except Exception:
            self._unplaced.add(adapter_id)
            raise
        if placed:
            self._unplaced.clear()
            self.loads += 1
        return placed

    def check_health(self) -> None:
        """Raises InternalError when it is not some adapter that cannot be copied, but any."""
        if len(self._unplaced) >= _UNHEALTHY_AFTER:
            raise InternalError(f"None of the last {len(self._unplaced)} adapters could be copied into a slot.")

    def _copy(self, packed: Packed) -> bool:
        adapter_id = packed.weights.adapter_id
        self._lora.reserve(packed.weights)  # before a slot is taken: nobody is evicted for one without room
        slot = self.table.place(adapter_id)
        if slot is None:
            return False
        try:
            self._lora.write(slot, packed.weights, packed.layout, packed.flat)
        except BaseException:
            self.table.remove(adapter_id)
            raise
        return True
