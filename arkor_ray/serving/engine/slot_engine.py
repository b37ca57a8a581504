"""The default engine: one thread owns the model and turns it step by step; everyone else posts to its queue."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from arkor_ray.errors import ArkorError, InternalError, InvalidRequestError, ServiceUnavailableError
from arkor_ray.serving.engine.adapter_slots import AdapterSlots
from arkor_ray.serving.engine.base_model import BaseModel
from arkor_ray.serving.engine.batcher import Batcher, Move, Packed, Placing, Sequence
from arkor_ray.serving.engine.faults import device_fault, out_of_memory
from arkor_ray.serving.engine.grammar_masks import GrammarMasks
from arkor_ray.serving.engine.interface import AdapterSource, EngineStats, FinishReason, GenRequest, TokenEvent
from arkor_ray.serving.engine.lora_weights import LoraWeights
from arkor_ray.serving.engine.model_runner import ModelRunner
from arkor_ray.serving.engine.sampler import sample
from arkor_ray.serving.single_flight import SingleFlight

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.05  # how often waiting requests are looked at when nothing runs
_UNHEALTHY_AFTER = 3  # failed steps in a row


@dataclass(frozen=True)
class EngineConfig:
    """Sizes, all fixed at start except the rank, which grows up to `max_rank` when an adapter needs it and memory allows."""

    rows: int = 16
    """Requests that run at once."""
    slots: int = 16
    """Adapters in device memory."""
    max_len: int = 2048
    """Tokens of a sequence, prompt and answer together."""
    rank: int = 16
    max_rank: int = 256
    prefill_budget: int = 256
    """Prompt tokens read between two decode steps."""
    max_waiting: int = 1024


@dataclass
class _Counters:
    decode_steps: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    resident_hits: int = 0


class SlotEngine:
    """Implements `interface.Engine` over an unmodified transformers model, which it changes and owns from then on.

    Raises ModelError when the model's own forward pass and this engine's do not agree.
    """

    def __init__(self, base: BaseModel, adapters: AdapterSource, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        self._adapters = adapters
        self._runner = ModelRunner(base, rows=config.rows, slots=config.slots, max_len=config.max_len, rank=config.rank)
        self._slots = AdapterSlots(self._runner.lora, config.slots)
        self._batcher = Batcher(config.rows, self._slots.table)
        self._counters = _Counters()
        self._reads: SingleFlight[Packed] = SingleFlight()
        self._packers = ThreadPoolExecutor(2, thread_name_prefix="adapter-packer")
        self._masks = GrammarMasks()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._failures = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="slot-engine", daemon=True)
        self._thread.start()

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The base model's layers that can carry LoRA, name -> (in_features, out_features)."""
        return self._runner.linears

    @property
    def max_len(self) -> int:
        return self._runner.max_len

    async def preload(self, weights: LoraWeights) -> bool:
        packed = await asyncio.get_running_loop().run_in_executor(self._packers, self._pack, weights)
        placed: Future[bool] = Future()

        def place() -> None:
            if not placed.set_running_or_notify_cancel():
                return  # nobody waits any more; an answer would be an error in the engine's thread
            try:
                placed.set_result(self._slots.place(packed))
            except Exception as error:
                placed.set_exception(error)
                if device_fault(error):
                    raise

        self._post(place)
        return await asyncio.wrap_future(placed)

    async def generate(self, request: GenRequest) -> AsyncIterator[list[TokenEvent]]:
        self._check(request.prompt_ids, request.max_tokens)
        if not request.max_tokens:
            raise InvalidRequestError("maxTokens: must be at least 1", param="maxTokens")
        events, sequence = await self._submit(request, scoring=False)
        finished = False
        try:
            while not finished:
                batch: list[TokenEvent] = []
                error: Exception | None = None
                for event in [await events.get(), *(events.get_nowait() for _ in range(events.qsize()))]:
                    if isinstance(event, Exception):
                        error = event
                    else:
                        batch.append(event)
                finished = error is not None or batch[-1].finish_reason is not None
                if batch:
                    yield batch
                if error is not None:
                    raise error
        finally:
            if not finished:
                self._post(lambda: self._remove([sequence]))

    async def score(self, token_ids: tuple[int, ...], adapter_id: str | None) -> list[float]:
        self._check(token_ids, 0)
        request = GenRequest(f"score-{uuid.uuid4().hex}", token_ids, 0, adapter_id)
        events, sequence = await self._submit(request, scoring=True)
        try:
            result = await events.get()
        except BaseException:
            self._post(lambda: self._remove([sequence]))
            raise
        if isinstance(result, Exception):
            raise result
        return result

    def stats(self) -> EngineStats:
        counters, cache = self._counters, self._runner.cache
        held = sum(sequence.length for sequence in list(self._batcher.decoding))  # a copy: the engine goes on
        return EngineStats(
            rows=self.config.rows,
            rows_busy=self._batcher.busy,
            waiting=len(self._batcher.waiting),
            slots=self.config.slots,
            resident=self._slots.table.live(),
            rank=self._runner.lora.layout.rank,
            decode_steps=counters.decode_steps,
            prefill_tokens=counters.prefill_tokens,
            generated_tokens=counters.generated_tokens,
            adapter_loads=self._slots.loads,
            evictions=self._slots.table.evictions,
            resident_hits=counters.resident_hits,
            kv_bytes=cache.size_bytes,
            kv_used_bytes=cache.size_bytes * held // (cache.rows * cache.max_len),
            masks=self._masks.computed,
            mask_seconds=self._masks.seconds,
        )

    def resident(self, adapter_id: str) -> bool:
        """Whether the adapter is in a slot now; it may be gone a moment later."""
        return self._slots.table.resident(adapter_id)

    def check_health(self) -> None:
        if not self._thread.is_alive():
            raise InternalError("The engine's thread has ended.")
        if self._failures >= _UNHEALTHY_AFTER:
            raise InternalError(f"The engine's last {self._failures} steps failed.")
        self._slots.check_health()

    def close(self) -> None:
        self._closing = True
        self._post(lambda: None)
        self._thread.join()
        self._packers.shutdown(wait=False)
        self._masks.close()

    # From here to the engine's thread: checks and submission, on the caller's event loop.

    def _check(self, prompt_ids: tuple[int, ...], max_tokens: int) -> None:
        if not prompt_ids:
            raise InvalidRequestError("messages: the prompt is empty", param="messages")
        if len(prompt_ids) + max_tokens > self.max_len:
            too_long = len(prompt_ids) >= self.max_len
            raise InvalidRequestError(
                f"messages, maxTokens: the prompt has {len(prompt_ids)} tokens and maxTokens asks for {max_tokens}, "
                f"together more than the {self.max_len} that fit"
                + ("" if too_long else f"; send maxTokens {self.max_len - len(prompt_ids)} or less"),
                param="messages" if too_long else "maxTokens",
            )
        vocabulary = self._runner.vocab_size
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocabulary:
            raise InvalidRequestError(
                f"messages: token {max(prompt_ids)} is outside the base model's vocabulary of {vocabulary}",
                param="messages",
            )

    async def _submit(self, request: GenRequest, *, scoring: bool) -> tuple[asyncio.Queue[Any], Sequence]:
        try:
            self.check_health()
        except InternalError as error:  # this replica's fault, and soon there is another
            raise ServiceUnavailableError(f"This replica cannot answer: {error.message}", retry_after=2) from error
        if len(self._batcher.waiting) >= self.config.max_waiting:
            raise ServiceUnavailableError(f"{self.config.max_waiting} requests are waiting already.", retry_after=1)
        packed = None
        if request.adapter_id is not None and not self._slots.table.resident(request.adapter_id):
            packed = await self._read(request.adapter_id)
        elif request.adapter_id is not None:
            self._counters.resident_hits += 1
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def emit(event: TokenEvent | list[float] | Exception) -> None:
            self._outbox.setdefault(loop, []).append(lambda: events.put_nowait(event))

        def reread() -> Future[Packed]:
            return asyncio.run_coroutine_threadsafe(self._read(request.adapter_id or ""), loop)

        submitted = request.timing.submitted = time.monotonic()
        sequence = Sequence(request, emit, reread, submitted, scoring=scoring, packed=packed)
        self._masks.ask([sequence])
        self._post(lambda: self._batcher.add(sequence))
        return events, sequence

    async def _read(self, adapter_id: str) -> Packed:
        async def work() -> Packed:
            weights = await self._adapters.weights(adapter_id)
            return await asyncio.get_running_loop().run_in_executor(self._packers, self._pack, weights)

        return await self._reads.run(adapter_id, work)

    def _pack(self, weights: LoraWeights) -> Packed:
        return Packed(weights, *self._runner.lora.pack(weights))

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    # The engine's thread.

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._closing:
                try:
                    self._obey()
                    self._step()
                except Exception as error:
                    self._failures += 1
                    logger.exception("An engine step failed; its requests fail with it.")
                    self._drop(self._batcher.running, _as_arkor(error))
                self._deliver()
        self._drop(list(self._batcher), ServiceUnavailableError("The inference replica is stopping.", retry_after=1))
        self._deliver()

    def _obey(self) -> None:
        """Carries out what was posted. Sleeps while there is nothing else to do."""
        try:
            if not self._batcher.busy:
                self._commands.get(timeout=_IDLE_WAIT_S if self._batcher.waiting else None)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _step(self) -> None:
        """Reads at most `prefill_budget` prompt tokens, then gives every decoding row one token."""
        now = time.monotonic()
        for late in self._batcher.expired(now):
            late.emit(
                ServiceUnavailableError(
                    f"All {self.config.slots} adapter slots or {self.config.rows} rows stayed busy for "
                    f"{late.request.queue_timeout:.0f} s.",
                    retry_after=1,
                )
            )
        budget = self.config.prefill_budget
        while budget > 0:
            sequence = self._batcher.prefilling or self._batcher.next_prompt(now, self._place)
            if sequence is None:
                break
            if not sequence.read:
                sequence.request.timing.placed = time.monotonic()
            budget -= self._read_prompt(sequence, budget)
        if self._batcher.decoding:
            self._decode()

    def _read_prompt(self, sequence: Sequence, budget: int) -> int:
        """Reads on in the prompt, and returns how much of `budget` that took. If it fails, it fails the sequence only: nothing
        but its own row was written."""
        try:
            count = self._prefill(sequence, budget)
        except Exception as error:
            if device_fault(error):
                raise
            self._failures += not out_of_memory(error)
            logger.exception("A prompt could not be read; its request fails.")
            self._fail([sequence], _as_arkor(error))
            return budget
        self._failures = 0
        return count

    def _prefill(self, sequence: Sequence, budget: int) -> int:
        count = min(sequence.prompt_left, budget)
        row, start = len(self._batcher.decoding), sequence.read
        ids = sequence.request.prompt_ids[start : start + count]
        logits = self._runner.prefill(row, start, ids, sequence.slot, all_logits=sequence.scoring)
        sequence.read += count
        self._counters.prefill_tokens += count
        if sequence.scoring:
            targets = torch.tensor(sequence.request.prompt_ids[start + 1 : start + count + 1], device=logits.device)
            logprobs = torch.log_softmax(logits[: len(targets)].float(), dim=-1)
            sequence.logprobs += logprobs.gather(1, targets[:, None])[:, 0].tolist()
            if not sequence.prompt_left:
                sequence.emit(sequence.logprobs)
                self._remove([sequence])
        elif not sequence.prompt_left:
            self._batcher.start_decoding()
            self._draw([sequence], logits[-1:])
        return count

    def _decode(self) -> None:
        sequences = list(self._batcher.decoding)
        logits = self._runner.decode(
            [s.last_token for s in sequences], [s.position for s in sequences], [s.slot for s in sequences]
        )
        self._counters.decode_steps += 1
        self._draw(sequences, logits)
        self._failures = 0  # not after a turn without a forward pass, which shows nothing

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Gives each sequence a token, but for those whose mask is not there yet: the next step computes their logits
        again, so that no grammar can hold up the other rows."""
        ready, masks, failed = self._masks.take(sequences)
        if ready:
            drawn = [sequences[row] for row in ready]
            logits = logits if len(drawn) == len(sequences) else logits[ready]
            self._accept(drawn, sample(logits, [s.sampler for s in drawn], masks))
        # Last: a row that moves takes along the tokens its sequence counts, and the one that this step read is among them
        # only once the next is accepted.
        for sequence, error in failed:
            self._fail([sequence], _as_arkor(error))

    def _accept(self, sequences: list[Sequence], tokens: list[int | None]) -> None:
        done: list[Sequence] = []
        going: list[Sequence] = []
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.finite = token is not None
            if token is None:
                name = sequence.request.adapter_id or "the base model"
                sequence.emit(InternalError(f"The logits of {name} are not finite for this prompt."))
                done.append(sequence)
                continue
            try:
                reason = _after(sequence, token)
            except Exception as error:  # a grammar that fails, however it does, fails its own request only
                sequence.emit(_as_arkor(error))
                done.append(sequence)
                continue
            if not sequence.tokens:
                sequence.request.timing.first_token = time.monotonic()
            sequence.tokens.append(token)
            self._counters.generated_tokens += 1
            sequence.emit(TokenEvent(token, reason))
            (going if reason is None else done).append(sequence)
        self._masks.ask(going)
        if done:
            self._remove(done)

    def _place(self, sequence: Sequence) -> Placing:
        """Pins the sequence's adapter in a slot. One that cannot be placed fails alone, unless the device is at fault."""
        try:
            return self._pin(sequence)
        except Exception as error:
            if device_fault(error):
                raise
            adapter_id, known = sequence.request.adapter_id, isinstance(error, ArkorError)
            logger.warning("Adapter %s cannot be placed: %s", adapter_id, error, exc_info=not known)
            sequence.emit(error if known else InternalError(f"Adapter {adapter_id} cannot be placed: {error!r}"))
            return Placing.REFUSED

    def _pin(self, sequence: Sequence) -> Placing:
        adapter_id = sequence.request.adapter_id
        assert adapter_id is not None
        slot = self._slots.table.pin(adapter_id)
        if slot is None:
            if sequence.packed is None:  # evicted since the request came
                if sequence.reading is None:
                    sequence.reading = sequence.reread()
                    sequence.reading.add_done_callback(lambda read: self._post(lambda: self._take_read(sequence, read)))
                return Placing.ABSENT
            if not self._slots.place(sequence.packed):
                return Placing.FULL
            slot = self._slots.table.pin(adapter_id)
        sequence.slot, sequence.pinned, sequence.packed = slot, True, None
        return Placing.READY

    def _take_read(self, sequence: Sequence, read: Future[Packed]) -> None:
        sequence.reading = None
        error = None if read.cancelled() else read.exception()
        if read.cancelled() or error is not None:
            self._fail([sequence], _as_arkor(error))
        else:
            sequence.packed = read.result()

    def _drop(self, sequences: list[Sequence], error: ArkorError) -> None:
        """Fails all that run, perhaps also some that wait, without the device, which may be what failed: no row is left."""
        for sequence in sequences:
            sequence.emit(error)
        self._batcher.remove({id(s) for s in sequences})

    def _fail(self, sequences: list[Sequence], error: ArkorError) -> None:
        for sequence in sequences:
            sequence.emit(error)
        self._remove(sequences)

    def _remove(self, sequences: list[Sequence]) -> None:
        gone = {id(s) for s in sequences}
        for row, sequence in enumerate(self._batcher.running):
            if id(sequence) in gone and not sequence.finite:
                self._runner.cache.clear(row, len(sequence.request.prompt_ids) + len(sequence.tokens))
        for move in self._batcher.remove(gone):
            self._move(move)

    def _move(self, move: Move) -> None:
        self._runner.cache.move_row(move.source, move.target, move.length)

    def _deliver(self) -> None:
        """Hands all events of this step to each event loop with one wake-up."""
        outbox, self._outbox = self._outbox, {}
        for loop, sends in outbox.items():
            try:
                loop.call_soon_threadsafe(_call_all, sends)
            except RuntimeError:  # the loop is closed: nobody is left to hear, and nobody to cancel
                logger.warning("%d events had no event loop to go to.", len(sends))


def _after(sequence: Sequence, token: int) -> FinishReason | None:
    """Why `token` is the sequence's last; None when it is not."""
    request = sequence.request
    if token in request.eos_ids:
        return "stop"
    if request.grammar is not None and request.grammar.accept(token):
        return "stop"
    return "length" if len(sequence.tokens) + 1 >= request.max_tokens else None


def _call_all(sends: list[Callable[[], None]]) -> None:
    for send in sends:
        send()


def _as_arkor(error: BaseException | None) -> ArkorError:
    if isinstance(error, ArkorError):
        return error
    return InternalError(f"The engine failed: {error!r}" if error else "Reading the adapter was interrupted.")
