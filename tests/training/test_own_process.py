"""Work in a process of its own: what comes back, and that it ends."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.training.own_process import run_within
from tests.training import errands

ENOUGH_S = 120.0


def test_the_answer_comes_back_without_what_was_printed(capfd) -> None:
    assert run_within(ENOUGH_S, errands.double, 21, times=3) == 168
    printed = capfd.readouterr()
    assert printed.out == "" and "progress bar" in printed.err and "C code" in printed.err


def test_a_limit_may_be_as_long_as_you_like() -> None:
    assert run_within(math.inf, errands.double, 21) == 42


def test_an_error_comes_back_as_it_was() -> None:
    with pytest.raises(DatasetError, match="no such data") as raised:
        run_within(ENOUGH_S, errands.refuse)
    assert raised.value.param == "datasetSource.name"


def test_a_process_that_dies_is_an_error_of_ours() -> None:
    with pytest.raises(RuntimeError, match="process of die ended with exit status -9"):
        run_within(ENOUGH_S, errands.die)


def test_threads_that_are_left_behind_hold_up_nothing() -> None:
    assert run_within(ENOUGH_S, errands.leave_a_thread_behind) == "done"


def test_a_process_that_hangs_is_ended_and_gone(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    for limit_s in (1.5, 6, 24, 96):  # on a busy machine it takes its time to begin
        with pytest.raises(TimeoutError, match=f"hang was ended after {limit_s:g} s"):
            run_within(limit_s, errands.hang, pid_file)
        if pid_file.exists():
            break
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
