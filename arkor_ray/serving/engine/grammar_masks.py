"""What the grammars of running requests allow next, computed beside the model's forward pass."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

from arkor_ray.errors import InvalidRequestError
from arkor_ray.serving.engine.batcher import Sequence

WAIT_S = 0.02  # how long a step waits for masks; a row whose mask is later sits that step out
LIMIT_S = 5.0  # a row whose mask takes longer fails
THREADS = 4
PER_TASK = 8  # to hand a mask over takes longer than to compute most of them

Mask = npt.NDArray[np.int32]


class GrammarMasks:
    """Used by the engine's thread, but for the first `ask` of a request, which comes before that thread knows it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar-mask")
        self._lock = threading.Lock()
        self.computed = 0
        self.seconds = 0.0  # of all threads together

    def ask(self, sequences: list[Sequence]) -> None:
        """Has the next masks of those that have a grammar computed in other threads."""
        bound = [s for s in sequences if s.request.grammar is not None]
        for sequence in bound:
            sequence.mask, sequence.mask_asked = Future(), time.monotonic()
        for start in range(0, len(bound), PER_TASK):
            self._pool.submit(self._compute, bound[start : start + PER_TASK])

    def take(
        self, sequences: list[Sequence]
    ) -> tuple[list[int], list[Mask | None], list[tuple[Sequence, BaseException]]]:
        """Which of `sequences` may draw now, by their places; the mask of each of these, None without a grammar; and those
        whose grammar failed or takes too long, with the error."""
        if pending := [s.mask for s in sequences if s.mask is not None]:
            wait(pending, WAIT_S)
        ready: list[int] = []
        masks: list[Mask | None] = []
        failed: list[tuple[Sequence, BaseException]] = []
        for place, sequence in enumerate(sequences):
            mask = sequence.mask
            if mask is None:
                ready.append(place)
                masks.append(None)
            elif not mask.done():
                if time.monotonic() - sequence.mask_asked > LIMIT_S:
                    slow = InvalidRequestError("The grammar is too complex to decode by: a step took too long.")
                    failed.append((sequence, slow))
            elif error := mask.exception():
                failed.append((sequence, error))
            else:
                ready.append(place)
                masks.append(mask.result())
        return ready, masks, failed

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compute(self, sequences: list[Sequence]) -> None:
        began = time.perf_counter()
        for sequence in sequences:
            assert sequence.mask is not None and sequence.request.grammar is not None
            try:
                sequence.mask.set_result(sequence.request.grammar.mask())
            except BaseException as error:  # also a panic of a library in Rust; the request that it belongs to fails
                sequence.mask.set_exception(error)
        with self._lock:
            self.computed += len(sequences)
            self.seconds += time.perf_counter() - began
