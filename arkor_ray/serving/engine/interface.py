"""What a chat front end may ask of an engine. Token ids in, token ids out; text, templates and SSE live above."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from arkor_ray.serving.engine.lora_weights import LoraWeights

FinishReason = Literal["stop", "length"]


class TokenGrammar(Protocol):
    """What may come next in one generation; used by one generation only, by one thread at a time."""

    def mask(self) -> npt.NDArray[np.int32]:
        """The tokens that may come next: token i is bit i % 32 of word i // 32, and one beyond the words may not.

        The end tokens are among them exactly when the text so far is complete. Called off the engine's thread, for it
        may take a while; the array is good until the next `accept`. Raises an ArkorError when there is no telling.
        """

    def accept(self, token: int) -> bool:
        """Goes on with a token of the mask that is no end token. True when only an end token could follow."""


@dataclass
class Timing:
    """When what happened to a request, by `time.monotonic()`; 0 until it has. The engine fills it in."""

    submitted: float = 0.0
    """It began to wait, with its adapter's weights read."""
    placed: float = 0.0
    """It had a row, and its adapter a slot."""
    first_token: float = 0.0


@dataclass(frozen=True)
class GenRequest:
    """One generation. `adapter_id` None means the base model; nothing else ever does.

    `temperature` 0 is greedy. With `seed` given, the tokens depend on the request and the weights only, not on what
    else is in the batch (beyond rounding of the logits). `eos_ids` end the generation, as its last token.
    `grammar` restricts the tokens; a generation that is neither cut by `max_tokens` nor cancelled satisfies it.
    `queue_timeout` is how many seconds the request may wait for a row and a slot.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    adapter_id: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    eos_ids: frozenset[int] = frozenset()
    grammar: TokenGrammar | None = None
    queue_timeout: float = 30.0
    timing: Timing = field(default_factory=Timing, compare=False)


@dataclass(frozen=True)
class TokenEvent:
    """One generated token; the last one of a request carries why it was the last."""

    token_id: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine's state; counters since its start."""

    rows: int
    rows_busy: int
    waiting: int
    slots: int
    resident: dict[str, int] = field(default_factory=dict)
    """Adapters in device slots, with the number of live requests on each."""
    rank: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    adapter_loads: int = 0
    evictions: int = 0
    resident_hits: int = 0
    """Requests whose adapter was in a slot already."""
    kv_bytes: int = 0
    """Reserved for keys and values; of them `kv_used_bytes` hold some now."""
    kv_used_bytes: int = 0
    masks: int = 0
    mask_seconds: float = 0.0


class AdapterSource(Protocol):
    """Where an engine reads an adapter that is in none of its slots."""

    async def weights(self, adapter_id: str) -> LoraWeights:
        """Verified weights, ready to be copied into a slot. Raises NotFoundError, AdapterError or StorageError."""


class Engine(Protocol):
    """All coroutines may be called from any event loop; the engine's own thread does the work."""

    async def preload(self, weights: LoraWeights) -> bool:
        """Puts the adapter into an idle slot. False when every slot is busy: it is read when a request asks for it.

        Raises AdapterError when the device has not the memory for its rank, ServiceUnavailableError when not now.
        """

    def generate(self, request: GenRequest) -> AsyncIterator[list[TokenEvent]]:
        """The tokens as they come: those since the last look, one if the caller keeps up. Closing frees the row at once.

        Raises InvalidRequestError (too long), NotFoundError and AdapterError (the adapter), ServiceUnavailableError
        (waited too long for a row or slot) before the first token, and what the grammar raises at any.
        """

    async def score(self, token_ids: tuple[int, ...], adapter_id: str | None) -> list[float]:
        """log p(token_ids[i + 1] | token_ids[: i + 1]) in nats, one fewer than the ids."""

    def stats(self) -> EngineStats: ...

    def check_health(self) -> None:
        """Raises when the engine can no longer answer."""

    def close(self) -> None:
        """Ends the engine's thread; requests still running fail."""
