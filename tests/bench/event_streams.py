"""How soon followers hear of an event, on one api replica: 100 of a busy job, first alone, then beside 2,000 of idle jobs.

    python -m tests.bench.event_streams [--quick] [--out FILE]

A running service, its Serve proxy and its api replica; the followers are plain HTTP readers in a process of their own. Events
are appended as a job's recorder appends them, by this process. A delay is from before the append to the parsed frame.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx

from arkor_ray.db import jobs
from arkor_ray.db.session import Database
from arkor_ray.db.tables import JobRow, ProjectRow
from arkor_ray.events import publisher
from arkor_ray.schemas import event
from arkor_ray.schemas.base import utcnow
from tests.servers.arkor import RunningService, running_service

IDLE_JOBS = 20
OPENING = 50  # connections being opened at a time
GRACE_S = 60.0  # for the last events to arrive


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--idle", type=int, default=2000, help="streams of idle jobs")
    arguments.add_argument("--busy", type=int, default=100, help="streams of the busy job")
    arguments.add_argument("--events", type=int, default=100, help="events of the busy job in each phase")
    arguments.add_argument("--rate", type=float, default=5.0, help="events per second")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    idle, busy, events = (60, 10, 20) if options.quick else (options.idle, options.busy, options.events)
    with tempfile.TemporaryDirectory() as name, running_service(Path(name)) as service:
        log = EventLog(service)
        quiet_jobs = [log.create_job() for _ in range(IDLE_JOBS)]
        alone = phase(service, log, [], 0, busy, events, options.rate)
        beside = phase(service, log, quiet_jobs, idle, busy, events, options.rate)
        log.close()
    show(f"{busy} followers of one job", alone)
    show(f"the same beside {idle} idle streams", beside)
    ratio = beside["busy_ms"]["p95"] / alone["busy_ms"]["p95"]
    print(f"p95 beside idle streams / alone: {ratio:.2f}")
    if options.out:
        result = {"benchmark": "event_streams", "idle": idle, "busy": busy, "alone": alone, "beside": beside}
        options.out.write_text(json.dumps(result | {"p95_ratio": ratio}, indent=1))


class EventLog:
    """Writes the logs of jobs that never run: the controller waits for their time, which is tomorrow."""

    def __init__(self, service: RunningService) -> None:
        self._db = Database(f"sqlite:///{service.data_dir / 'arkor.db'}")
        minted = httpx.post(f"{service.url}/v1/auth/anonymous", json={}).raise_for_status().json()
        org = minted["personalOrg"]["slug"]
        self.headers = {"Authorization": f"Bearer {minted['token']}"}
        project = {"name": "bench", "slug": "bench"}
        made = httpx.post(f"{service.url}/v1/projects", params={"orgSlug": org}, headers=self.headers, json=project)
        made.raise_for_status()
        self.query = urlencode({"orgSlug": org, "projectSlug": "bench"})
        with self._db.read() as session:
            row = session.query(ProjectRow).filter_by(slug="bench").one()
            self._org_id, self._project_id = row.org_id, row.id

    def create_job(self) -> str:
        with self._db.write() as session:
            job: JobRow = jobs.create(
                session, org_id=self._org_id, project_id=self._project_id, name="bench", config={"model": "none"},
                dataset_token=None,
            )  # fmt: skip
            job.retry_at = utcnow() + timedelta(days=1)
            return job.id

    def append(self, job_id: str, step: int) -> None:
        with self._db.write() as session:
            data = {"step": step, "sentAt": time.time()}
            publisher.append(session, job_id, event.LOG, data, key=f"log:{step}")

    def close(self) -> None:
        self._db.close()


def phase(
    service: RunningService, log: EventLog, idle_jobs: list[str], idle: int, busy: int, events: int, rate: float
) -> dict[str, Any]:
    """`busy` followers hear `events`; then each of the `idle` ones hears one, so that none of them is dead."""
    busy_job = log.create_job()
    streams = [idle_jobs[i % len(idle_jobs)] for i in range(idle)] + [busy_job] * busy
    expected = [1] * idle + [events] * busy
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    address = urlsplit(service.url)
    followers = multiprocessing.get_context("spawn").Process(
        target=_follow_all, args=(theirs, address.hostname, address.port, log.query, log.headers, streams, expected)
    )
    followers.start()
    opening_s = _receive(ours, followers)
    for step in range(events):
        began = time.monotonic()
        log.append(busy_job, step)
        time.sleep(max(0.0, 1 / rate - (time.monotonic() - began)))
    for job in idle_jobs:
        log.append(job, 0)
    delays = _receive(ours, followers)
    followers.join()
    return {
        "opening_s": round(opening_s, 2),
        "busy_ms": _summary([ms for each in delays[idle:] for ms in each], busy * events),
        "idle_ms": _summary([ms for each in delays[:idle] for ms in each], idle),
    }


def _receive(connection: Connection, process: Any) -> Any:
    while not connection.poll(1):
        if not process.is_alive():
            raise RuntimeError("the followers' process has ended")
    return connection.recv()


def _follow_all(
    connection: Connection, host: str, port: int, query: str, headers: dict[str, str], jobs: list[str],
    expected: list[int],
) -> None:  # fmt: skip
    connection.send(0.0) if not jobs else asyncio.run(
        _Followers(connection, host, port, query, headers).run(jobs, expected)
    )


class _Followers:
    def __init__(self, connection: Connection, host: str, port: int, query: str, headers: dict[str, str]) -> None:
        self._connection, self._host, self._port, self._query = connection, host, port, query
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def run(self, jobs: list[str], expected: list[int]) -> None:
        began, gate = time.monotonic(), asyncio.Semaphore(OPENING)
        readers = await asyncio.gather(*(self._open(job, gate) for job in jobs))
        self._connection.send(time.monotonic() - began)
        tasks = [asyncio.create_task(_delays(r, n)) for (r, _), n in zip(readers, expected, strict=True)]
        self._connection.send(await asyncio.gather(*tasks))

    async def _open(self, job: str, gate: asyncio.Semaphore) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with gate:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            path = f"/v1/jobs/{job}/events/stream?{self._query}"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n{self._headers}\r\n".encode())
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"a stream was refused: {status!r}")
            while await reader.readline() != b"\r\n":
                pass
            return reader, writer


async def _delays(reader: asyncio.StreamReader, count: int) -> list[float]:
    """Milliseconds from each event's writing to now, of `count` events; fewer when the rest does not come in time."""
    delays: list[float] = []
    try:
        while len(delays) < count:
            line = await asyncio.wait_for(reader.readline(), 600 if not delays else GRACE_S)
            if not line:
                break
            if line.startswith(b"data: ") and (sent := json.loads(line[6:]).get("sentAt")):
                delays.append((time.time() - sent) * 1000)
    except TimeoutError:
        pass
    return delays


def _summary(delays: list[float], expected: int) -> dict[str, float]:
    """`missing` events did not come at all."""
    if not delays:
        return {"events": 0, "missing": expected}
    cuts = statistics.quantiles(delays, n=100, method="inclusive") if len(delays) > 1 else delays * 99
    figures = {"p50": cuts[49], "p95": cuts[94], "max": max(delays)}
    return {"events": len(delays), "missing": expected - len(delays), **{k: round(v, 1) for k, v in figures.items()}}


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}: opened in {result['opening_s']} s")
    for name in ("busy_ms", "idle_ms"):
        row = result[name]
        if row["events"]:
            print(
                f"  {name.removesuffix('_ms'):5} {row['events']:6} events, {row['missing']} missing; "
                f"delay in ms: p50 {row['p50']}, p95 {row['p95']}, longest {row['max']}"
            )


if __name__ == "__main__":
    main()
