"""All benchmarks, one after the other: tables on the terminal, JSON in bench-results/.

python -m tests.bench [--quick] [NAME …]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path("bench-results")


def main() -> int:
    found = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "jobs")
    arguments = argparse.ArgumentParser(description="Runs the benchmarks.")
    arguments.add_argument("names", nargs="*", default=found, metavar="NAME", help=f"of {', '.join(found)}")
    arguments.add_argument("--quick", action="store_true", help="small and few, to see that they run")
    options = arguments.parse_args()
    if unknown := set(options.names) - set(found):
        arguments.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for name in options.names:
        print(f"\n=== {name}", flush=True)
        command = [sys.executable, "-m", f"tests.bench.{name}", "--out", str(RESULTS / f"{name}.json")]
        if subprocess.run([*command, "--quick"] if options.quick else command).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
