"""An S3 service for tests, whichever it is: how to reach it, and a fresh bucket in it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class S3Endpoint:
    endpoint_url: str
    access_key: str = "test-access"
    secret_key: str = "test-secret"
    # Whether it is a real server: one that checks signatures and keeps its promises under concurrency.
    real: bool = True

    @classmethod
    def from_json(cls, text: str) -> S3Endpoint:
        """From what `python -m tests.servers.ceph` prints, or a bare URL of a service that takes the default keys."""
        return cls(**json.loads(text)) if text.lstrip().startswith("{") else cls(text)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def at(self, endpoint_url: str) -> S3Endpoint:
        """The same service by another way, such as a proxy."""
        return replace(self, endpoint_url=endpoint_url)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that is to use this service; they hide whatever account the machine has."""
        return {
            "ARKOR_RAY_S3_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self) -> str:
        """The name of a new, empty bucket."""
        import boto3

        name = f"test-{uuid.uuid4().hex[:16]}"
        boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        ).create_bucket(Bucket=name)
        return name


@contextmanager
def running_moto() -> Iterator[S3Endpoint]:
    """moto's server in this process: no real one (it takes any secret), but there within milliseconds."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Endpoint(f"http://{host}:{port}", real=False)
    finally:
        server.stop()
