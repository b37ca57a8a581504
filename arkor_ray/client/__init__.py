"""The Python SDK: needs the base install only, and imports neither torch nor ray."""

from arkor_ray.client.async_client import AsyncClient
from arkor_ray.client.callbacks import (
    CheckpointContext,
    CompletedContext,
    FailedContext,
    LogContext,
    StartedContext,
    TrainerCallbacks,
)
from arkor_ray.client.client import Client
from arkor_ray.client.inference import aiter_text, iter_text, text_of
from arkor_ray.client.job_file import load_job_file
from arkor_ray.client.job_request import BlobDataset, HuggingfaceDataset, LoraConfig
from arkor_ray.client.trainer import AsyncTrainer, Trainer, create_async_trainer, create_trainer
from arkor_ray.client.training_run import TrainingAborted, TrainingResult

__all__ = [
    "AsyncClient",
    "AsyncTrainer",
    "BlobDataset",
    "CheckpointContext",
    "Client",
    "CompletedContext",
    "FailedContext",
    "HuggingfaceDataset",
    "LogContext",
    "LoraConfig",
    "StartedContext",
    "Trainer",
    "TrainerCallbacks",
    "TrainingAborted",
    "TrainingResult",
    "aiter_text",
    "create_async_trainer",
    "create_trainer",
    "iter_text",
    "load_job_file",
    "text_of",
]
