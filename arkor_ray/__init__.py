"""arkor-ray: LoRA fine-tuning on Ray, with every checkpoint answering while training goes on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from arkor_ray.client import AsyncClient as AsyncClient
    from arkor_ray.client import AsyncTrainer as AsyncTrainer
    from arkor_ray.client import BlobDataset as BlobDataset
    from arkor_ray.client import Client as Client
    from arkor_ray.client import HuggingfaceDataset as HuggingfaceDataset
    from arkor_ray.client import LoraConfig as LoraConfig
    from arkor_ray.client import Trainer as Trainer
    from arkor_ray.client import TrainerCallbacks as TrainerCallbacks
    from arkor_ray.client import TrainingAborted as TrainingAborted
    from arkor_ray.client import TrainingResult as TrainingResult
    from arkor_ray.client import aiter_text as aiter_text
    from arkor_ray.client import create_async_trainer as create_async_trainer
    from arkor_ray.client import create_trainer as create_trainer
    from arkor_ray.client import iter_text as iter_text
    from arkor_ray.client import text_of as text_of
    from arkor_ray.errors import AdapterError as AdapterError
    from arkor_ray.errors import ArkorError as ArkorError
    from arkor_ray.errors import AuthenticationError as AuthenticationError
    from arkor_ray.errors import ConflictError as ConflictError
    from arkor_ray.errors import DatasetError as DatasetError
    from arkor_ray.errors import GoneError as GoneError
    from arkor_ray.errors import InternalError as InternalError
    from arkor_ray.errors import InvalidRequestError as InvalidRequestError
    from arkor_ray.errors import ModelError as ModelError
    from arkor_ray.errors import NotFoundError as NotFoundError
    from arkor_ray.errors import PayloadTooLargeError as PayloadTooLargeError
    from arkor_ray.errors import PermissionDeniedError as PermissionDeniedError
    from arkor_ray.errors import RateLimitError as RateLimitError
    from arkor_ray.errors import ServiceUnavailableError as ServiceUnavailableError
    from arkor_ray.errors import StorageError as StorageError
    from arkor_ray.errors import TrainingError as TrainingError
    from arkor_ray.schemas.job import JobConfig as JobConfig

# Where each public name lives. Loaded when first used (PEP 562), since Ray workers and the command line import this
# package for a single module of it.
_PUBLIC = {
    "arkor_ray.client": (
        "AsyncClient",
        "AsyncTrainer",
        "BlobDataset",
        "Client",
        "HuggingfaceDataset",
        "LoraConfig",
        "Trainer",
        "TrainerCallbacks",
        "TrainingAborted",
        "TrainingResult",
        "aiter_text",
        "create_async_trainer",
        "create_trainer",
        "iter_text",
        "text_of",
    ),
    "arkor_ray.errors": (
        "AdapterError",
        "ArkorError",
        "AuthenticationError",
        "ConflictError",
        "DatasetError",
        "GoneError",
        "InternalError",
        "InvalidRequestError",
        "ModelError",
        "NotFoundError",
        "PayloadTooLargeError",
        "PermissionDeniedError",
        "RateLimitError",
        "ServiceUnavailableError",
        "StorageError",
        "TrainingError",
    ),
    "arkor_ray.schemas.job": ("JobConfig",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
