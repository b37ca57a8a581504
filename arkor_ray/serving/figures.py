"""What a replica tells about its requests and its engine, as metrics and spans."""

from __future__ import annotations

import asyncio
import time

from arkor_ray.errors import ArkorError, ServiceUnavailableError
from arkor_ray.serving.engine.interface import EngineStats, Timing
from arkor_ray.telemetry import logs, metrics, tracing


class ServingFigures:
    """`base_model` is the catalogue's name, the value of that tag everywhere."""

    def __init__(self, base_model: str) -> None:
        self.base_model = base_model
        self._last = EngineStats(rows=0, rows_busy=0, waiting=0, slots=0)

    def engine(self, now: EngineStats) -> None:
        """Called every second: tokens are counted as they are made, and only added up here."""
        before, self._last = self._last, now
        base = self.base_model
        metrics.SERVING_PROMPT_TOKENS.add(now.prefill_tokens - before.prefill_tokens, base_model=base)
        metrics.SERVING_GENERATED_TOKENS.add(now.generated_tokens - before.generated_tokens, base_model=base)
        metrics.SERVING_DECODE_STEPS.add(now.decode_steps - before.decode_steps, base_model=base)
        metrics.SERVING_EVICTIONS.add(now.evictions - before.evictions, base_model=base)
        metrics.SERVING_MASKS.add(now.masks - before.masks, base_model=base)
        metrics.SERVING_MASK_SECONDS.add(now.mask_seconds - before.mask_seconds, base_model=base)
        hits = now.resident_hits - before.resident_hits
        metrics.SERVING_ADAPTER_LOOKUPS.add(hits, base_model=base, tier="device")
        metrics.SERVING_WAITING.set(now.waiting, base_model=base)
        for metric, busy, total, word in (
            (metrics.SERVING_ROWS, now.rows_busy, now.rows, "busy"),
            (metrics.SERVING_SLOTS, len(now.resident), now.slots, "used"),
            (metrics.SERVING_KV_BYTES, now.kv_used_bytes, now.kv_bytes, "used"),
        ):
            metric.set(busy, base_model=base, state=word)
            metric.set(total - busy, base_model=base, state="free")

    def adapter_found(self, tier: str, seconds: float) -> None:
        """An adapter was not on the device; `tier` had it, and it is ready for a slot after `seconds`."""
        metrics.SERVING_ADAPTER_LOOKUPS.add(base_model=self.base_model, tier=tier)
        metrics.SERVING_ADAPTER_LOAD_SECONDS.observe(seconds, base_model=self.base_model, tier=tier)


class GenerationFigures:
    """One request's, from its arrival to its end. Whoever answers it fills in the public attributes.

    Args:
        context: what came along with it (telemetry/carried.py).
    """

    def __init__(self, base_model: str, context: dict[str, str], adapter_id: str | None) -> None:
        self.timing = Timing()
        self.prompt_tokens = self.tokens = 0
        self._base_model = base_model
        self._arrived = time.monotonic()
        logs.note(request_id=context.get("request_id"))
        self._span = tracing.start(
            "generate",
            parent=context.get("traceparent"),
            kind="SERVER",
            gen_ai__request__model=base_model,
            arkor__adapter__id=adapter_id,
        )
        self._span.make_current()

    def end(self, error: BaseException | None) -> None:
        """Call once, however it ended."""
        ended, timing, base, tokens = time.monotonic(), self.timing, self._base_model, self.tokens
        outcome = _outcome(error)
        metrics.SERVING_REQUESTS.add(base_model=base, outcome=outcome)
        if timing.placed:
            metrics.SERVING_QUEUE_SECONDS.observe(timing.placed - timing.submitted, base_model=base)
        if timing.first_token:
            metrics.SERVING_FIRST_TOKEN_SECONDS.observe(timing.first_token - self._arrived, base_model=base)
        if tokens > 1:
            metrics.SERVING_INTER_TOKEN_SECONDS.observe((ended - timing.first_token) / (tokens - 1), base_model=base)
        self._trace(ended)
        self._span.set(
            gen_ai__usage__input_tokens=self.prompt_tokens,
            gen_ai__usage__output_tokens=tokens,
            arkor__outcome=outcome,
        )
        if outcome in ("unavailable", "failed"):
            self._span.fail(str(error))
        self._span.end()

    def _trace(self, ended: float) -> None:
        parent, timing = self._span.traceparent, self.timing
        if parent is None:
            return
        moments = [timing.submitted, timing.placed, timing.first_token]
        for name, began, until in zip(("queue", "prefill", "decode"), moments, [*moments[1:], ended], strict=True):
            if began:
                length = {"gen_ai__usage__output_tokens": self.tokens} if name == "decode" else {}
                tracing.record(name, began, until or ended, parent=parent, **length)


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    if isinstance(error, ServiceUnavailableError):
        return "unavailable"
    return "refused" if isinstance(error, ArkorError) and error.http_status < 500 else "failed"
