"""Requests to an S3 service: the boto3 client, retries, and what its errors mean here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from arkor_ray.errors import ObjectNotFoundError, StorageError
from arkor_ray.schemas.address import check_s3_endpoint
from arkor_ray.storage.retry import RetryPolicy, call_with_retries

try:
    import boto3
    import botocore.config
    from botocore.exceptions import (
        BotoCoreError,
        ConnectionError,
        CredentialRetrievalError,
        HTTPClientError,
        IncompleteReadError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.exceptions import ClientError as ClientError  # for s3.py, which cannot import before the check below
    from botocore.parsers import ResponseParserError
except ImportError as error:
    raise ImportError("Storage at s3:// needs boto3. Install it: pip install 'arkor-ray[s3]'") from error

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 60

# Error codes that pass, among those that do not already say so by a status of 500 or more.
_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",  # damaged on the way
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",  # another conditional put of the key is under way: ask again who won
        "OperationAborted",
        "RequestTimeout",
        "RequestTimeoutException",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)


class S3Requests:
    """Sends requests to one bucket, again and again within the policy's budget, and translates what fails in the end.

    Credentials come from the places that every AWS tool reads (AWS_ACCESS_KEY_ID, profiles, instance roles). Error
    messages name bucket, key and endpoint, and never those.
    """

    def __init__(self, bucket: str, endpoint_url: str | None, retry: RetryPolicy, connections: int) -> None:
        if endpoint_url is not None:
            check_s3_endpoint(endpoint_url)
        self.bucket = bucket
        self.endpoint_url = endpoint_url
        self._retry = retry
        self._connections = connections
        self._lock = threading.Lock()
        self._client: S3Client | None = None

    @property
    def client(self) -> S3Client:
        """Made at first use, as that reads files and may ask a machine for its role; then shared by all threads."""
        with self._lock:
            if self._client is None:
                self._client = self._make_client()
            return self._client

    def send(self, action: str, key: str, call: Callable[[S3Client, int], T], *, stop: Event | None = None) -> T:
        """Returns `call(client, failures)` (see `call_with_retries`) for a request that does `action` with `key`.

        `call` must also read the body of the answer, so that a connection which breaks in it is retried too. Raises
        `ObjectNotFoundError` or `StorageError`. A `ClientError` of status 412 or "NoSuchUpload" is the caller's to
        understand and must not leave `call`.
        """
        try:
            client = self.client
            return call_with_retries(
                lambda failures: call(client, failures),
                self._retry,
                is_transient=is_transient,
                what=f"S3 {action} of {self.describe(key)}",
                stop=stop,
            )
        except (ClientError, BotoCoreError, ResponseParserError) as error:
            raise self._translate(action, key, error) from error

    def describe(self, key: str) -> str:
        """The object and where it is, for messages."""
        return f"s3://{self.bucket}/{key} at {self.endpoint_url or 'AWS'}"

    def _make_client(self) -> S3Client:
        session = boto3.session.Session()
        config = botocore.config.Config(
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=READ_TIMEOUT_SECONDS,
            max_pool_connections=self._connections,
            tcp_keepalive=True,
            # Retries are call_with_retries' alone: two loops, one in the other, keep no budget, and a conditional put
            # must know whether an earlier send of it may have arrived.
            retries={"total_max_attempts": 1, "mode": "standard"},
            # Services other than AWS rarely have a name for each bucket.
            s3={"addressing_style": "path" if self.endpoint_url else "auto"},
            # Many of them also refuse the checksum trailers that are boto3's default. All of them check Content-MD5,
            # which the store sends instead.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return session.client(
            "s3",
            endpoint_url=self.endpoint_url,
            # A signature needs some region, also where the service has none.
            region_name=session.region_name or ("us-east-1" if self.endpoint_url else None),
            config=config,
        )

    def _translate(self, action: str, key: str, error: Exception) -> StorageError:
        where = self.describe(key)
        if isinstance(error, ClientError):
            code, status = error_code(error), error_status(error)
            if code == "NoSuchKey":
                return ObjectNotFoundError(f"There is no object {where}.")
            if status == 404 and error.operation_name == "HeadBucket":
                code = "NoSuchBucket"
            reason = f"{code} (HTTP {status}): {error.response.get('Error', {}).get('Message', '')}"
        elif isinstance(error, NoCredentialsError | PartialCredentialsError):
            reason = "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
        else:
            reason = f"{type(error).__name__}: {error}"
        lasted = f" for {self._retry.budget_seconds:g} s" if is_transient(error) else ""
        return StorageError(f"S3 {action} of {where} failed{lasted}: {reason.rstrip('. ')}.")


def is_transient(error: Exception) -> bool:
    """Whether the same request may do better a little later."""
    if isinstance(error, ClientError):
        status = error_status(error)
        return (status >= 500 and status != 501) or status == 429 or error_code(error) in _TRANSIENT_CODES
    return isinstance(
        error,
        HTTPClientError | ConnectionError | IncompleteReadError | CredentialRetrievalError | ResponseParserError,
    )


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def error_status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
