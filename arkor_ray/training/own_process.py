"""Work in a process of its own, which can be ended for certain.

A thread cannot: while it hangs in a library, so do the threads that the library began, and the interpreter waits for those
before it ends.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from arkor_ray.telemetry import logs

P = ParamSpec("P")
T = TypeVar("T")

LONGEST_S = 7 * 86400.0  # waiting for a pipe takes no more than 2**31 ms
ORPHAN_S = 10  # how long after its limit the process ends by itself, where nobody is left to kill it


def run_within(limit_s: float, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """`function(*arguments, **named)` in a process of its own, which is killed after `limit_s`, or a week where that is more.

    The function is found there by its module and name; arguments, answer and error are pickled. What the process prints
    goes to this one's standard error. Raises what the function raises, TimeoutError after `limit_s`, RuntimeError when the
    process ends without an answer.
    """
    limit_s = min(limit_s, LONGEST_S)
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=pickle.dumps((limit_s, function, arguments, named)),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # it finds the same modules
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{function.__name__} was ended after {limit_s:g} s") from error
    if child.returncode != 0:
        raise RuntimeError(f"The process of {function.__name__} ended with exit status {child.returncode}")
    answer, raised = pickle.loads(child.stdout)
    if raised is not None:
        raise raised
    return answer


def main() -> None:
    """In the child: one call, from standard input to standard output."""
    logs.configure()
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # what libraries print is no part of the answer
        limit_s, function, arguments, named = pickle.load(sys.stdin.buffer)
        signal.alarm(math.ceil(limit_s) + ORPHAN_S)
        outcome: tuple[object, Exception | None]
        try:
            outcome = (function(*arguments, **named), None)
        except Exception as error:  # raised again where it was asked for
            outcome = (None, error)
        pickle.dump(outcome, output)
    sys.stderr.flush()
    os._exit(0)  # without waiting for the threads of a library


if __name__ == "__main__":
    main()
