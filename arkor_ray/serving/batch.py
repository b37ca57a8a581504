"""Answers to many questions at once: the inference engine in a pool of Ray Data's actors, without the service.

Ray Data moves the rows, keeps every actor supplied and starts actors anew; each engine batches whatever rows its actor has at a
time, so that a short answer waits for no long one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arkor_ray.errors import ArkorError, InvalidRequestError, from_wire
from arkor_ray.schemas.base import invalid_request
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.serving.assistant_turn import AssistantTurn
from arkor_ray.serving.result_file import Result
from arkor_ray.storage import locations
from arkor_ray.storage.adapter_files import AdapterFiles, read_adapter

CALLS = 4  # blocks of rows that an actor works on at a time, so that its engine does not run dry between two
MAX_BLOCKS = 4096  # of rows; Ray keeps each as an object


@dataclass(frozen=True)
class Speaker:
    """Who answers: a base model (a reference, see schemas/model.py), with an adapter or without."""

    base_model: str
    adapter: AdapterFiles | None = None
    precision: BasePrecision | None = None
    """What the base is held in. None: as the adapter was trained, else bf16 on a GPU and fp32 on a CPU."""

    @property
    def name(self) -> str:
        return f"{self.base_model} with {self.adapter.source}" if self.adapter else self.base_model

    def identity(self, rows: Any) -> dict[str, Any]:
        """All but the sampling on which answers to these rows depend, as plain JSON."""
        return {
            "data": hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest(),
            "base_model": self.base_model,
            "adapter": self.adapter.sha256 if self.adapter else None,
            "precision": self.precision,
        }

    def resolved_precision(self, *, gpu: bool) -> BasePrecision:
        trained = self.adapter.base_precision if self.adapter else None
        return self.precision or trained or ("bf16" if gpu else "fp32")


@dataclass(frozen=True)
class Sampling:
    """How answers are decoded; what is None is as the model's generation config says."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    json_schema: dict[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        """As part of a `ChatRequest`. Raises InvalidRequestError for a schema that is none."""
        body: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "max_tokens", "seed", "stop")
            if (value := getattr(self, name)) not in (None, [])
        }
        if self.json_schema is not None:
            # A model that is unsure would rather write blanks than come to an end.
            body["structured_outputs"] = {"json": self.json_schema, "disable_any_whitespace": True}
        return body


@dataclass(frozen=True)
class Engine:
    """Sizes of each actor's engine."""

    rows: int = 16
    """Answers decoded at once."""
    max_length: int = 4096
    """Tokens of prompt and answer together; no more than the model was made for."""
    cpu_threads: int | None = None
    """None: the node's cores, shared by its actors."""


def read_speaker(adapter: str | None, base_model: str | None, precision: BasePrecision | None) -> Speaker:
    """`adapter` is what `read_adapter` takes; `base_model` where the adapter does not say it or is to be overruled."""
    found = read_adapter(adapter) if adapter else None
    if base_model is None and found is None:
        raise InvalidRequestError("give --adapter, --model or both")
    return Speaker(base_model or found.base_model, found, precision)  # type: ignore[union-attr]


def read_json_schema(path: Path) -> dict[str, Any]:
    """Raises InvalidRequestError."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"--json-schema: {path} cannot be read: {error}", param="--json-schema") from error
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"--json-schema: {path} must hold a JSON object", param="--json-schema")
    return schema


def check_sampling(sampling: Sampling) -> None:
    """Raises InvalidRequestError where no question could be asked so."""
    _request({"messages": [{"role": "user", "content": "?"}]}, sampling)


def answer_all(
    questions: list[tuple[int, dict[str, Any]]],
    speaker: Speaker,
    sampling: Sampling,
    *,
    engine: Engine = Engine(),
    replicas: int | None = None,
) -> Iterator[list[Result]]:
    """The answers, in no order and a few at a time; each once.

    Args:
        questions: (index, {"messages", "tools"?, "as_base"?}); as_base: the base answers, also where there is an adapter.
        replicas: actors, each with a GPU where the cluster has GPUs; None: one for each GPU, or one.

    A result has `index`, and `answer`, `tool_calls` where there are any, `finish_reason` and `usage`, or `error`.
    Raises ModelError or AdapterError when nobody can answer, InvalidRequestError when there is no room for the actors.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    check_sampling(sampling)
    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    replicas = replicas or (int(ray.cluster_resources()["GPU"]) if gpu else 1)
    resources = _room(replicas, "GPU" if gpu else "CPU")
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    speaker = replace(speaker, precision=speaker.resolved_precision(gpu=gpu))
    if engine.cpu_threads is None and not gpu:
        per_node = -(-replicas // sum(node["Alive"] for node in ray.nodes()))
        engine = replace(engine, cpu_threads=max(1, (os.cpu_count() or 1) // per_node))
    rows = [{"index": index, "question": json.dumps(question)} for index, question in questions]
    block = max(engine.rows, -(-len(rows) // MAX_BLOCKS))
    with DataContext.current(context):
        answers = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // block)).map_batches(
            _Replica,
            fn_constructor_args=(ray.put(speaker), sampling, engine),
            batch_size=None,
            compute=ActorPoolStrategy(
                size=replicas, max_concurrent_calls_per_actor=CALLS, max_tasks_in_flight_per_actor=2 * CALLS
            ),
            **resources,
        )
        for batch in answers.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            yield [_result(text) for text in batch["result"]]


class _Replica:
    """An actor of Ray Data's pool."""

    def __init__(self, speaker: Any, sampling: Sampling, engine: Engine) -> None:
        """`speaker` may be a reference to one: an adapter is large."""
        self._sampling = sampling
        self._refused: ArkorError | None = None
        try:
            self._start(speaker, engine)
        except ArkorError as error:  # raised here, it would reach the driver as text in a trace of Ray's
            self._refused = error

    def _start(self, speaker: Any, engine: Engine) -> None:
        import ray

        from arkor_ray.serving.app import InferenceArgs
        from arkor_ray.serving.chat_tokenizer import ChatTokenizer
        from arkor_ray.serving.llm_server import LLMServer
        from arkor_ray.storage.local import LocalStore

        if isinstance(speaker, ray.ObjectRef):
            speaker = ray.get(speaker)
        adapter: AdapterFiles | None = speaker.adapter
        self._folder = tempfile.TemporaryDirectory(prefix="arkor-batch-")
        here = Path(self._folder.name)
        store = LocalStore(here / "store")
        manifest = None
        if adapter is not None:
            if not adapter.has_tokenizer:
                files = locations.fetch_base(speaker.base_model)
                ChatTokenizer.load(files.path, **files.options).tokenizer.save_pretrained(here / "tokenizer")
                own = {path.name: path.read_bytes() for path in (here / "tokenizer").iterdir()}
                adapter = replace(adapter, files={**own, **adapter.files})
            manifest = adapter.commit(store, speaker.base_model, speaker.precision)
        self._adapter_id = adapter.adapter_id if adapter else None
        self._server = LLMServer(
            InferenceArgs(
                base_model=speaker.base_model,
                base_precision=speaker.precision,
                storage_url=store.url,
                storage_endpoint_url=locations.endpoint_url(),
                model_cache=str(locations.model_cache()),
                cache_dir=str(here / "cache"),
                slots=1,
                rows=engine.rows,
                max_len=engine.max_length,
                queue_timeout_s=24 * 3600.0,  # rows wait for their turn as long as it takes
                cpu_threads=engine.cpu_threads,
            )
        )
        if manifest is not None:  # an adapter that cannot be served ends the run here, and not once for every row
            asyncio.run(self._server.admit(manifest.model_dump(mode="json"), None))

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if self._refused is not None:
            yield {"result": [json.dumps({"refused": self._refused.to_wire()})]}
            return
        asked = zip(batch["index"].tolist(), batch["question"].tolist(), strict=True)
        answers = await asyncio.gather(*(self._answer(index, json.loads(question)) for index, question in asked))
        yield {"result": [json.dumps(answer) for answer in answers]}

    async def _answer(self, index: int, question: dict[str, Any]) -> Result:
        try:
            adapter_id = None if question.pop("as_base", False) else self._adapter_id
            request = await asyncio.to_thread(_request, question, self._sampling)
            async with aclosing(self._server.chat(request, adapter_id)) as items:  # type: ignore[type-var]
                return {"index": index, **await _collect(items)}
        except ArkorError as error:  # this row's, and no other's
            return {"index": index, "error": error.message}


async def _collect(items: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    turn, end = AssistantTurn(), dict[str, Any]()
    async for item in items:
        if not turn.add(item) and item["type"] == "end":
            end = {"finish_reason": item["finish_reason"], "usage": item["usage"]}
    message = turn.message
    calls = {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
    return {"answer": message["content"] or "", **calls, **end}


def _request(question: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
    """For the engine. Raises InvalidRequestError."""
    from pydantic import ValidationError

    from arkor_ray.schemas.chat import ChatRequest

    try:
        body = {"baseModel": "-", **{k: v for k, v in question.items() if v}, **sampling.body()}
        return ChatRequest.model_validate(body).for_engine()
    except ValidationError as error:
        raise invalid_request(error) from error


def _room(replicas: int, kind: str) -> dict[str, Any]:
    """The resources of one actor. Raises InvalidRequestError when the cluster could never start them all."""
    import ray

    there = int(ray.cluster_resources().get(kind, 0))
    if replicas > there:
        raise InvalidRequestError(
            f"--replicas {replicas}: each takes one {kind}, and the cluster has {there}; lower it or add nodes",
            param="--replicas",
        )
    return {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}


def _result(text: str) -> Result:
    """Raises the error for which a replica can answer nothing."""
    result = json.loads(text)
    if "refused" in result:
        raise from_wire(0, result["refused"])
    return result
