"""`Client`: everything the API has, from plain code. `async_client.py` has the same for asyncio."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from arkor_ray.client import calls
from arkor_ray.client.adapter_download import AdapterFolder
from arkor_ray.client.calls import AdapterDetail, AdapterRef, Call, Flow, JobDetail
from arkor_ray.client.event_stream import NAMED_JOB_STATUSES, EventFollower
from arkor_ray.client.inference import iter_text
from arkor_ray.client.retry import MAX_RETRIES, Retries
from arkor_ray.client.session import LIMITS, Session, ensure_project
from arkor_ray.client.whole_file import whole_file
from arkor_ray.errors import ArkorError
from arkor_ray.schemas.checkpoint import Checkpoint
from arkor_ray.schemas.endpoint import AuthMode, Endpoint, EndpointKey, IssuedEndpointKey, RetentionMode
from arkor_ray.schemas.event import Event
from arkor_ray.schemas.identity import AnonymousToken, IssuedToken, Me, Token
from arkor_ray.schemas.job import Job
from arkor_ray.schemas.project import Project
from arkor_ray.schemas.run import Run

T = TypeVar("T")


class Client:
    """The API of one arkor-ray service, in one organisation and project. Safe to use from several threads.

    Nothing is sent before the first call. What is not given as an argument is looked up as `Session` says: the URL in
    `ARKOR_CLOUD_API_URL`, token and project in the files that the TypeScript SDK uses. Every method raises the same
    `arkor_ray.errors` classes that the service raised; `ServiceUnavailableError` also when there was no answer.

    What may be sent twice (reading, deleting, inference before its first token) is sent again up to `max_retries` times when
    nobody answers, or somebody says that it is worth trying again; what makes something, only if it was never sent.
    """

    def __init__(
        self,
        api_url: str | None = None,
        *,
        token: str | None = None,
        org: str | None = None,
        project: str | None = None,
        project_dir: Path | str | None = None,
        home: Path | str | None = None,
        transport: Any = None,
        max_retries: int = MAX_RETRIES,
        session: Session | None = None,
    ) -> None:
        self.session = session or Session(
            api_url,
            token=token,
            org=org,
            project=project,
            project_dir=project_dir,
            home=home,
            transport=transport,
            max_retries=max_retries,
        )
        self._http = httpx.Client(transport=self.session.transport, limits=LIMITS)
        self._preparing = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def base_url(self) -> str:
        return self.session.base_url

    # Identity and tokens

    def anonymous_token(self) -> AnonymousToken:
        """A new anonymous identity with its own organisation. It is returned only, neither used nor stored."""
        return self.send(calls.anonymous_token())

    def cli_config(self) -> dict[str, Any]:
        """How people log in: all null means without OAuth."""
        return self.send(calls.cli_config())

    def me(self) -> Me:
        return self.send(calls.me())

    def list_tokens(self) -> list[Token]:
        return self.send(calls.list_tokens())

    def create_token(self, label: str, *, email: str | None = None, expires_in_days: int | None = None) -> IssuedToken:
        """A new token for a member of this organisation; its plaintext is in this answer and never shown again."""
        return self.send(calls.create_token(label, email, expires_in_days))

    def revoke_token(self, token_id: str) -> None:
        self.send(calls.revoke_token(token_id))

    # Projects

    def list_projects(self) -> list[Project]:
        return self.send(calls.list_projects())

    def create_project(self, name: str, slug: str) -> Project:
        """Raises ConflictError when the slug is taken."""
        return self.send(calls.create_project(name, slug))

    def ensure_project(self, name: str, slug: str) -> Project:
        """The project with this slug, created if there is none."""
        self._prepare(calls.list_projects())
        return self._drive(ensure_project(name, slug))

    # Jobs

    def create_job(self, name: str, config: dict[str, Any]) -> Job:
        """Submit a job; `config` is the wire's. `create_trainer` builds it from keyword arguments."""
        return self.send(calls.create_job(name, config))

    def list_jobs(self) -> list[Job]:
        """All jobs of the project, newest first."""
        return self.send(calls.list_jobs())

    def get_job(self, job_id: str) -> Job:
        return self.send(calls.get_job(job_id)).job

    def get_job_detail(self, job_id: str) -> JobDetail:
        """The job and the events it has so far."""
        return self.send(calls.get_job(job_id))

    def cancel_job(self, job_id: str) -> None:
        """Returns once the job is marked cancelled. Raises ConflictError when it had ended already."""
        self.send(calls.cancel_job(job_id))

    def job_logs(self, job_id: str, *, attempt: int | None = None) -> str:
        """What the job's processes printed, in its newest attempt or the given one (they count from 1)."""
        return self.send(calls.job_logs(job_id, attempt))

    def follow_logs(self, job_id: str, *, attempt: int | None = None) -> Iterator[str]:
        """The same as it is printed, over all later attempts to the job's end, or to the end of the given attempt."""
        response = self.open(calls.job_logs(job_id, attempt, follow=True))
        try:
            yield from response.iter_text()
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error
        finally:
            response.close()

    def events(self, job_id: str, *, last_event_id: str | int | None = None) -> Iterator[Event]:
        """The job's events, from the first or from after `last_event_id`, until its end; reconnects by itself."""
        last = str(last_event_id) if last_event_id is not None else None
        return self.follow(job_id, EventFollower(last_event_id=last, permanent=NAMED_JOB_STATUSES))

    def follow(self, job_id: str, follower: EventFollower) -> Iterator[Event]:
        """As `events`, with a position that outlives the iterator: an event counts as seen when the next is asked for."""
        while not follower.done:
            failure: ArkorError | None = None
            try:
                response = self.open(calls.job_events(job_id, follower.connect()))
                try:
                    for chunk in response.iter_bytes():
                        yield from follower.receive(chunk)
                        if follower.done:
                            return
                finally:
                    response.close()
            except httpx.HTTPError as error:
                failure = self.session.unreachable(error)
            except ArkorError as error:
                failure = error
            time.sleep(follower.disconnected(failure))

    # Checkpoints and adapters

    def list_checkpoints(self, job_id: str) -> list[Checkpoint]:
        return self.send(calls.list_checkpoints(job_id))

    def get_checkpoint(self, job_id: str, ref: AdapterRef) -> AdapterDetail:
        """The adapter at step `ref`, or the one called "final", with its manifest."""
        return self.send(calls.get_checkpoint(job_id, ref))

    def download_adapter(self, job_id: str, ref: AdapterRef, directory: Path | str) -> Path:
        """Fetch an adapter into `directory/<adapter_id>`, a plain PEFT folder, and return its path.

        Every file is checked against the manifest; the folder appears whole. Does nothing if it is there already.
        """
        folder = AdapterFolder(directory, self.get_checkpoint(job_id, ref).manifest)
        if folder.is_complete:
            return folder.path
        with folder:
            for file in folder.manifest.files:
                response = self.open(calls.checkpoint_file(job_id, ref, file.path))
                try:
                    with folder.receive(file) as sink:
                        for chunk in response.iter_bytes():
                            sink.write(chunk)
                except httpx.HTTPError as error:
                    raise self.session.unreachable(error) from error
                finally:
                    response.close()
        return folder.path

    # Inference

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        job_id: str | None = None,
        step: AdapterRef = calls.FINAL,
        adapter: dict[str, Any] | None = None,
        base_model: str | None = None,
        stream: bool = True,
        **fields: Any,
    ) -> httpx.Response:
        """Ask a job's adapter (`job_id` with `step`, or `adapter` as a checkpoint's context has it) or a base model.

        `fields` are the wire's: max_tokens, temperature, top_p, stop, seed and more. Returns the raw response; a
        streamed one (the default) must be read to its end or closed. Errors before the first token are raised.
        """
        if job_id is not None:
            adapter = calls.adapter_of(job_id, step)
        call = calls.chat(messages, adapter=adapter, base_model=base_model, stream=stream, **fields)
        if stream:
            return self.open(call)
        self._prepare(call)
        return self._fetch(call)

    def chat_text(self, messages: list[dict[str, Any]], **arguments: Any) -> Iterator[str]:
        """As `chat`, yielding the pieces of text as they come."""
        try:
            yield from iter_text(self.chat(messages, stream=True, **arguments))
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error

    def list_models(self) -> list[dict[str, Any]]:
        """The base models that jobs may name."""
        return self.send(calls.list_models())

    # Endpoints

    def list_endpoints(self) -> list[Endpoint]:
        """All endpoints of the project, newest first."""
        return self.send(calls.list_endpoints())

    def create_endpoint(
        self,
        slug: str,
        *,
        job_id: str | None = None,
        step: AdapterRef = calls.FINAL,
        base_model: str | None = None,
        auth_mode: AuthMode = "fixed_api_key",
        run_retention_mode: RetentionMode | None = None,
        run_retention_days: int | None = None,
    ) -> Endpoint:
        """Publish a job's adapter (`job_id` with `step`) or a base model; returns once it can answer at its `url`.

        Raises ConflictError when the slug is taken, by whomever.
        """
        call = calls.create_endpoint(
            slug,
            calls.target_of(job_id, step, base_model),
            auth_mode=auth_mode,
            run_retention_mode=run_retention_mode,
            run_retention_days=run_retention_days,
        )
        return self.send(call)

    def get_endpoint(self, endpoint_id: str) -> Endpoint:
        return self.send(calls.get_endpoint(endpoint_id))

    def update_endpoint(
        self,
        endpoint_id: str,
        *,
        job_id: str | None = None,
        step: AdapterRef = calls.FINAL,
        base_model: str | None = None,
        auth_mode: AuthMode | None = None,
        enabled: bool | None = None,
        run_retention_mode: RetentionMode | None = None,
        run_retention_days: int | None = None,
    ) -> Endpoint:
        """Change what is given. A new adapter or base model takes over once it can answer, without a gap."""
        call = calls.update_endpoint(
            endpoint_id,
            calls.target_of(job_id, step, base_model),
            auth_mode=auth_mode,
            enabled=enabled,
            run_retention_mode=run_retention_mode,
            run_retention_days=run_retention_days,
        )
        return self.send(call)

    def delete_endpoint(self, endpoint_id: str) -> None:
        """With its keys; the slug is free afterwards."""
        self.send(calls.delete_endpoint(endpoint_id))

    def list_endpoint_keys(self, endpoint_id: str) -> list[EndpointKey]:
        """Its keys, newest first, revoked ones included."""
        return self.send(calls.list_endpoint_keys(endpoint_id))

    def create_endpoint_key(self, endpoint_id: str, label: str) -> IssuedEndpointKey:
        """A new key; its plaintext is in this answer and never shown again."""
        return self.send(calls.create_endpoint_key(endpoint_id, label))

    def revoke_endpoint_key(self, endpoint_id: str, key_id: str) -> None:
        self.send(calls.revoke_endpoint_key(endpoint_id, key_id))

    def list_runs(self, endpoint_id: str, *, limit: int = 50, before: str | None = None) -> list[Run]:
        """What the endpoint was asked and answered, newest first; `before` is the id of the last run of a page."""
        return self.send(calls.list_runs(endpoint_id, limit, before))

    def export_runs(self, endpoint_id: str, path: Path | str) -> Path:
        """All runs of the endpoint as JSONL, oldest first, which a job takes as its data set. `path` appears whole."""
        with whole_file(Path(path)) as file:
            response = self.open(calls.export_runs(endpoint_id))
            try:
                for chunk in response.iter_bytes():
                    file.write(chunk)
            except httpx.HTTPError as error:
                raise self.session.unreachable(error) from error
            finally:
                response.close()
        return Path(path)

    # The service

    def healthz(self) -> dict[str, Any]:
        return self.send(calls.health("/healthz"))

    def readyz(self) -> dict[str, Any]:
        """Raises ServiceUnavailableError until every part answers."""
        return self.send(calls.health("/readyz"))

    def sign_in(self) -> None:
        """Become a new anonymous identity and store its token, whatever was stored for this service before."""
        self._drive(self.session.sign_in())

    # Sending

    def send(self, call: Call[T]) -> T:
        """Send any call of `arkor_ray.client.calls`, with the token and the scope it needs."""
        self._prepare(call)
        return call.read(self._fetch(call))

    def open(self, call: Call[Any]) -> httpx.Response:
        """Send a call and return its successful response, whose body is still to be read, or closed, by the caller."""
        self._prepare(call)
        return self._open(call)

    def _prepare(self, call: Call[Any]) -> None:
        if self.session.is_ready(call):
            return
        with self._preparing:
            self._drive(self.session.prepare(call))

    def _drive(self, flow: Flow[T]) -> T:
        try:
            call = next(flow)
            while True:
                try:
                    answer = call.read(self._fetch(call))
                except ArkorError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(answer)
        except StopIteration as stop:
            return stop.value

    def _fetch(self, call: Call[Any]) -> httpx.Response:
        return self._repeat(call, lambda: self._read(self._open_once(call)))

    def _open(self, call: Call[Any]) -> httpx.Response:
        return self._repeat(call, lambda: self._open_once(call))

    def _repeat(self, call: Call[Any], once: Callable[[], httpx.Response]) -> httpx.Response:
        retries = Retries(call, self.session.max_retries)
        while True:
            try:
                return once()
            except ArkorError as error:
                time.sleep(retries.after(error))

    def _open_once(self, call: Call[Any]) -> httpx.Response:
        try:
            response = self._http.send(self._http.build_request(**self.session.request(call)), stream=True)
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error
        if not response.is_success:
            self._read(response)
        self.session.check(response)
        return response

    def _read(self, response: httpx.Response) -> httpx.Response:
        try:
            response.read()
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error
        finally:
            response.close()
        return response
