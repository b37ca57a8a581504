"""Rows stay compact and nobody loses a place, whatever order requests come and go in."""

from __future__ import annotations

import random
from concurrent.futures import Future

from arkor_ray.serving.engine.batcher import Batcher, Placing, Sequence
from arkor_ray.serving.engine.interface import GenRequest
from arkor_ray.serving.engine.slot_table import SlotTable


def sequence(adapter: str | None = None, *, at: float = 0.0, timeout: float = 10.0) -> Sequence:
    request = GenRequest("x", (1, 2, 3), 10, adapter, queue_timeout=timeout)
    return Sequence(request, lambda event: None, Future, at)


def place(sequence: Sequence) -> Placing:
    return Placing.READY


def start(batcher: Batcher, *sequences: Sequence) -> None:
    for each in sequences:
        batcher.add(each)
        assert batcher.next_prompt(0.0, place) is each
        each.read = 3
        batcher.start_decoding()


def test_random_leavers_keep_rows_compact_and_moves_true():
    draw = random.Random(0)
    for _ in range(300):
        batcher = Batcher(8, SlotTable(1))
        everyone = [sequence() for _ in range(draw.randrange(1, 8))]
        start(batcher, *everyone)
        if draw.random() < 0.5:
            everyone.append(sequence())
            batcher.add(everyone[-1])
            batcher.next_prompt(0.0, place)
        rows = dict(enumerate(everyone))
        gone = {id(s) for s in everyone if draw.random() < 0.5}
        for move in batcher.remove(gone):
            rows[move.target] = rows[move.source]
            assert move.length == rows[move.source].length
        now = [*batcher.decoding, *([batcher.prefilling] if batcher.prefilling else [])]
        assert now == [rows[row] for row in range(len(now))], "each row's cache must hold its sequence"
        assert {id(s) for s in now} == {id(s) for s in everyone} - gone


def test_all_leaving_at_once_needs_no_move():
    batcher = Batcher(4, SlotTable(1))
    everyone = [sequence() for _ in range(4)]
    start(batcher, *everyone)
    assert batcher.remove({id(s) for s in everyone}) == []
    assert batcher.busy == 0


def test_first_come_first_served_up_to_the_rows():
    batcher = Batcher(2, SlotTable(1))
    first, second, third = sequence(), sequence(), sequence()
    start(batcher, first, second)
    batcher.add(third)
    assert batcher.next_prompt(0.0, place) is None
    batcher.remove({id(first)})
    assert batcher.next_prompt(0.0, place) is third


def test_those_who_can_run_pass_until_patience_ends():
    batcher = Batcher(4, SlotTable(1), patience=1.0)
    stuck, other, base = sequence("stuck"), sequence("other"), sequence()

    def only_other(candidate: Sequence) -> Placing:
        return Placing.FULL if candidate is stuck else Placing.READY

    for each in (stuck, other, base):
        batcher.add(each)
    assert batcher.next_prompt(0.5, only_other) is other
    batcher.start_decoding()
    batcher.add(sequence("other"))
    assert batcher.next_prompt(1.5, only_other) is base, "the base takes no slot, so it may pass"
    batcher.start_decoding()
    assert batcher.next_prompt(1.5, only_other) is None


def test_absent_weights_hold_nobody_up():
    batcher = Batcher(4, SlotTable(1), patience=1.0)
    reading, other = sequence("reading"), sequence("other")
    batcher.add(reading)
    batcher.add(other)
    found = batcher.next_prompt(9.0, lambda s: Placing.ABSENT if s is reading else Placing.READY)
    assert found is other


def test_refused_request_waits_no_longer_and_holds_nobody_up():
    batcher = Batcher(4, SlotTable(1), patience=1.0)
    before, refused, other = sequence("before"), sequence("refused"), sequence("other")
    for each in (before, refused, other):
        batcher.add(each)
    outcomes = {before: Placing.ABSENT, refused: Placing.REFUSED, other: Placing.READY}
    assert batcher.next_prompt(9.0, lambda s: outcomes[s]) is other
    assert list(batcher.waiting) == [before]


def test_expired_requests_leave_the_queue():
    batcher = Batcher(1, SlotTable(1))
    short, long = sequence(at=0.0, timeout=1.0), sequence(at=0.0, timeout=9.0)
    batcher.add(short)
    batcher.add(long)
    assert batcher.expired(2.0) == [short]
    assert list(batcher.waiting) == [long]
