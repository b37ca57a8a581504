"""Runs train loops in real process groups, several one after the other in the same processes, since starting them costs most.

As a module it is such a process: python -m tests.training.process_group runs.pickle result.pickle
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arkor_ray.training.callbacks import ListEventSink
from arkor_ray.training.job_spec import JobSpec


@dataclass
class LoopRun:
    """`stop_after_step` cancels; what rank 0 saw comes back in `sink`."""

    spec: JobSpec
    stop_after_step: int | None = None
    sink: ListEventSink = field(default_factory=ListEventSink)
    result: Any = None

    @property
    def losses(self) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in self.sink.of("log") if "loss" in entry}


def run_in_group(runs: list[LoopRun], world_size: int, folder: Path, timeout: float = 600) -> list[LoopRun]:
    """The runs, done, as rank 0 sent them back. Raises with the output when a process fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.pickle").write_bytes(pickle.dumps(runs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    common |= {"LOCAL_WORLD_SIZE": str(world_size), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    command = [
        sys.executable,
        "-m",
        "tests.training.process_group",
        str(folder / "runs.pickle"),
        str(folder / "done.pickle"),
    ]
    processes = []
    for rank in range(world_size):
        output = (folder / f"rank-{rank}.log").open("w")
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        logs = "\n".join(f"rank {r}:\n" + (folder / f"rank-{r}.log").read_text()[-3000:] for r in range(world_size))
        raise AssertionError(f"exit codes {codes}\n{logs}")
    return pickle.loads((folder / "done.pickle").read_bytes())


def main() -> None:
    from arkor_ray.training.bare import run_bare
    from arkor_ray.training.workers import join_workers

    source, target = (Path(path) for path in sys.argv[1:])
    runs: list[LoopRun] = pickle.loads(source.read_bytes())
    for run in runs:
        run.sink = ListEventSink(run.stop_after_step)
        run.result = run_bare(run.spec, run.sink)
    if join_workers().is_first:
        target.write_bytes(pickle.dumps(runs))


if __name__ == "__main__":
    main()
