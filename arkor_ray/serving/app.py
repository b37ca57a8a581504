"""The Ray Serve application of one base model. Cheap to import: torch is loaded in the replicas only."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from arkor_ray.placement import HARDLY_A_CPU
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.schemas.job import MAX_LORA_RANK
from arkor_ray.schemas.model import split_reference

if TYPE_CHECKING:
    from ray.serve import Application

    from arkor_ray.settings import Settings

DEPLOYMENT = "LLMServer"
ONLY_GPU_SHARE = 0.4  # Ray's bookkeeping, not a limit on memory
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class InferenceArgs(BaseModel):
    """What a replica is started with. Two replicas with the same arguments are interchangeable."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    base_model: str = Field(
        description="Its reference (schemas/model.py); a directory is one that every serving node has."
    )
    base_name: str | None = Field(default=None, description="What messages call it; absent: the reference.")
    trust_remote_code: bool = Field(default=False, description="Whether code in the base model's files may run.")
    base_precision: BasePrecision
    storage_url: str = Field(description="file:///absolute/directory or s3://bucket/prefix, where adapters are kept.")
    storage_endpoint_url: str | None = Field(default=None, description="For S3 other than AWS.")
    model_cache: str | None = Field(default=None, description="For base models out of S3; absent: inside cache_dir.")
    cache_dir: str = Field(description="On local disk; replicas of a node share it.")
    slots: int = Field(default=16, ge=1, description="Adapters in device memory.")
    rows: int = Field(default=16, ge=1, description="Requests that run at once; more wait.")
    max_len: int = Field(default=2048, ge=16, description="Tokens of prompt and answer together.")
    max_rank: int = Field(default=MAX_LORA_RANK, ge=1, description="The largest LoRA rank accepted.")
    prefill_budget: int | None = Field(
        default=None, ge=1, description="Prompt tokens read between two decode steps; by device when absent."
    )
    ram_bytes: int = Field(default=2 * 2**30, ge=0, description="Adapter files kept in host memory.")
    disk_bytes: int = Field(default=20 * 2**30, ge=0, description="Adapter files kept in cache_dir.")
    queue_timeout_s: float = Field(default=60.0, gt=0, description="Longest wait for a row and a slot, then 503.")
    num_replicas: int = Field(default=1, ge=1)
    num_gpus: float | None = Field(default=None, ge=0, description="Per replica; absent: by gpus_of_replica.")
    cpu_threads: int | None = Field(default=None, ge=1, description="Absent: half of the node's cores.")
    nodes: dict[str, str] = Field(default_factory=dict, description="Label selector of the nodes for replicas.")
    max_ongoing_requests: int = Field(default=1000, ge=1, description="Per replica, running and waiting.")


def gpus_of_replica(cluster_gpus: float) -> float:
    """A GPU of its own; where the cluster has just one, a share of it, so that training finds the rest."""
    if cluster_gpus < 1:
        return 0.0
    return ONLY_GPU_SHARE if cluster_gpus == 1 else 1.0


def application_name(base_model: str, base_precision: str) -> str:
    """`inference-<slug>-<hash8>`: one application for each base model, its revision included, and precision."""
    source, _ = split_reference(base_model)
    slug = re.sub(r"[^a-z0-9]+", "-", source.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:40] or "base"
    digest = hashlib.sha256(f"{base_model}\n{base_precision}".encode()).hexdigest()[:8]
    return f"inference-{slug}-{digest}"


def inference_args(settings: Settings, base_model: str, base_precision: BasePrecision) -> InferenceArgs:
    """Arguments for a base model (a reference) from what the catalogue says about it, and for the rest the settings."""
    from arkor_ray.placement import nodes_for

    base = settings.base_models.of_base(base_model)
    own = base.serving
    return InferenceArgs(
        base_model=base_model,
        base_name=base.name,
        trust_remote_code=base.trust_remote_code,
        base_precision=base_precision,
        storage_url=settings.storage_url,
        storage_endpoint_url=settings.s3_endpoint_url,
        cache_dir=str(settings.data_dir / "serving-cache"),
        model_cache=str(settings.model_cache),
        slots=own.slots or settings.serving_slots,
        rows=own.rows or settings.serving_rows,
        max_len=own.max_length or settings.serving_max_length,
        num_replicas=own.replicas or settings.serving_replicas,
        num_gpus=own.gpus,
        nodes=nodes_for(settings, "serving"),
    )


def build_app(args: InferenceArgs) -> Application:
    """The application, to be run under `application_name` with no route: it is called through a deployment handle.

    Callers set `handle.options(session_id=adapter_id)`, so that an adapter's requests meet at the replica that has it.
    """
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from arkor_ray.serving.llm_server import LLMReplica

    num_gpus = args.num_gpus
    if num_gpus is None:
        num_gpus = gpus_of_replica(ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0)
    deployment = serve.deployment(
        LLMReplica,
        name=DEPLOYMENT,
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        # On a machine without GPUs inference shares the cores with training, which must not wait for it.
        ray_actor_options={"num_cpus": HARDLY_A_CPU, "num_gpus": num_gpus, "label_selector": args.nodes},
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER,  # type: ignore[arg-type]
            request_router_kwargs={"num_fallback_replicas": 2},
        ),
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
    )
    return deployment.bind(args)  # type: ignore[attr-defined]


class AheadArgs(BaseModel):
    """Arguments of an application that a config for `serve deploy` has, so that no first request waits for its start."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    application: str = Field(description="The application's own name, which must be that of its base model.")
    model: str = Field(description="A base model by a name of the catalogue.")
    precision: BasePrecision = Field(description="That jobs and chats ask for; a GPU's default is bf16, a CPU's fp32.")


def application(args: dict[str, str]) -> Application:
    """For `serve deploy`: the application of one base model just as the controller would start it when it is needed.

    `args` are those of AheadArgs. Settings come from ARKOR_RAY_* of the environment. Raises InvalidRequestError where the
    controller would not find it under its name and start another, and ModelError where the catalogue does not have the model.
    """
    from arkor_ray.errors import InvalidRequestError
    from arkor_ray.settings import Settings

    settings, ahead = Settings.load(), AheadArgs.model_validate(args)
    base_model = settings.resolve_model(ahead.model)
    name = application_name(base_model, ahead.precision)
    if ahead.application != name:
        raise InvalidRequestError(
            f"the application of {ahead.model} in {ahead.precision} must be named {name}, not {ahead.application}: under "
            "another name it would not be found, and started once more",
            param="application",
        )
    return build_app(inference_args(settings, base_model, ahead.precision))
