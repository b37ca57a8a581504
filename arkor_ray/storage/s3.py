"""Objects in a bucket of an S3 service: AWS, or anything that speaks its protocol (Ceph, MinIO, R2, ...)."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from arkor_ray.errors import ObjectExistsError, ObjectNotFoundError, StorageError
from arkor_ray.storage.atomic_file import replacing
from arkor_ray.storage.keys import check_folder, check_key, check_prefix
from arkor_ray.storage.object_store import ObjectInfo, Upload
from arkor_ray.storage.retry import RetryPolicy
from arkor_ray.storage.s3_parts import PARALLEL_PARTS, Part, in_parallel, parts_of, write_all
from arkor_ray.storage.s3_requests import ClientError, S3Requests, error_code, error_status

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

logger = logging.getLogger(__name__)

# Objects up to this size go in one request, both ways.
SINGLE_REQUEST_BYTES = 16 << 20
# The most that one request may carry. What is larger and must replace nothing goes in parts all the same, with the condition
# at their end, where AWS takes it.
CONDITIONAL_BYTES = 5 << 30
# Names the upload that made an object, for the case that the answer to the upload's last request is lost.
_UPLOAD_METADATA = "arkor-upload"


class S3Store:
    """An `ObjectStore` in `bucket`, which must exist, with every key below `prefix`.

    Transfers of more than 16 MiB go in parallel parts, each retried on its own, so an outage repeats a few parts and
    not the file (boto3's own transfer manager starts the file again). A process killed in the middle of a large upload
    leaves parts that are visible to nobody but cost room: `uploads` tells them, `abort` gives the room back.
    """

    def __init__(
        self, bucket: str, prefix: str = "", *, endpoint_url: str | None = None, retry: RetryPolicy | None = None
    ) -> None:
        if not bucket:
            raise ValueError("The storage URL names no bucket. Write s3://bucket/prefix.")
        prefix = prefix.strip("/")
        retry = retry or RetryPolicy()
        self._arguments = (bucket, prefix, endpoint_url, retry)
        self._prefix = check_prefix(prefix and prefix + "/")
        self._bucket = bucket
        # Twice, so that a transfer does not make small requests wait for a connection.
        self._requests = S3Requests(bucket, endpoint_url, retry, connections=2 * PARALLEL_PARTS)
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._arguments

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        name = self._name(key)
        if if_absent:
            self._put_if_absent(name, data)
        elif len(data) <= SINGLE_REQUEST_BYTES:
            self._requests.send("put", name, lambda s3, _: self._put_object(s3, name, data))
        else:
            view = memoryview(data)
            self._put_parts(name, len(data), lambda start, length: bytes(view[start : start + length]))

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        name = self._name(key)
        with path.open("rb") as file:
            fd = file.fileno()
            size = os.fstat(fd).st_size

            def read(start: int, length: int) -> bytes:
                data = os.pread(fd, length, start)
                if len(data) != length:
                    raise StorageError(f"{path} became shorter while it was being uploaded.")
                return data

            if if_absent and size <= CONDITIONAL_BYTES:
                self._put_if_absent(name, file)
            elif if_absent:
                self._put_parts(name, size, read, IfNoneMatch="*")
            elif size <= SINGLE_REQUEST_BYTES:
                data = read(0, size)
                self._requests.send("put", name, lambda s3, _: self._put_object(s3, name, data))
            else:
                self._put_parts(name, size, read)

    def get(self, key: str) -> bytes:
        small, size, etag = self._begin_get(self._name(key))
        if small is not None:
            return small
        content = bytearray(size)

        def keep(start: int, data: bytes) -> None:
            content[start : start + len(data)] = data

        self._get_parts(self._name(key), size, etag, keep)
        return bytes(content)

    def get_file(self, key: str, path: Path) -> None:
        small, size, etag = self._begin_get(self._name(key))
        with replacing(path) as temporary, temporary.open("wb") as file:
            if small is not None:
                file.write(small)
            else:
                fd = file.fileno()
                self._get_parts(self._name(key), size, etag, lambda start, data: write_all(fd, data, start))

    def head(self, key: str) -> ObjectInfo | None:
        name = self._name(key)

        def head(s3: S3Client, _: int) -> ObjectInfo | None:
            try:
                answer = s3.head_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if error_status(error) != 404:
                    raise
                # An answer to HEAD has no body to say what is missing: a bucket that is not there must not look empty.
                s3.head_bucket(Bucket=self._bucket)
                return None
            return ObjectInfo(key, answer["ContentLength"], answer["LastModified"])

        return self._requests.send("head", name, head)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        name = self._prefix + check_prefix(prefix)
        # The service sorts, by the bytes of the key. Pages go on from a key: a token may expire while the caller works.
        last = ""
        while True:
            page = self._requests.send(
                "list",
                name,
                lambda s3, _, last=last: s3.list_objects_v2(Bucket=self._bucket, Prefix=name, StartAfter=last),  # type: ignore[misc]
            )
            for found in page.get("Contents", []):
                last = found["Key"]
                yield ObjectInfo(last.removeprefix(self._prefix), found["Size"], found["LastModified"])
            if not page["IsTruncated"]:
                return

    def delete(self, key: str) -> None:
        name = self._name(key)
        try:
            self._requests.send("delete", name, lambda s3, _: s3.delete_object(Bucket=self._bucket, Key=name))
        except ObjectNotFoundError:
            return  # some services say so

    def delete_prefix(self, prefix: str) -> None:
        check_folder(prefix)
        self.delete_all(info.key for info in self.list(prefix))

    def delete_all(self, keys: Iterable[str]) -> None:
        # One by one: not every service has the request for many, nor the checksum that boto3 sends with it.
        in_parallel(lambda key, _: self.delete(key), keys)

    def uploads(self) -> Iterator[Upload]:
        key, upload_id = "", ""
        while True:
            page = self._requests.send(
                "list of uploads",
                self._prefix,
                lambda s3, _, key=key, upload_id=upload_id: s3.list_multipart_uploads(  # type: ignore[misc]
                    Bucket=self._bucket,
                    Prefix=self._prefix,
                    **({"KeyMarker": key, "UploadIdMarker": upload_id} if key else {}),
                ),
            )
            for found in page.get("Uploads", []):
                yield Upload(found["Key"].removeprefix(self._prefix), found["UploadId"], found["Initiated"])
            if not page.get("IsTruncated"):
                return
            key, upload_id = page["NextKeyMarker"], page["NextUploadIdMarker"]

    def abort(self, upload: Upload) -> None:
        name = self._name(upload.key)

        def abort(s3: S3Client, _: int) -> None:
            try:
                s3.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload.id)
            except ClientError as error:
                if error_code(error) != "NoSuchUpload":
                    raise

        self._requests.send("abort of an upload", name, abort)

    def now(self) -> datetime:
        def ask(s3: S3Client, _: int) -> datetime:
            try:
                answer: Any = s3.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            except ClientError as error:
                if error_status(error) >= 500:
                    raise
                answer = error.response  # a refusal tells the time too, even one because of it
            return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(UTC)

        return self._requests.send("list", self._prefix, ask)

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _put_object(self, s3: S3Client, name: str, data: bytes) -> None:
        s3.put_object(Bucket=self._bucket, Key=name, Body=data, ContentMD5=_md5(data))

    def _put_if_absent(self, name: str, body: bytes | BufferedReader) -> None:
        """In one request: many services ignore the condition at the end of a multipart upload."""
        token, md5 = uuid.uuid4().hex, _md5(body)

        def put(s3: S3Client, failures: int) -> None:
            if not isinstance(body, bytes):
                body.seek(0)
            try:
                s3.put_object(
                    Bucket=self._bucket,
                    Key=name,
                    Body=body,
                    ContentMD5=md5,
                    Metadata={_UPLOAD_METADATA: token},
                    IfNoneMatch="*",
                )
            except ClientError as error:
                self._raise_unless_ours(error, s3, name, failures, token)

        self._requests.send("conditional put", name, put)

    def _raise_unless_ours(self, error: ClientError, s3: S3Client, name: str, failures: int, token: str) -> None:
        """For what ends a conditional write. An earlier send of it may have arrived and only its answer been lost."""
        if error_status(error) != 412:
            raise error
        if not (failures and self._was_made_by(s3, name, token)):
            raise ObjectExistsError(f"There is already an object {self._requests.describe(name)}.") from error

    def _put_parts(self, name: str, size: int, read: Callable[[int, int], bytes], **condition: Any) -> None:
        """Uploads `size` bytes, which `read(start, length)` returns piece by piece, from any thread."""
        token = uuid.uuid4().hex
        upload_id = self._requests.send(
            "put",
            name,
            lambda s3, _: s3.create_multipart_upload(Bucket=self._bucket, Key=name, Metadata={_UPLOAD_METADATA: token})[
                "UploadId"
            ],
        )

        def put_part(numbered: tuple[int, Part], stop: Event) -> CompletedPartTypeDef:
            number, (start, length) = numbered
            data = read(start, length)
            answer = self._requests.send(
                f"put of part {number}",
                name,
                lambda s3, _: s3.upload_part(
                    Bucket=self._bucket,
                    Key=name,
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=data,
                    ContentMD5=_md5(data),
                ),
                stop=stop,
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}

        def complete(s3: S3Client, failures: int) -> None:
            try:
                s3.complete_multipart_upload(
                    Bucket=self._bucket, Key=name, UploadId=upload_id, MultipartUpload={"Parts": parts}, **condition
                )
            except ClientError as error:
                # Done by an earlier send whose answer was lost?
                if not (failures and error_code(error) == "NoSuchUpload" and self._was_made_by(s3, name, token)):
                    self._raise_unless_ours(error, s3, name, failures, token)

        try:
            parts = in_parallel(put_part, enumerate(parts_of(size), start=1))
            self._requests.send("put", name, complete)
        except BaseException:
            self._abort(name, upload_id)
            raise

    def _was_made_by(self, s3: S3Client, name: str, token: str) -> bool:
        try:
            metadata = s3.head_object(Bucket=self._bucket, Key=name)["Metadata"]
        except ClientError as error:
            if error_status(error) == 404:
                return False
            raise
        return metadata.get(_UPLOAD_METADATA) == token

    def _abort(self, name: str, upload_id: str) -> None:
        """Gives the parts' room back, with one try: the reason for giving up is the news, not this."""
        try:
            self._requests.client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)
        except Exception as error:
            logger.warning("The parts of an upload to %s stay behind: %s", self._requests.describe(name), error)

    def _begin_get(self, name: str) -> tuple[bytes | None, int, str]:
        """The content of an object of up to `SINGLE_REQUEST_BYTES`, else None; its size; its version."""

        def get(s3: S3Client, _: int) -> tuple[bytes | None, int, str]:
            answer = s3.get_object(Bucket=self._bucket, Key=name)
            # Not `with answer["Body"]`: that gives the stream below, whose errors are urllib3's and not boto's.
            with closing(answer["Body"]) as body:
                size = answer["ContentLength"]
                return (body.read() if size <= SINGLE_REQUEST_BYTES else None), size, answer["ETag"]

        return self._requests.send("get", name, get)

    def _get_parts(self, name: str, size: int, etag: str, keep: Callable[[int, bytes], object]) -> None:
        """Calls `keep(start, data)` for every part, from several threads at once."""

        def get_part(part: Part, stop: Event) -> None:
            start, length = part

            def get(s3: S3Client, _: int) -> bytes:
                answer = s3.get_object(Bucket=self._bucket, Key=name, Range=f"bytes={start}-{start + length - 1}")
                with closing(answer["Body"]) as body:
                    # Compared here, because not every service understands If-Match alike.
                    if answer["ETag"] != etag:
                        raise StorageError(f"{self._requests.describe(name)} was replaced while it was being read.")
                    return body.read()

            data = self._requests.send(f"get from byte {start}", name, get, stop=stop)
            if len(data) != length:
                raise StorageError(f"{self._requests.describe(name)}: got {len(data)} bytes instead of {length}.")
            keep(start, data)

        in_parallel(get_part, parts_of(size))


def _rebuild(bucket: str, prefix: str, endpoint_url: str | None, retry: RetryPolicy) -> S3Store:
    return S3Store(bucket, prefix, endpoint_url=endpoint_url, retry=retry)


def _md5(body: bytes | BufferedReader) -> str:
    new = partial(hashlib.md5, usedforsecurity=False)
    digest = new(body) if isinstance(body, bytes) else hashlib.file_digest(body, new)
    return base64.b64encode(digest.digest()).decode()
