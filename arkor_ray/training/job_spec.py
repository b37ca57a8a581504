"""What the driver must know about a job, free of the database and of Ray."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from arkor_ray.schemas.job import JobConfig
from arkor_ray.storage.base_files import BaseFiles, base_files
from arkor_ray.storage.object_store import ObjectStore, open_store


@dataclass(frozen=True)
class DatasetPolicy:
    """What the operator allows data set sources to be; the defaults are those of `Settings`."""

    allow_private_hosts: bool = False
    allow_local_paths: bool = False
    max_bytes: int = 2 * 2**30
    timeout_s: float = 600.0


@dataclass(frozen=True)
class JobSpec:
    """One attempt at one job. Picklable; crosses from the driver to the workers.

    `base_model` is the reference (see schemas/model.py) that the catalogue has for `config.model`, `base_name` the name that
    it has there (empty: the reference), for metrics, and `model_cache` the
    folder of each node for base models that come from S3. `cpus_per_worker` is what Ray reserves, small so that a laptop
    has room for serving besides; it limits no threads. `nodes` is the label selector of the nodes to train on. `scratch_dir`
    is a local folder of the machine for spooled checkpoints; it may vanish at any time. `rows_per_pass` is what goes through
    one forward pass where `config.batch_size` did not fit into memory.
    """

    job_id: str
    config: JobConfig
    base_model: str
    storage_url: str
    attempt: int = 1
    base_name: str = ""
    s3_endpoint_url: str | None = None
    trust_remote_code: bool = False
    model_cache: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "arkor-ray-models")
    dataset_policy: DatasetPolicy = field(default_factory=DatasetPolicy)
    max_worker_failures: int = 5
    cpus_per_worker: float = 0.5
    nodes: dict[str, str] = field(default_factory=dict)
    scratch_dir: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "arkor-ray-training")
    rows_per_pass: int | None = None

    def open_store(self) -> ObjectStore:
        return open_store(self.storage_url, endpoint_url=self.s3_endpoint_url)

    def base_files(self, *, weights: bool = True) -> BaseFiles:
        """The base model on the node that asks; see `storage.base_files`."""
        return base_files(
            self.base_model,
            self.model_cache,
            name=self.config.model,
            trust_remote_code=self.trust_remote_code,
            endpoint_url=self.s3_endpoint_url,
            weights=weights,
        )
