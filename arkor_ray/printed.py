"""What the processes of a job printed, where that is too much to be kept or handed on whole: its newest few megabytes."""

from __future__ import annotations

import re

KEPT_BYTES = 4 * 2**20  # a job that prints more has something to say at its end

_LEFT_OUT = re.compile(rb"\.\.\. the first (\d+) bytes are left out\n")


def newest(data: bytes, kept: int = KEPT_BYTES, *, before: int = 0) -> bytes:
    """The last `kept` bytes of `data`, from the first whole line of them on, after a line that counts what is left out.

    Args:
        before: how many bytes were printed before `data`.
    """
    cut = max(0, len(data) - kept)
    if not before + cut:
        return data
    whole_line = data.find(b"\n", cut) + 1
    if 0 < whole_line < len(data):
        cut = whole_line
    return f"... the first {before + cut} bytes are left out\n".encode() + data[cut:]


def after(position: int, kept: bytes) -> bytes:
    """What of `kept`, which `newest` returned, was printed after the first `position` bytes; with its line about what is left
    out where that is more than `position`."""
    left_out = _LEFT_OUT.match(kept)
    if left_out is None:
        return kept[position:]
    begin = position - int(left_out[1])
    return kept if begin < 0 else kept[left_out.end() + begin :]
