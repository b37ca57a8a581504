"""The newest of what was printed, and where it goes on."""

from __future__ import annotations

import pytest

from arkor_ray.printed import after, newest

LINES = b"first\nsecond\nthird\n"


def test_what_is_short_stays_as_it_is():
    assert newest(LINES) == newest(LINES, len(LINES)) == LINES


def test_of_what_is_long_the_last_whole_lines_stay_and_the_rest_is_counted():
    assert newest(LINES, 10) == b"... the first 13 bytes are left out\nthird\n"
    assert newest(LINES[9:], 10, before=9) == newest(LINES, 10), "as if whoever read it had left that out"


def test_a_line_longer_than_all_that_is_kept_is_cut_in_its_middle():
    assert newest(b"0123456789\n", 4) == b"... the first 7 bytes are left out\n789\n"
    assert newest(b"0123456789", 4) == b"... the first 6 bytes are left out\n6789"


@pytest.mark.parametrize("kept", [newest(LINES), newest(LINES, 10)])
@pytest.mark.parametrize("position", [13, 15, 19, 99])
def test_what_comes_after_is_the_same_whatever_is_left_out_before(kept: bytes, position: int):
    assert after(position, kept) == LINES[position:]


def test_what_is_left_out_and_was_never_shown_is_told():
    assert after(3, newest(LINES, 10)) == newest(LINES, 10)
