from __future__ import annotations

import pytest

from arkor_ray.serving.engine.slot_table import SlotTable


def test_least_recently_used_idle_adapter_leaves():
    table = SlotTable(2)
    slots = {table.place(name) for name in "ab"}
    assert slots == {0, 1}
    table.pin("a")
    table.unpin("a")  # b is now the older one
    assert table.place("c") is not None
    assert table.resident("a") and not table.resident("b")
    assert table.evictions == 1


def test_pinned_adapter_stays():
    table = SlotTable(2)
    table.place("a")
    table.place("b")
    mine = table.pin("a")
    table.pin("b")
    assert table.place("c") is None
    table.unpin("b")
    assert table.place("c") is not None
    assert table.pin("a") == mine
    assert table.live() == {"a": 2, "c": 0}


def test_absent_adapter_cannot_be_pinned():
    assert SlotTable(1).pin("a") is None


def test_live_adapter_cannot_be_removed():
    table = SlotTable(1)
    table.place("a")
    table.pin("a")
    with pytest.raises(AssertionError):
        table.remove("a")
