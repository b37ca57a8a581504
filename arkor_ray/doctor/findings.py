"""What a check says, and running checks side by side so that one that hangs holds up no other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from arkor_ray.placeholders import database_passwords

SECRET_ENDINGS = ("TOKEN", "SECRET", "PASSWORD", "ACCESS_KEY", "API_KEY")
SHORTEST_SECRET = 6  # hiding "a" would make nonsense of every word


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """`remedy` is a command or a setting, "" where there is nothing to do."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    return Finding(name, Status.OK, found)


def warning(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, Status.WARNING, found, remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, Status.FAIL, found, remedy)


@dataclass(frozen=True)
class Check:
    """`run` blocks and yields findings; what it has not yielded within `limit_s` seconds counts as failed.

    `hanging` is the remedy for that case.
    """

    name: str
    run: Callable[[], Iterable[Finding]]
    limit_s: float
    hanging: str


@dataclass(frozen=True)
class Examination:
    """What every check found, in the order of the checks, and whether one of them still runs, perhaps for ever."""

    findings: list[Finding]
    hangs: bool = False

    @property
    def failed(self) -> bool:
        return any(finding.status is Status.FAIL for finding in self.findings)


def run_all(checks: Sequence[Check]) -> Examination:
    """Takes as long as the longest limit at most."""
    begun = time.monotonic()
    running = [_Running(check) for check in checks]
    findings = [finding for each in running for finding in each.result(begun)]
    return Examination(findings, any(each.hangs for each in running))


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """A message may quote what it was about."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def known_secrets(database_url: str = "") -> set[str]:
    """Of this process's environment, and of the database's URL."""
    secrets = {value for name, value in os.environ.items() if name.upper().endswith(SECRET_ENDINGS)}
    secrets |= database_passwords(database_url)
    return {secret for secret in secrets if len(secret) >= SHORTEST_SECRET}


class _Running:
    def __init__(self, check: Check) -> None:
        self.hangs = False
        self._check = check
        self._found: list[Finding] = []
        # A thread that nobody waits for in the end: there is no other way out of a call that never returns.
        self._thread = threading.Thread(target=self._run, name=f"doctor-{check.name}", daemon=True)
        self._thread.start()

    def result(self, begun: float) -> list[Finding]:
        self._thread.join(max(0.0, begun + self._check.limit_s - time.monotonic()))
        self.hangs = self._thread.is_alive()
        found = list(self._found)
        if self.hangs:
            found.append(fail(self._check.name, f"no answer within {self._check.limit_s:g} s", self._check.hanging))
        return found

    def _run(self) -> None:
        try:
            for finding in self._check.run():
                self._found.append(finding)
        except Exception as error:  # told as what it is: a check that broke has not found its part well
            self._found.append(fail(self._check.name, f"{type(error).__name__}: {error}", self._check.hanging))
