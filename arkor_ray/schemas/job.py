"""A fine-tuning job: what the user asks for, the life it has, and how it is shown.

`JobConfig` is the wire's `config`. It is generous in form, as the contract asks (numbers as strings, step fields in three
spellings), and strict in meaning: every value that could not train is refused here, at submit time, by name.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from arkor_ray.schemas.base import Timestamp, WireModel, invalid_request
from arkor_ray.schemas.dataset import DatasetFormat, DatasetSource, HoldOut

# Names of `TrainingArguments.optim` that the train loop can run and resume on any number of workers.
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw",
    "sgd",
)
BITSANDBYTES_OPTIMIZERS = frozenset(name for name in OPTIMIZERS if "8bit" in name or name.startswith("paged_"))
# Names of `transformers.SchedulerType` that need no further arguments.
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)

MAX_LORA_RANK = 256  # what serving accepts: a job whose adapters could not answer is refused

Precision = Literal["fp32", "bf16", "fp16"]


class JobStatus(StrEnum):
    """Terminal is terminal: enforced where db/jobs.py sets a status."""

    QUEUED = "queued"
    """Accepted and stored; no training event yet."""
    RUNNING = "running"
    """training.started is in the event log; may be between two attempts."""
    COMPLETED = "completed"
    """The final adapter is verified, stored and answers."""
    FAILED = "failed"
    """`error` says why; checkpoints saved until then still answer."""
    CANCELLED = "cancelled"
    """By the user. Checkpoints saved until then still answer."""

    @property
    def is_terminal(self) -> bool:
        return self in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


class StepSpec(WireModel):
    """A number of steps, or a share of the run: exactly one of the two."""

    steps: int | None = Field(default=None, ge=0, le=10_000_000)
    ratio: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _one(self) -> StepSpec:
        if (self.steps is None) == (self.ratio is None):
            raise ValueError("give exactly one of 'steps' and 'ratio'")
        return self

    def resolve(self, total_steps: int) -> int:
        """Steps out of a run of `total_steps`; a positive ratio gives at least 1."""
        if self.steps is not None:
            return self.steps
        assert self.ratio is not None
        return max(1, round(self.ratio * total_steps)) if self.ratio > 0 else 0


def _step_spec(value: Any) -> Any:
    """The bare number and the numeric string of older templates mean `steps`."""
    if value is None or isinstance(value, (dict, StepSpec)):
        return value
    number = _whole_number(value)
    if isinstance(number, int):
        return {"steps": number}
    raise ValueError("must be a whole number of steps, or {'steps': n}, or {'ratio': r} with 0 < r < 1")


def _whole_number(value: Any) -> Any:
    """`"25"` and `25.0` are 25; `true` and `25.5` are nothing, and pydantic says so."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("must be a number") from None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _real_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    # A whole number is finite, also one that is too large for a float and for math.isfinite.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _switch(value: Any) -> Any:
    """`trainOnResponsesOnly` is a boolean or `{"enabled": bool}`."""
    if isinstance(value, dict):
        value = value.get("enabled", True)
    if value is not None and not isinstance(value, bool):
        raise ValueError("must be true, false or {'enabled': true|false}")
    return value


Int = Annotated[int, BeforeValidator(_whole_number)]
Float = Annotated[float, BeforeValidator(_real_number)]
Steps = Annotated[StepSpec, BeforeValidator(_step_spec)]


class JobConfig(WireModel):
    """The wire's `config`. Each field means what the same field of TrainingArguments or LoraConfig means."""

    model: str = Field(min_length=1, description="A name of the server's catalogue; compared case-insensitively.")
    dataset_source: DatasetSource
    dataset_format: DatasetFormat = Field(default=None, description="Absent: detected from the columns.")
    dataset_split: HoldOut | str | None = Field(
        default=None, description="An object holds rows out for evaluation; a string is the split to load."
    )

    max_steps: Int | None = Field(default=None, ge=1, le=10_000_000, description="Optimizer steps; beats epochs.")
    num_train_epochs: Float | None = Field(default=None, gt=0, le=10_000)
    learning_rate: Float = Field(default=2e-4, gt=0, le=10)
    batch_size: Int = Field(default=4, ge=1, le=4096, description="Rows per worker and forward pass.")
    gradient_accumulation_steps: Int = Field(default=1, ge=1, le=4096)
    optim: str = "adamw_torch"
    lr_scheduler_type: str = "linear"
    weight_decay: Float = Field(default=0.01, ge=0, le=10)
    warmup_steps: Steps = StepSpec(steps=0)
    logging_steps: Steps = StepSpec(steps=1)
    save_steps: Steps = Field(default=StepSpec(ratio=0.25), description="Absent: every quarter of the run.")
    eval_steps: Steps | None = None

    lora_r: Int = Field(default=16, ge=1, le=MAX_LORA_RANK)
    lora_alpha: Int = Field(default=16, ge=1, le=4096)
    max_length: Int | None = Field(default=None, ge=8, le=1_048_576, description="Tokens; absent: the model's context.")
    load_in_4bit: bool = Field(default=False, alias="loadIn4bit")
    train_on_responses_only: Annotated[bool | None, BeforeValidator(_switch)] = None
    dry_run: bool = Field(default=False, description="At most 50 rows and 10 steps, through every stage.")
    gpu_types: list[str] | None = Field(default=None, min_length=1)

    num_workers: Int = Field(
        default=1, ge=1, le=1024, description="Ray Train workers; one GPU each where there are GPUs."
    )
    zero_stage: Int = Field(default=0, ge=0, le=3, description="DeepSpeed ZeRO stage; 0 is plain data parallelism.")
    precision: Precision | None = Field(default=None, description="Absent: bf16 on GPU, fp32 on CPU.")
    seed: Int = Field(default=42, ge=0, lt=2**32)

    @field_validator("optim", "lr_scheduler_type", mode="after")
    @classmethod
    def _known_name(cls, value: str, info: Any) -> str:
        known = OPTIMIZERS if info.field_name == "optim" else LR_SCHEDULERS
        if value.lower() not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return value.lower()

    @field_validator("logging_steps", mode="after")
    @classmethod
    def _positive(cls, value: StepSpec) -> StepSpec:
        if value.steps == 0 or value.ratio == 0:
            raise ValueError("must be at least 1 step")
        return value

    @field_validator("save_steps", "eval_steps", mode="after")
    @classmethod
    def _positive_ratio(cls, value: StepSpec | None) -> StepSpec | None:
        if value is not None and value.ratio == 0:
            raise ValueError("ratio must be greater than 0")
        return value

    @model_validator(mode="after")
    def _possible(self) -> JobConfig:
        if self.load_in_4bit and self.zero_stage == 3:
            raise ValueError(
                "loadIn4bit with zeroStage 3: every worker would hold the whole 4-bit model before it is sharded; "
                "use zeroStage 0, 1 or 2, or loadIn4bit false"
            )
        if self.max_steps is not None and (self.warmup_steps.steps or 0) > self.max_steps:
            raise ValueError(f"warmupSteps is {self.warmup_steps.steps}, more than maxSteps {self.max_steps}")
        return self

    @classmethod
    def parse(cls, config: Any, *, prefix: str = "config.") -> JobConfig:
        """From the wire. Raises InvalidRequestError that names the first bad field, its value and the remedy."""
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise invalid_request(error, prefix=prefix) from error


def hide_token(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as it may be shown or kept: the data set's token is left out, in whichever spelling it came."""
    kept = dict(config)
    for key in ("datasetSource", "dataset_source"):
        if isinstance(kept.get(key), dict):
            kept[key] = {name: value for name, value in kept[key].items() if name != "token"}
    return kept


class JobCreate(WireModel):
    name: str = Field(min_length=1, max_length=200)
    config: dict[str, Any]


class Job(WireModel):
    """The wire's job object. `config` is an echo of what was sent."""

    id: str
    org_id: str
    project_id: str
    name: str
    status: JobStatus
    config: dict[str, Any]
    error: str | None = None
    created_at: Timestamp
    started_at: Timestamp | None = None
    completed_at: Timestamp | None = None
