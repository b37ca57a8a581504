"""An inference replica: messages in, text out. The engine sees token ids only; what they mean is settled here.

Importing this module brings in no torch: the process that deploys the application need not have it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import math
import os
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from arkor_ray.errors import AdapterError, InvalidRequestError, ServiceUnavailableError
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.serving.adapter_loader import AdapterLoader, BaseIdentity, LoaderConfig
from arkor_ray.serving.answer_reader import AnswerReader
from arkor_ray.serving.chat_tokenizer import ChatTokenizer
from arkor_ray.serving.constraints import GrammarCompiler
from arkor_ray.serving.engine.interface import GenRequest, Timing, TokenGrammar
from arkor_ray.serving.figures import GenerationFigures, ServingFigures
from arkor_ray.serving.single_flight import SingleFlight
from arkor_ray.serving.tool_parsers import ForcedCall, ToolParser, parser_for
from arkor_ray.storage.base_files import base_files
from arkor_ray.storage.object_store import open_store
from arkor_ray.telemetry import process
from arkor_ray.telemetry.export import each_second

if TYPE_CHECKING:
    from arkor_ray.serving.app import InferenceArgs

logger = logging.getLogger(__name__)

# Log-probabilities in nats. Beyond fp32 they differ because batches of other shapes round differently.
PARITY_TOLERANCE = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.25, "nf4": 0.25}
DEFAULT_MAX_TOKENS = 1024  # where a request says nothing; less when the context has less room
_TOKENIZERS = 64


@dataclass(frozen=True)
class _Speaker:
    """Whose answer it will be: how its prompts are built and what its answers are signed with."""

    tokenizer: ChatTokenizer
    end_ids: frozenset[int]
    fingerprint: str


class LLMServer:
    """Serves one base model and every adapter trained on it."""

    def __init__(self, args: InferenceArgs) -> None:
        import torch

        from arkor_ray.serving.engine.base_model import load_base
        from arkor_ray.serving.engine.slot_engine import EngineConfig, SlotEngine

        torch.set_num_threads(args.cpu_threads or max(1, (os.cpu_count() or 1) // 2))
        self._args = args
        self._figures = ServingFigures(args.base_name or args.base_model)
        files = base_files(
            args.base_model,
            Path(args.model_cache or Path(args.cache_dir, "models")),
            name=args.base_name or args.base_model,
            trust_remote_code=args.trust_remote_code,
            endpoint_url=args.storage_endpoint_url,
        )
        base = load_base(files.path, args.base_precision, **files.options)
        self._generation_config = base.model.generation_config
        cache = Path(args.cache_dir)
        self._tokenizer_dir = cache / "tokenizers"
        self._loader = AdapterLoader(
            open_store(args.storage_url, endpoint_url=args.storage_endpoint_url),
            BaseIdentity(args.base_model, args.base_precision),
            LoaderConfig(cache, disk_bytes=args.disk_bytes, ram_bytes=args.ram_bytes),
            linears=lambda: self._engine.linears,
            max_rank=args.max_rank,
            found=self._figures.adapter_found,
        )
        self._engine = SlotEngine(
            base,
            self._loader,
            EngineConfig(
                rows=args.rows,
                slots=args.slots,
                max_len=args.max_len,
                max_rank=args.max_rank,
                prefill_budget=args.prefill_budget or (2048 if base.device.type == "cuda" else 256),
            ),
        )
        base_tokenizer = ChatTokenizer.load(files.path, **files.options)
        fingerprint = f"base@{_base_hash(files.path, base.model.config)}"
        self._base_speaker = _Speaker(base_tokenizer, base_tokenizer.end_ids(self._generation_config), fingerprint)
        self._tokenizers: OrderedDict[str, ChatTokenizer] = OrderedDict()
        self._flights: SingleFlight[ChatTokenizer] = SingleFlight()
        self._compiler = GrammarCompiler()
        self._compiler.prepare(self._base_speaker.tokenizer, self._base_speaker.end_ids)

    async def admit(self, manifest: dict[str, Any], data: bytes | None) -> dict[str, Any]:
        """Makes an adapter ready to answer, and compares its log-probabilities with those of training.

        Args:
            manifest: a CheckpointManifest as JSON.
            data: the bytes of adapter_model.safetensors, or None to read them from storage.

        Returns adapter_id, manifest_sha256, tier ("slot", or "ram" when every slot is busy) and parity: None without a
        probe, else max_abs_diff (None if not finite) and tolerance. A difference beyond the tolerance is logged, not
        refused. May be called again. Raises AdapterError when the adapter cannot be served.
        """
        try:
            parsed = CheckpointManifest.model_validate(manifest)
        except ValidationError as error:
            raise AdapterError(f"Not a checkpoint manifest: {error.errors(include_url=False)[0]['msg']}") from error
        weights = await self._loader.admit(parsed, data)
        placed, speaker = await asyncio.gather(self._engine.preload(weights), self._speaker(parsed.adapter_id))
        self._compiler.prepare(speaker.tokenizer, speaker.end_ids)
        return {
            "adapter_id": parsed.adapter_id,
            "manifest_sha256": parsed.sha256,
            "tier": "slot" if placed else "ram",
            "parity": await self._parity(parsed),
        }

    async def chat(self, request: dict[str, Any], adapter_id: str | None) -> AsyncIterator[dict[str, Any]]:
        """Answers `ChatRequest.for_engine()` with the adapter, or with the base model for None; never one for the other.

        Yields {"type": "start", "prompt_tokens", "system_fingerprint"} once the first token is there, then
        {"type": "delta", "text"} as text comes, {"type": "tool_call_delta", "index", "arguments"} as calls come, the first
        of each with "id" and "name", at last {"type": "end", "finish_reason", "usage"}.
        Raises InvalidRequestError, NotFoundError, AdapterError, StorageError or ServiceUnavailableError before the start.
        """
        figures = GenerationFigures(self._figures.base_model, request.get("context") or {}, adapter_id)
        try:
            async with aclosing(self._answer(request, adapter_id, figures)) as items:  # type: ignore[type-var]
                async for item in items:
                    yield item
        except BaseException as error:
            figures.end(error)
            raise
        figures.end(None)

    async def _answer(
        self, request: dict[str, Any], adapter_id: str | None, figures: GenerationFigures
    ) -> AsyncIterator[dict[str, Any]]:
        speaker = await self._speaker(adapter_id)
        parser = _parser(request, speaker.tokenizer)
        constraint, grammar = request.get("constraint"), None
        if constraint is not None:
            grammar = await self._compiler.grammar(constraint, speaker.tokenizer, speaker.end_ids)
        prompt = await asyncio.get_running_loop().run_in_executor(
            None, speaker.tokenizer.encode_chat, request["messages"], request.get("tools")
        )
        generation = self._generation(request, prompt, adapter_id, speaker, grammar, figures.timing)
        figures.prompt_tokens = len(prompt)
        decode = speaker.tokenizer.decoder(parser.markers if parser else ())
        reader = AnswerReader(decode, request.get("stop") or [], parser)
        completion, reason = 0, None
        async with aclosing(self._engine.generate(generation)) as batches:  # type: ignore[type-var]
            async for batch in batches:
                if not completion:
                    yield {"type": "start", "prompt_tokens": len(prompt), "system_fingerprint": speaker.fingerprint}
                for event in batch:
                    completion = figures.tokens = completion + 1
                    reason = event.finish_reason
                    stopped = event.token_id not in generation.eos_ids and reader.push(event.token_id)
                    if not stopped and reason is not None:
                        stopped = reader.finish(complete=reason == "stop")
                    if stopped:
                        reason = "stop"
                        break
                for item in reader.take():
                    yield item
                if reason is not None:
                    break
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": completion,
            "total_tokens": len(prompt) + completion,
        }
        yield {
            "type": "end",
            "finish_reason": "tool_calls" if reason == "stop" and reader.called else reason,
            "usage": usage,
        }

    async def stats(self) -> dict[str, Any]:
        """Rows, slots and counters of the engine, and how many files each tier has answered."""
        return {
            "base_model": self._args.base_model,
            "base_precision": self._args.base_precision,
            "pid": os.getpid(),
            "engine": dataclasses.asdict(self._engine.stats()),
            "tiers": dataclasses.asdict(self._loader.counts),
        }

    async def check_health(self) -> None:
        """Called by Ray Serve; raises when the engine can no longer answer, and the replica is replaced."""
        self._engine.check_health()

    def close(self) -> None:
        """Ends the engine's and the loader's threads."""
        self._engine.close()
        self._loader.close()
        self._compiler.close()

    def tell_figures(self) -> None:
        """Adds what the engine did since the last call to this process's metrics."""
        self._figures.engine(self._engine.stats())

    def _generation(
        self,
        request: dict[str, Any],
        prompt: tuple[int, ...],
        adapter_id: str | None,
        speaker: _Speaker,
        grammar: TokenGrammar | None,
        timing: Timing,
    ) -> GenRequest:
        defaults = self._generation_config
        sampling = bool(getattr(defaults, "do_sample", False))
        temperature, top_p = request.get("temperature"), request.get("top_p")
        if temperature is None:
            temperature = (getattr(defaults, "temperature", None) or 1.0) if sampling else 0.0
        if top_p is None:
            top_p = (getattr(defaults, "top_p", None) or 1.0) if sampling else 1.0
        room = max(1, self._engine.max_len - len(prompt))
        return GenRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt,
            max_tokens=request.get("max_tokens") or min(DEFAULT_MAX_TOKENS, room),
            adapter_id=adapter_id,
            temperature=float(temperature),
            top_p=float(top_p),
            seed=request.get("seed"),
            eos_ids=speaker.end_ids,
            grammar=grammar,
            queue_timeout=self._args.queue_timeout_s,
            timing=timing,
        )

    async def _speaker(self, adapter_id: str | None) -> _Speaker:
        if adapter_id is None:
            return self._base_speaker
        manifest = await self._loader.manifest(adapter_id)
        digest = await self._loader.tokenizer_folder(adapter_id, self._tokenizer_dir)
        tokenizer = self._tokenizers.get(digest)
        if tokenizer is None:
            folder = self._tokenizer_dir / digest

            async def load() -> ChatTokenizer:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(
                    None, partial(ChatTokenizer.load, folder, name=f"adapter {adapter_id}")
                )

            tokenizer = await self._flights.run(digest, load)
            self._tokenizers[digest] = tokenizer
            while len(self._tokenizers) > _TOKENIZERS:
                self._tokenizers.popitem(last=False)
        else:
            self._tokenizers.move_to_end(digest)
        tokenizer.check_template(manifest.template_sha256, adapter_id)
        fingerprint = f"{adapter_id}@{manifest.sha256[:16]}"
        return _Speaker(tokenizer, tokenizer.end_ids(self._generation_config), fingerprint)

    async def _parity(self, manifest: CheckpointManifest) -> dict[str, float | None] | None:
        probe = manifest.probe
        if probe is None or len(probe.token_ids) < 2:
            return None
        ids = tuple(probe.token_ids[: self._engine.max_len])
        try:
            served = await self._engine.score(ids, manifest.adapter_id)
        except ServiceUnavailableError as error:
            logger.warning("No parity probe for %s: %s", manifest.adapter_id, error)
            return None
        # Not max(): comparing with a NaN is always false, so that one could hide.
        differences = [abs(s - t) for s, t in zip(served, probe.logprobs[: len(served)], strict=True)]
        difference = max(differences) if all(map(math.isfinite, differences)) else math.inf
        tolerance = PARITY_TOLERANCE[manifest.base_precision]
        if difference > tolerance:
            logger.warning(
                "Adapter %s does not answer as it was trained: log-probabilities differ by up to %.3g nats (tolerance %.3g).",
                manifest.adapter_id, difference, tolerance,
            )  # fmt: skip
        return {"max_abs_diff": difference if math.isfinite(difference) else None, "tolerance": tolerance}


class LLMReplica(LLMServer):
    """An LLMServer in a process of its own."""

    def __init__(self, args: InferenceArgs) -> None:
        process.begin()
        super().__init__(args)
        each_second(self.tell_figures)


def _parser(request: dict[str, Any], tokenizer: ChatTokenizer) -> ToolParser | None:
    """What reads the calls in the answer; None where there can be none."""
    tools, constraint = request.get("tools") or [], request.get("constraint")
    if not tools:
        return None
    if constraint is not None and constraint["forced"]:
        return ForcedCall()
    parser = parser_for(tokenizer.template_text, [tool["function"]["name"] for tool in tools])
    if parser is None:
        raise InvalidRequestError(
            "tools: the model's chat template shows no form of tool calls that this server can read, so it cannot be left "
            "to choose; send toolChoice 'required' or name a function, which works with every model",
            code="tool_calling_not_configured",
            param="tools",
        )
    if constraint is not None and not (parser.enforceable and tokenizer.are_text(parser.markers)):
        raise InvalidRequestError(
            "tools: strict can be enforced for this model only where toolChoice asks for a call; leave it out, or send "
            "toolChoice 'required' or name a function",
            param="tools",
        )
    return parser


def _base_hash(source: str, config: Any) -> str:
    """Names the base weights: the Hub's commit, or for a directory its config and the ends of its weight files."""
    if not source.startswith("/"):
        return hashlib.sha256(f"{source} {getattr(config, '_commit_hash', None)}".encode()).hexdigest()[:16]
    folder = Path(source)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(2**20)
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size}".encode() + head + file.read())
    return digest.hexdigest()[:16]
