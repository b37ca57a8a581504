"""What the service costs a job: steps per second and time to the first step, beside the same loop run bare.

    python -m tests.bench.service_overhead [--quick] [--out FILE]

The bare run is `python -m arkor_ray.training.bare`: no Ray, no database, no events, no serving; one process, as many threads
as the service gives its worker. Both runs of a round train the same job; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.jobs import make_job
from tests.servers.arkor import Follower, RunningService, running_service

WARM_UP = 5  # steps before the clock starts


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    steps, rounds = (20, 1) if options.quick else (150, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, config = make_job(folder, steps=steps)
        with running_service(folder / "service", models={"bench": model}) as service:
            service_run(service, {**config, "maxSteps": 2})  # the first job also starts serving and fills caches
            measured = [(bare_run(folder / f"bare-{i}", config), service_run(service, config)) for i in range(rounds)]
    ratios = [inside["steps_per_s"] / bare["steps_per_s"] for bare, inside in measured]
    delays = [inside["first_step_s"] - bare["first_step_s"] for bare, inside in measured]
    print(f"{'':32}{'bare':>10}{'service':>10}")
    for key, label in (
        ("steps_per_s", "steps per second, median"),
        ("first_step_s", "submit to first step, s, median"),
    ):
        middle = [statistics.median(pair[i][key] for pair in measured) for i in (0, 1)]
        print(f"{label:32}{middle[0]:10.2f}{middle[1]:10.2f}")
    print(f"steps per second, service / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"first step, service - bare: {statistics.median(delays):.1f} s ({min(delays):.1f} to {max(delays):.1f})")
    if options.out:
        result = {"benchmark": "service_overhead", "rounds": measured, "ratio": statistics.median(ratios)}
        options.out.write_text(json.dumps(result | {"first_step_delay_s": statistics.median(delays)}, indent=1))


def bare_run(folder: Path, config: dict[str, Any]) -> dict[str, float]:
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "arkor_ray.training.bare", str(folder / "job.json")]
    command += ["--storage", (folder / "store").as_uri()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began, at = time.monotonic(), {}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            at[json.loads(line)["step"]] = time.monotonic() - began
    assert process.wait() == 0, "the bare run failed"
    return rates(at)


def service_run(service: RunningService, config: dict[str, Any]) -> dict[str, float]:
    with service.client() as client:
        began, at = time.monotonic(), {}
        job = client.create_job("bench", {**config, "model": "bench"})
        follower = Follower(client, job.id)
        seen = 0
        while not (ended := not follower.alive) or seen < len(follower.events):
            for event in follower.events[seen:]:
                seen += 1
                if event.data.get("loss") is not None:
                    at[event.data["step"]] = time.monotonic() - began
            if not ended:
                time.sleep(0.005)
        assert client.get_job(job.id).status == "completed", client.get_job(job.id).error
        return rates(at)


def rates(at: dict[int, float]) -> dict[str, float]:
    """`at`: step to seconds since the job was handed over."""
    last, warm = max(at), min(WARM_UP, max(at) - 1)
    return {"steps_per_s": (last - warm) / (at[last] - at[warm]), "first_step_s": at[1]}


if __name__ == "__main__":
    main()
