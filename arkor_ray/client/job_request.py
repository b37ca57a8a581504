"""A job as Python code asks for it, turned into the wire's `name` and `config`. What was not set stays absent."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.dataset import is_local_path

#: A number of optimizer steps; a share of the run between 0 and 1; or the wire's object with `steps` or `ratio`.
Steps = int | float | Mapping[str, float]


@dataclass(frozen=True)
class LoraConfig:
    """The adapter, and how the base model is held: None leaves a choice to the service."""

    r: int | None = None
    alpha: int | None = None
    #: Tokens; longer samples are truncated.
    max_length: int | None = None
    #: QLoRA: the base model in 4 bits.
    load_in_4bit: bool | None = None


@dataclass(frozen=True)
class HuggingfaceDataset:
    """A data set of the Hugging Face Hub; `split` may be a slice such as `train[:500]`."""

    name: str
    split: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class BlobDataset:
    """A file behind a URL, fetched once; `token` is sent as a bearer token and never shown again."""

    url: str
    token: str | None = None


Dataset = HuggingfaceDataset | BlobDataset | Mapping[str, Any] | str


class TrainingOptions(TypedDict, total=False):
    """Every option of a job beside its name, model, data set and adapter; each means what TrainingArguments means by it."""

    max_steps: int
    num_train_epochs: float
    learning_rate: float
    batch_size: int  # rows per worker and forward pass
    gradient_accumulation_steps: int
    optim: str
    lr_scheduler_type: str
    weight_decay: float
    warmup_steps: Steps
    logging_steps: Steps
    save_steps: Steps
    eval_steps: Steps
    train_on_responses_only: bool
    dataset_format: str | Mapping[str, Any]
    dataset_split: str | Mapping[str, Any]
    dry_run: bool
    num_workers: int
    zero_stage: Literal[0, 1, 2, 3]
    precision: Literal["fp32", "bf16", "fp16"]
    seed: int


#: The options' names, in the order in which they are documented.
OPTION_NAMES = tuple(TrainingOptions.__annotations__)
_STEP_OPTIONS = ("warmup_steps", "logging_steps", "save_steps", "eval_steps")


@dataclass(frozen=True)
class JobRequest:
    """What `POST /v1/jobs` is sent."""

    name: str
    config: dict[str, Any]


def job_request(
    *, name: str, model: str, dataset: Dataset, lora: LoraConfig | Mapping[str, Any] | None = None, **options: Any
) -> JobRequest:
    """Build the request. Raises TypeError for an unknown option, naming the nearest known one.

    Values are judged by the service, which names the first bad field when the job is submitted.
    """
    for option in options:
        if option not in OPTION_NAMES:
            raise TypeError(unknown(option, OPTION_NAMES, "option"))
    config: dict[str, Any] = {"model": model, "datasetSource": dataset_source(dataset)}
    config |= {_wire_name(key): value for key, value in _lora_fields(lora).items() if value is not None}
    for option in OPTION_NAMES:
        value = options.get(option)
        if value is not None:
            config[_wire_name(option)] = _steps(value) if option in _STEP_OPTIONS else _plain(value)
    return JobRequest(name, config)


def dataset_source(dataset: Dataset) -> dict[str, Any]:
    """The wire's `datasetSource`: a string is a URL when it has a scheme, else a name on the Hub.

    Raises InvalidRequestError for a path on this machine, which the service cannot read.
    """
    if isinstance(dataset, HuggingfaceDataset):
        dataset = {"type": "huggingface", **asdict(dataset)}
    elif isinstance(dataset, BlobDataset):
        dataset = {"type": "blob", **asdict(dataset)}
    elif isinstance(dataset, str):
        if "://" in dataset:
            dataset = {"type": "blob", "url": dataset}
        else:
            _refuse_local_path(dataset)
            dataset = {"type": "huggingface", "name": dataset}
    elif "type" not in dataset and ("url" in dataset) != ("name" in dataset):
        dataset = {"type": "blob" if "url" in dataset else "huggingface", **dataset}
    return {key: value for key, value in dataset.items() if value is not None}


def unknown(key: str, known: Iterable[str], what: str, *, spelled: str | None = None) -> str:
    """A sentence about a key nobody knows, with the nearest one that somebody does; `spelled` as the known ones are."""
    names = sorted(known)
    near = difflib.get_close_matches(spelled or key, names, n=1, cutoff=0.6)
    return f"unknown {what} {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}")


def _lora_fields(lora: LoraConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    if lora is None:
        return {}
    if isinstance(lora, LoraConfig):
        return asdict(lora)
    names = [field.name for field in fields(LoraConfig)]
    for key in lora:
        if key not in names:
            raise TypeError(unknown(key, names, "LoRA option"))
    return dict(lora)


def _wire_name(name: str) -> str:
    """The wire's spelling, which is camelCase, and `loraR` and `loraAlpha` for what belongs to LoRA alone."""
    if name in ("r", "alpha"):
        name = f"lora_{name}"
    first, *rest = name.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in rest)


def _steps(value: Steps) -> Any:
    if isinstance(value, float) and 0 < value < 1:
        return {"ratio": value}
    return _plain(value)


def _plain(value: Any) -> Any:
    return {_wire_name(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else value


def _refuse_local_path(text: str) -> None:
    if not is_local_path(text):
        return
    path = Path(text).expanduser()
    raise InvalidRequestError(
        f"dataset: {text!r} is a path on this machine, and the service reads data sets by URL or by name on the Hub. "
        f"Where both are one machine and ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS=1 is set for the service, "
        f"use {path.absolute().as_uri()!r}",
        param="datasetSource",
    )
