"""job.yaml: a user's own file, so a key that nobody knows is an error, never ignored.

```yaml
name: triage-run
model: arkor-ray/demo-base
dataset: {url: https://example.com/tickets.jsonl}   # or {name: owner/data, split: train}, or just the name or URL
lora: {r: 16, alpha: 16, max_length: 1024}
max_steps: 100
save_steps: 25
```

Keys are those of `create_trainer`, in snake_case or in the wire's camelCase.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from arkor_ray.client.job_request import (
    OPTION_NAMES,
    BlobDataset,
    HuggingfaceDataset,
    JobRequest,
    LoraConfig,
    job_request,
    unknown,
)
from arkor_ray.errors import InvalidRequestError
from arkor_ray.schemas.dataset import is_local_path
from arkor_ray.schemas.job import JobConfig

_TOP = ("name", "model", "dataset", "lora", *OPTION_NAMES)
# The wire's other names for the same things.
_SYNONYMS = {
    "dataset_source": "dataset",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "load_in4bit": "load_in_4bit",
}
_LORA = tuple(field.name for field in fields(LoraConfig))
_NESTED: dict[str, Iterable[str]] = {
    "lora": _LORA,
    "dataset": ("type", *(field.name for cls in (HuggingfaceDataset, BlobDataset) for field in fields(cls))),
    "dataset_format": ("type",),
    "dataset_split": ("enabled", "test_size", "seed"),
    "train_on_responses_only": ("enabled",),
    **dict.fromkeys(("warmup_steps", "logging_steps", "save_steps", "eval_steps"), ("steps", "ratio")),
}


def load_job_file(path: Path | str, *, name: str | None = None) -> JobRequest:
    """The job that a YAML (or JSON) file describes; `name` replaces the file's.

    A data set that is a file, by a path relative to the job file, becomes its file:/// URL, which a service on this machine
    reads if its operator lets it.

    Raises InvalidRequestError that names the file and what is wrong in it: unreadable, a key that is unknown or twice
    there, or a value that could not train.
    """
    import yaml  # here, so that programs without job files do not pay for it

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"Cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise InvalidRequestError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequestError(f"{path} must hold keys and values, such as model: and dataset:")
    try:
        content = _with_local_data(content, path.parent)
        return parse_job({**content, "name": name} if name else content, name=path.stem)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{path}: {error.message}", **error.fields) from error


def parse_job(content: Mapping[str, Any], *, name: str) -> JobRequest:
    """The job in a file's content; `name` is used when the content has none."""
    job = _known(content, (*_TOP, *_LORA), "")
    # The wire has the LoRA options beside the others.
    lora = {key: job.pop(key) for key in _LORA if key in job}
    for key, names in _NESTED.items():
        if isinstance(job.get(key), Mapping):
            job[key] = _known(job[key], names, f"{key}.")
    if lora:
        nested = job.get("lora") or {}
        twice = sorted(set(lora) & set(nested))
        if twice:
            raise InvalidRequestError(f"{twice[0]} is given twice, alone and under lora", param=twice[0])
        job["lora"] = {**nested, **lora}
    for key in ("model", "dataset"):
        if not job.get(key):
            raise InvalidRequestError(f"{key} is missing", param=key)
    if job.get("lora") is not None and not isinstance(job["lora"], Mapping):
        raise InvalidRequestError("lora must hold keys and values, such as r: 16", param="lora")
    if not isinstance(job["dataset"], (str, Mapping)):
        raise InvalidRequestError("dataset must be a name on the Hub, a URL, or keys and values", param="dataset")
    request = job_request(**{"name": name, **job})
    JobConfig.parse(request.config, prefix="")
    return request


def _with_local_data(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    dataset = content.get("dataset")
    if not isinstance(dataset, str) or not is_local_path(dataset):
        return content
    file = (folder / Path(dataset).expanduser()).absolute()
    if not file.is_file():
        raise InvalidRequestError(f"dataset: there is no file {file}", param="dataset")
    return {**content, "dataset": file.as_uri()}


def _known(content: Mapping[str, Any], names: Iterable[str], prefix: str) -> dict[str, Any]:
    known = {}
    for key, value in content.items():
        snake = re.sub(r"([A-Z])", lambda match: "_" + match[1].lower(), str(key))
        snake = _SYNONYMS.get(snake, snake)
        if snake not in names:
            sentence = unknown(prefix + str(key), [prefix + name for name in names], "key", spelled=prefix + snake)
            raise InvalidRequestError(sentence, param=str(key))
        if snake in known:
            raise InvalidRequestError(f"{prefix}{snake} is given twice", param=str(key))
        known[snake] = value
    return known
