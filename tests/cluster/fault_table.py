"""What each failure costs: every process of a service on a cluster is killed, hung and cut off under a running job.

    python -m tests.cluster.fault_table [--only PART[:FAULT],...] [--json FILE] [--without-redis]

Prints a table in Markdown as it goes. Takes root and about three quarters of an hour of two cores. A process is cut off with
the node that it runs on. A fault of 20 s is longer than the limits that are set here for silence, so that what hangs is given
up, and comes back as a ghost that must not write.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from arkor_ray.client.client import Client
from arkor_ray.demo.testing import make_tiny_model
from arkor_ray.schemas import event
from arkor_ray.schemas.base import utcnow
from tests.cluster.supervisor import Supervisor
from tests.cluster.watching import Asking, held
from tests.integration.stories import assert_checkpoints_answer, config, losses, write_rows
from tests.servers.arkor import Follower, wait_for
from tests.servers.ray_hosts import HEAD, SERVING, RayHosts, restart, running_cluster, start_service

OUT_S = 20.0
SETTLING_S = 6.0  # after a fault's end, for what it does to show
RECOVERED_S = 180.0  # what takes longer counts as not recovered
STEPS = 240
ASKERS = 3
LIMITS = {
    "ARKOR_RAY_JOB_SILENCE_TIMEOUT_S": "12",
    "ARKOR_RAY_JOB_MAX_RETRIES": "100",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "12",
}
Fault = Callable[[], str | None]  # returns what else is worth telling


@dataclass
class Outcome:
    """What was without service for how long: the longest time without a new step, and without an answer, from the fault on."""

    part: str
    fault: str
    without_step_s: float = 0.0
    without_answer_s: float = 0.0
    recovered: bool = False
    failed_requests: int = 0
    seen: list[str] = field(default_factory=list)
    lost: str = ""

    def row(self) -> str:
        more = "" if self.recovered else "more than "
        seconds = [f"{more}{s:.1f}" for s in (self.without_step_s, self.without_answer_s)]
        seen = "; ".join(self.seen) or "nothing"
        return f"| {self.part} | {self.fault} | {' | '.join(seconds)} | {self.failed_requests} | {seen} | {self.lost} |"


HEADER = """\
| part | fault | without a step (s) | without an answer (s) | failed requests | seen | lost |
|---|---|---|---|---|---|---|"""


class FaultTable:
    """Cases on one cluster, under jobs that are replaced when they end."""

    def __init__(
        self, cluster: RayHosts, client: Client, supervisor: Supervisor, asking: list[Asking], rows: str
    ) -> None:
        self.cluster, self.client, self.supervisor, self.asking = cluster, client, supervisor, asking
        self.config = config(rows, numWorkers=2, batchSize=4, maxSteps=STEPS, saveSteps=20)
        self.reference: dict[int, float] = {}
        self.outcomes: list[Outcome] = []
        self._of_job: list[Outcome] = []
        self._job = ""
        self._follower: Follower | None = None

    def cases(self) -> Iterator[tuple[str, str, Fault]]:
        """(part, fault, what brings it about and, where its end is not its nature, ends it)."""
        for part in (
            "api",
            "controller",
            "recorder",
            "driver",
            "train controller",
            "worker",
            "replica",
            "serve controller",
        ):
            yield part, "kill", lambda part=part: self._signal(part, signal.SIGKILL)  # type: ignore[misc]
            yield part, "hang", lambda part=part: self._hang(part)  # type: ignore[misc]
            yield part, "cut off", lambda part=part: self._cut(self._node_of(part))  # type: ignore[misc]
        for name, node in (
            ("training node", self._other_training_node),
            ("serving node", lambda: SERVING),
            ("head", lambda: HEAD),
        ):
            yield name, "kill", lambda node=node: self.cluster.nodes[node()].host.kill_all()  # type: ignore[misc]
            yield name, "hang", lambda node=node: self._hang_node(node())  # type: ignore[misc]
            yield name, "cut off", lambda node=node: self._cut(node())  # type: ignore[misc]
        yield "driver's node", "kill", lambda: self.cluster.nodes[self._node_of("driver")].host.kill_all()
        for name, host, process in (
            ("PostgreSQL", "database", "postgres"),
            ("S3", "storage", "radosgw"),
            ("Redis", "redis", "redis-server"),
        ):
            if not self.cluster.hosts[host].processes():
                continue
            yield name, "kill", lambda host=host, process=process: self._kill_server(host, process)  # type: ignore[misc]
            yield name, "hang", lambda host=host: self._hang_host(host)  # type: ignore[misc]
            yield name, "cut off", lambda host=host: self._cut(host)  # type: ignore[misc]

    def deploy_again(self) -> None:
        """What an operator does when a head has forgotten everything, as soon as there is one."""
        deadline = time.monotonic() + RECOVERED_S
        while True:
            try:
                return self.cluster.deploy()
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def undisturbed(self, kept: Path | None) -> dict[int, float]:
        """The loss of every step when nothing happens: out of the file `kept`, or else measured, and kept there."""
        if kept is not None and kept.exists():
            return {int(step): loss for step, loss in json.loads(kept.read_text()).items()}
        curve = losses(Follower(self.client, self.client.create_job("undisturbed", self.config).id).join())
        if kept is not None:
            kept.write_text(json.dumps(curve))
        return curve

    def measure(self, part: str, fault: str, bring_about: Fault, then: Fault | None = None) -> Outcome:
        """One case. `then` is what an operator has to do after this fault."""
        follower = self._running_job()
        outcome = Outcome(part, fault)
        self.outcomes.append(outcome)
        self._of_job.append(outcome)
        restarts = len(self.supervisor.restarts)
        events, began, began_at = len(follower.events), time.monotonic(), utcnow()
        said = bring_about()
        if then is not None:
            then()
        ended = time.monotonic()
        # What a fault of some seconds does may show only afterwards: service has to be there once it is over.
        deadline = ended + RECOVERED_S
        while time.monotonic() < deadline:
            if self._settled(follower, ended):
                outcome.recovered = True
                break
            time.sleep(0.1)
        until = time.monotonic()
        outcome.without_answer_s = self._longest_silence(began, until)
        outcome.without_step_s = longest_standstill(follower, began_at)
        failures = [what for each in self.asking for what in each.failed_between(began, until)]
        outcome.failed_requests = len(failures)
        outcome.seen += [said] if said else []
        outcome.seen += sorted({what[:80] for what in failures})
        outcome.seen += [e.type for e in follower.events[events:] if e.type not in (event.LOG, event.CHECKPOINT)]
        outcome.seen += [f"{name} restarted" for name in self.supervisor.restarts[restarts:]]
        attempt = self._attempt()
        if attempt > 1:
            outcome.seen.append(f"attempt {attempt}")
        return outcome

    def finish_job(self) -> None:
        """Cancels the job under way, and checks what became of it. Whatever is wrong is noted with all its cases."""
        if self._follower is None:
            return
        follower, self._follower = self._follower, None
        with contextlib.suppress(Exception):  # it has just ended by itself
            self.client.cancel_job(self._job)
        lost = ""
        try:
            events = follower.join(60)
            self._check(events)
            assert_checkpoints_answer(self.client, self._job, events)
        except AssertionError as error:
            lost = str(error).splitlines()[0][:200] or "a check failed"
        except Exception as error:
            lost = f"{type(error).__name__}: {error}"[:200]
        for outcome in self._of_job:
            outcome.lost = lost or "nothing"
        self._of_job = []

    def _check(self, events: list[event.Event]) -> None:
        assert [e.id for e in events] == list(range(1, len(events) + 1)), "events are not numbered 1, 2, 3 …"
        assert events[-1].type in (event.COMPLETED, event.CANCELLED), f"ended as {events[-1].type}: {events[-1].data}"
        assert sum(e.type in event.TERMINAL for e in events) == 1, "more than one last word"
        logged = [e.data["step"] for e in events if e.type == event.LOG]
        assert logged == list(range(1, len(logged) + 1)), "a step is missing or logged twice"
        curve = losses(events)
        off = max((abs(loss - self.reference[step]) for step, loss in curve.items()), default=0.0)
        assert off < 1e-4, f"the loss curve is off by {off:.2g}"

    def _running_job(self) -> Follower:
        """A job that is training and has a while to go."""
        if self._follower is not None:
            step = max(losses(list(self._follower.events)), default=0)
            if self._follower.alive and step < STEPS - 100:
                self._follower.wait_for(lambda e: e.type == event.LOG and e.data["step"] >= step + 5, RECOVERED_S)
                return self._follower
            self.finish_job()
        self._job = self.client.create_job("faults", self.config).id
        self._follower = Follower(self.client, self._job)
        self._follower.wait_for(lambda e: e.type == event.CHECKPOINT, RECOVERED_S)
        return self._follower

    def _logged_after(self, follower: Follower, step: int) -> bool:
        # One may have been on its way when the fault came.
        return not follower.alive or max(losses(list(follower.events)), default=0) > step + 1

    def _settled(self, follower: Follower, ended: float) -> bool:
        """Whether steps are logged and requests answered that began after the fault's end."""
        if time.monotonic() - ended < SETTLING_S:
            self._step_at_end = max(losses(list(follower.events)), default=0)
            return False
        answered = any(each.answered_after(ended) is not None for each in self.asking)
        return answered and self._logged_after(follower, self._step_at_end) and self._complete()

    def _complete(self) -> bool:
        """Whether every node is up; also the next case is to meet a whole cluster."""
        head = self.cluster.nodes[HEAD]
        return bool(head.find("gcs")) and all(node.find("raylet") for node in self.cluster.nodes.values())

    def _longest_silence(self, since: float, until: float) -> float:
        moments = sorted([since, until, *(at for each in self.asking for at, _ in each.answers if since < at < until)])
        return max(b - a for a, b in itertools.pairwise(moments))

    def _attempt(self) -> int:
        found = [title for _, pid in self.cluster.find("driver") if (title := _command(pid))]
        return max((int(title.rsplit("--attempt ", 1)[1].split()[0]) for title in found), default=1)

    def _one(self, part: str) -> tuple[str, int]:
        """Its node and its process, the first where there are several."""
        found: list[tuple[str, int]] = []

        def there() -> bool:
            found[:] = self.cluster.find(part)
            return bool(found)

        wait_for(there, 60, f"there is no {part}")
        return found[0]

    def _signal(self, part: str, number: int) -> None:
        os.kill(self._one(part)[1], number)

    def _hang(self, part: str) -> None:
        self._stop_for_a_while([self._one(part)[1]])

    def _hang_node(self, name: str) -> None:
        """Its Ray processes hang; what they started runs on."""
        node = self.cluster.nodes[name]
        self._stop_for_a_while(node.find("raylet") + node.find("gcs"))

    def _hang_host(self, name: str) -> None:
        self._stop_for_a_while(list(self.cluster.hosts[name].processes()))

    def _stop_for_a_while(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(OUT_S)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # given up meanwhile, and killed
                os.kill(pid, signal.SIGCONT)

    def _cut(self, name: str) -> str:
        host = self.cluster.hosts[name]
        host.cut()
        time.sleep(OUT_S)
        host.heal()
        return f"{name} cut off"

    def _kill_server(self, host: str, process: str) -> None:
        found = {pid: title for pid, title in self.cluster.hosts[host].processes().items() if title.startswith(process)}
        if process == "postgres":
            # One of its own processes: PostgreSQL then ends all the others and recovers, as after a crash.
            os.kill(
                next(pid for pid, title in found.items() if "walwriter" in title or "checkpointer" in title),
                signal.SIGKILL,
            )
        else:
            restart(self.cluster.hosts[host], next(iter(found)))

    def _node_of(self, part: str) -> str:
        return self._one(part)[0]

    def _other_training_node(self) -> str:
        self._one("worker")
        nodes = [name for name, _ in self.cluster.find("worker")]
        driver = self._node_of("driver")
        return next((name for name in nodes if name != driver), nodes[0])


def longest_standstill(follower: Follower, since: datetime) -> float:
    """The longest time in which no step was recorded; a job that has ended stands still no more."""
    logged = [datetime.fromisoformat(e.data["timestamp"]) for e in list(follower.events) if e.type == event.LOG]
    moments = [since, *(moment for moment in logged if moment > since), *([utcnow()] if follower.alive else [])]
    return max(((b - a).total_seconds() for a, b in itertools.pairwise(moments)), default=0.0)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def chosen(cases: list[tuple[str, str, Fault]], only: list[str]) -> list[tuple[str, str, Fault]]:
    """All cases, or those that are named PART or PART:FAULT, in the order of the names."""
    if not only:
        return cases
    return [case for name in only for case in cases if name in (case[0], f"{case[0]}:{case[1]}")]


def run(arguments: argparse.Namespace) -> None:
    """Brings the chosen cases about, one after another; each is printed as it is known, all are written at the end."""
    only = [name for name in arguments.only.split(",") if name]
    fault_tolerant = not arguments.without_redis
    with contextlib.ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="models-")))
        tiny = make_tiny_model(models, family="llama", hidden=64, layers=4)
        cluster = stack.enter_context(
            running_cluster({"tiny": tiny}, fault_tolerant=fault_tolerant, keep=arguments.logs, environment=LIMITS)
        )
        start_service(cluster, base_model="tiny")
        client = stack.enter_context(cluster.client())
        rows = write_rows(cluster.folder / "rows.jsonl")
        supervisor = stack.enter_context(Supervisor(cluster))
        # Base model and adapter alike go by way of the api and a replica.
        asking = [
            stack.enter_context(Asking(stack.enter_context(cluster.client()), pause_s=1.0, base_model="tiny"))
            for _ in range(ASKERS)
        ]
        table = FaultTable(cluster, client, supervisor, asking, rows)
        table.reference = table.undisturbed(arguments.reference)
        print(HEADER, flush=True)
        try:
            for part, fault, bring_about in chosen(list(table.cases()), only):
                then = table.deploy_again if part == "head" and not fault_tolerant else None
                print(table.measure(part, fault, bring_about, then).row(), flush=True)
            table.finish_job()
            print("held at the end:", json.dumps(held(cluster)), flush=True)
        finally:
            print("\n" + "\n".join([HEADER, *(outcome.row() for outcome in table.outcomes)]), flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps([asdict(outcome) for outcome in table.outcomes], indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what each failure of a cluster costs.")
    parser.add_argument("--only", default="", help="cases, as PART or PART:FAULT, separated by commas")
    parser.add_argument("--json", type=Path, help="a file for the outcomes")
    parser.add_argument(
        "--reference", type=Path, help="a file that keeps the undisturbed curve from one run to the next"
    )
    parser.add_argument("--without-redis", action="store_true", help="a head that forgets everything when it dies")
    parser.add_argument("--logs", type=Path, help="a folder for Ray's logs")
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
