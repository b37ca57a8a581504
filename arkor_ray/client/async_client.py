"""`AsyncClient`: the methods of `Client` as coroutines, over the same calls, session and follower."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from arkor_ray.client import calls
from arkor_ray.client.adapter_download import AdapterFolder
from arkor_ray.client.calls import AdapterDetail, AdapterRef, Call, Flow, JobDetail
from arkor_ray.client.event_stream import NAMED_JOB_STATUSES, EventFollower
from arkor_ray.client.inference import aiter_text
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


class AsyncClient:
    """The API of one arkor-ray service for asyncio. See `Client` for what each method does and raises.

    One client belongs to one event loop. A session may be shared with a `Client`.
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
        self._http = httpx.AsyncClient(transport=self.session.transport, limits=LIMITS)
        self._preparing = asyncio.Lock()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def base_url(self) -> str:
        return self.session.base_url

    # Identity and tokens

    async def anonymous_token(self) -> AnonymousToken:
        return await self.send(calls.anonymous_token())

    async def cli_config(self) -> dict[str, Any]:
        return await self.send(calls.cli_config())

    async def me(self) -> Me:
        return await self.send(calls.me())

    async def list_tokens(self) -> list[Token]:
        return await self.send(calls.list_tokens())

    async def create_token(
        self, label: str, *, email: str | None = None, expires_in_days: int | None = None
    ) -> IssuedToken:
        return await self.send(calls.create_token(label, email, expires_in_days))

    async def revoke_token(self, token_id: str) -> None:
        await self.send(calls.revoke_token(token_id))

    # Projects

    async def list_projects(self) -> list[Project]:
        return await self.send(calls.list_projects())

    async def create_project(self, name: str, slug: str) -> Project:
        return await self.send(calls.create_project(name, slug))

    async def ensure_project(self, name: str, slug: str) -> Project:
        await self._prepare(calls.list_projects())
        return await self._drive(ensure_project(name, slug))

    # Jobs

    async def create_job(self, name: str, config: dict[str, Any]) -> Job:
        return await self.send(calls.create_job(name, config))

    async def list_jobs(self) -> list[Job]:
        return await self.send(calls.list_jobs())

    async def get_job(self, job_id: str) -> Job:
        return (await self.send(calls.get_job(job_id))).job

    async def get_job_detail(self, job_id: str) -> JobDetail:
        return await self.send(calls.get_job(job_id))

    async def cancel_job(self, job_id: str) -> None:
        await self.send(calls.cancel_job(job_id))

    async def job_logs(self, job_id: str, *, attempt: int | None = None) -> str:
        return await self.send(calls.job_logs(job_id, attempt))

    async def follow_logs(self, job_id: str, *, attempt: int | None = None) -> AsyncIterator[str]:
        response = await self.open(calls.job_logs(job_id, attempt, follow=True))
        try:
            async for piece in response.aiter_text():
                yield piece
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error
        finally:
            await response.aclose()

    def events(self, job_id: str, *, last_event_id: str | int | None = None) -> AsyncIterator[Event]:
        """The job's events, from the first or from after `last_event_id`, until its end; reconnects by itself."""
        last = str(last_event_id) if last_event_id is not None else None
        return self.follow(job_id, EventFollower(last_event_id=last, permanent=NAMED_JOB_STATUSES))

    async def follow(self, job_id: str, follower: EventFollower) -> AsyncGenerator[Event, None]:
        """As `events`, with a position that outlives the iterator: an event counts as seen when the next is asked for."""
        while not follower.done:
            failure: ArkorError | None = None
            try:
                response = await self.open(calls.job_events(job_id, follower.connect()))
                try:
                    async for chunk in response.aiter_bytes():
                        for event in follower.receive(chunk):
                            yield event
                        if follower.done:
                            return
                finally:
                    await response.aclose()
            except httpx.HTTPError as error:
                failure = self.session.unreachable(error)
            except ArkorError as error:
                failure = error
            await asyncio.sleep(follower.disconnected(failure))

    # Checkpoints and adapters

    async def list_checkpoints(self, job_id: str) -> list[Checkpoint]:
        return await self.send(calls.list_checkpoints(job_id))

    async def get_checkpoint(self, job_id: str, ref: AdapterRef) -> AdapterDetail:
        return await self.send(calls.get_checkpoint(job_id, ref))

    async def download_adapter(self, job_id: str, ref: AdapterRef, directory: Path | str) -> Path:
        folder = AdapterFolder(directory, (await self.get_checkpoint(job_id, ref)).manifest)
        if folder.is_complete:
            return folder.path
        with folder:
            for file in folder.manifest.files:
                response = await self.open(calls.checkpoint_file(job_id, ref, file.path))
                try:
                    with folder.receive(file) as sink:
                        async for chunk in response.aiter_bytes():
                            sink.write(chunk)
                except httpx.HTTPError as error:
                    raise self.session.unreachable(error) from error
                finally:
                    await response.aclose()
        return folder.path

    # Inference

    async def chat(
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
        if job_id is not None:
            adapter = calls.adapter_of(job_id, step)
        call = calls.chat(messages, adapter=adapter, base_model=base_model, stream=stream, **fields)
        if stream:
            return await self.open(call)
        await self._prepare(call)
        return await self._fetch(call)

    async def chat_text(self, messages: list[dict[str, Any]], **arguments: Any) -> AsyncIterator[str]:
        try:
            async for piece in aiter_text(await self.chat(messages, stream=True, **arguments)):
                yield piece
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error

    async def list_models(self) -> list[dict[str, Any]]:
        return await self.send(calls.list_models())

    # Endpoints

    async def list_endpoints(self) -> list[Endpoint]:
        return await self.send(calls.list_endpoints())

    async def create_endpoint(
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
        call = calls.create_endpoint(
            slug,
            calls.target_of(job_id, step, base_model),
            auth_mode=auth_mode,
            run_retention_mode=run_retention_mode,
            run_retention_days=run_retention_days,
        )
        return await self.send(call)

    async def get_endpoint(self, endpoint_id: str) -> Endpoint:
        return await self.send(calls.get_endpoint(endpoint_id))

    async def update_endpoint(
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
        call = calls.update_endpoint(
            endpoint_id,
            calls.target_of(job_id, step, base_model),
            auth_mode=auth_mode,
            enabled=enabled,
            run_retention_mode=run_retention_mode,
            run_retention_days=run_retention_days,
        )
        return await self.send(call)

    async def delete_endpoint(self, endpoint_id: str) -> None:
        await self.send(calls.delete_endpoint(endpoint_id))

    async def list_endpoint_keys(self, endpoint_id: str) -> list[EndpointKey]:
        return await self.send(calls.list_endpoint_keys(endpoint_id))

    async def create_endpoint_key(self, endpoint_id: str, label: str) -> IssuedEndpointKey:
        return await self.send(calls.create_endpoint_key(endpoint_id, label))

    async def revoke_endpoint_key(self, endpoint_id: str, key_id: str) -> None:
        await self.send(calls.revoke_endpoint_key(endpoint_id, key_id))

    async def list_runs(self, endpoint_id: str, *, limit: int = 50, before: str | None = None) -> list[Run]:
        return await self.send(calls.list_runs(endpoint_id, limit, before))

    async def export_runs(self, endpoint_id: str, path: Path | str) -> Path:
        with whole_file(Path(path)) as file:
            response = await self.open(calls.export_runs(endpoint_id))
            try:
                async for chunk in response.aiter_bytes():
                    file.write(chunk)
            except httpx.HTTPError as error:
                raise self.session.unreachable(error) from error
            finally:
                await response.aclose()
        return Path(path)

    # The service

    async def healthz(self) -> dict[str, Any]:
        return await self.send(calls.health("/healthz"))

    async def readyz(self) -> dict[str, Any]:
        return await self.send(calls.health("/readyz"))

    async def sign_in(self) -> None:
        await self._drive(self.session.sign_in())

    # Sending

    async def send(self, call: Call[T]) -> T:
        """Send any call of `arkor_ray.client.calls`, with the token and the scope it needs."""
        await self._prepare(call)
        return call.read(await self._fetch(call))

    async def open(self, call: Call[Any]) -> httpx.Response:
        """Send a call and return its successful response, whose body is still to be read, or closed, by the caller."""
        await self._prepare(call)
        return await self._open(call)

    async def _prepare(self, call: Call[Any]) -> None:
        if self.session.is_ready(call):
            return
        async with self._preparing:
            await self._drive(self.session.prepare(call))

    async def _drive(self, flow: Flow[T]) -> T:
        try:
            call = next(flow)
            while True:
                try:
                    answer = call.read(await self._fetch(call))
                except ArkorError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(answer)
        except StopIteration as stop:
            return stop.value

    async def _fetch(self, call: Call[Any]) -> httpx.Response:
        async def once() -> httpx.Response:
            return await self._read(await self._open_once(call))

        return await self._repeat(call, once)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        return await self._repeat(call, lambda: self._open_once(call))

    async def _repeat(self, call: Call[Any], once: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
        retries = Retries(call, self.session.max_retries)
        while True:
            try:
                return await once()
            except ArkorError as error:
                await asyncio.sleep(retries.after(error))

    async def _open_once(self, call: Call[Any]) -> httpx.Response:
        try:
            response = await self._http.send(self._http.build_request(**self.session.request(call)), stream=True)
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error
        if not response.is_success:
            await self._read(response)
        self.session.check(response)
        return response

    async def _read(self, response: httpx.Response) -> httpx.Response:
        try:
            await response.aread()
        except httpx.HTTPError as error:
            raise self.session.unreachable(error) from error
        finally:
            await response.aclose()
        return response
