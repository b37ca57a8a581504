"""Who sits in which slot, and who may leave. No tensors here."""

from __future__ import annotations

from collections import OrderedDict


class SlotTable:
    """Counts the live requests on each resident adapter. A slot with live requests is never given away; of the idle
    ones the least recently used goes first.

    The engine's thread writes; `resident` may be read from any thread as a hint that can be old a moment later.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.evictions = 0
        self._free = list(range(slots - 1, -1, -1))
        self._slot: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._live: dict[str, int] = {}

    def resident(self, adapter_id: str) -> bool:
        return adapter_id in self._slot

    def pin(self, adapter_id: str) -> int | None:
        """The adapter's slot, kept until `unpin`; None when it is not resident."""
        slot = self._slot.get(adapter_id)
        if slot is not None:
            self._slot.move_to_end(adapter_id)
            self._live[adapter_id] += 1
        return slot

    def unpin(self, adapter_id: str) -> None:
        self._live[adapter_id] -= 1

    def place(self, adapter_id: str) -> int | None:
        """A slot for an adapter that is not resident, not pinned yet; None when all have live requests."""
        if not self._free:
            idle = next((name for name in self._slot if not self._live[name]), None)
            if idle is None:
                return None
            self.remove(idle)
            self.evictions += 1
        slot = self._free.pop()
        self._slot[adapter_id] = slot
        self._live[adapter_id] = 0
        return slot

    def remove(self, adapter_id: str) -> None:
        """Gives the slot of an idle adapter back."""
        assert not self._live[adapter_id], f"{adapter_id} has live requests"
        del self._live[adapter_id]
        self._free.append(self._slot.pop(adapter_id))

    def live(self) -> dict[str, int]:
        """Live requests by resident adapter."""
        return dict(self._live)
