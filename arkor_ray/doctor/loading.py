"""The program that imports the heavy packages, in a process of its own: an import can hang, end the process, or take long.

python -m arkor_ray.doctor.loading NAME...

Prints a line of JSON for each package when its import begins, and one when it has ended, with its version and the seconds
it took, or its error; at last what torch and the others know about GPUs.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    loaded: dict[str, Any] = {}
    for name in sys.argv[1:]:
        _print(begins=name)
        begun = time.monotonic()
        try:
            loaded[name] = importlib.import_module(name)
        except Exception as error:  # whatever it is, it is the finding
            _print(package=name, error=f"{type(error).__name__}: {error}"[:500])
        else:
            version = str(getattr(loaded[name], "__version__", "?"))
            _print(package=name, version=version, seconds=round(time.monotonic() - begun, 1))
    if "torch" in loaded:
        _print(accelerators=_accelerators(loaded))


def _accelerators(loaded: dict[str, Any]) -> dict[str, Any]:
    torch = loaded["torch"]
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": [], "nccl": None}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            facts["devices"].append(
                {
                    "name": torch.cuda.get_device_name(index),
                    "capability": list(torch.cuda.get_device_capability(index)),
                    "free_bytes": free,
                    "total_bytes": total,
                }
            )
        if torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if "bitsandbytes" in loaded:
        library = importlib.import_module("bitsandbytes.cextension").lib
        facts["bitsandbytes_cuda"] = bool(getattr(library, "compiled_with_cuda", False))
    if torch.version.cuda is not None and "deepspeed" in loaded:
        facts["toolkit"] = _toolkit()
    return facts


def _toolkit() -> str | None:
    """The version of the CUDA toolkit that DeepSpeed would compile with, None without one."""
    home = importlib.import_module("torch.utils.cpp_extension").CUDA_HOME
    if home is None:
        return None
    try:
        said = subprocess.run([Path(home) / "bin" / "nvcc", "-V"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"release ([0-9]+\.[0-9]+)", said)
    return match[1] if match else None


def _print(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
