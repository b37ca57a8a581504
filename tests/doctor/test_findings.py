from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from arkor_ray.doctor.findings import Check, Finding, Status, fail, known_secrets, ok, run_all, without_secrets


def check(run, *, limit_s: float = 30.0, name: str = "it") -> Check:
    return Check(name, run, limit_s, "try again")


def test_findings_come_in_the_order_of_the_checks_though_these_run_side_by_side():
    both_run = threading.Barrier(2)

    def slow() -> Iterator[Finding]:
        both_run.wait(30)
        time.sleep(0.05)
        yield ok("slow", "first")

    def quick() -> Iterator[Finding]:
        both_run.wait(30)
        yield ok("quick", "second")

    assert [finding.name for finding in run_all([check(slow), check(quick)]).findings] == ["slow", "quick"]


def test_a_check_that_hangs_fails_with_what_it_found_before_and_holds_up_nobody():
    never = threading.Event()

    def hang() -> Iterator[Finding]:
        yield ok("part", "found")
        never.wait()

    examined = run_all([check(hang, limit_s=0.2, name="hangs"), check(lambda: [ok("other", "well")])])
    never.set()
    findings = examined.findings
    assert (examined.hangs, examined.failed) == (True, True)
    assert [(f.name, f.status) for f in findings] == [
        ("part", Status.OK), ("hangs", Status.FAIL), ("other", Status.OK)
    ]  # fmt: skip
    assert (findings[1].found, findings[1].remedy) == ("no answer within 0.2 s", "try again")


def test_a_check_that_breaks_is_a_finding_of_its_own():
    def broken() -> Iterator[Finding]:
        yield ok("part", "found")
        raise ValueError("unheard of")

    examined = run_all([check(broken)])
    assert examined.findings == [ok("part", "found"), fail("it", "ValueError: unheard of", "try again")]
    assert (examined.hangs, examined.failed) == (False, True)


def test_a_password_in_the_query_of_the_databases_url_is_a_secret_too(monkeypatch):
    secrets = known_secrets("postgresql://arkor@db/arkor?password=pass%40+word&sslmode=require")
    assert without_secrets("pass@ word, pass%40+word, require", secrets) == "***, ***, require"


def test_secrets_are_taken_out_of_what_is_told(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very/secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "also-secret")
    monkeypatch.setenv("SOME_TOKEN", "a")
    secrets = known_secrets("postgresql://arkor:pass%40word@host/db")
    said = "host refused very/secret, also-secret, pass@word and pass%40word"
    assert without_secrets(said, secrets) == "host refused ***, ***, *** and ***"
    assert "a" not in secrets, "too short to be one, and in every word"
