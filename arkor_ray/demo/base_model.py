"""The demo's base model: made once per cache directory, by whoever comes first, and verified whenever it is used again.

Finished models lie in `demo-base-<digest>/`, plain transformers folders. The digest names the recipe, so a release that
changes it makes a new model beside the old one, on which adapters may have been trained.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from arkor_ray.demo.pretrain import Progress, Recipe
from arkor_ray.errors import InternalError, ModelError

RECIPE = Recipe()
_CONTENTS = "contents.json"  # size and SHA-256 of every file, written last


def ensure_demo_base(cache_dir: Path, progress: Progress | None = None, recipe: Recipe = RECIPE) -> Path:
    """The folder of the demo's base model under `cache_dir`, made first if it is not there or not whole.

    `progress` is called with the share done, 0 to 1, and a few words. Concurrent callers, processes too, wait for the
    one that makes the model. Raises ModelError where torch is not installed, InternalError where making it failed.
    """
    report = progress or _silent
    if found := find_demo_base(cache_dir, recipe):
        report(1.0, "ready")
        return found
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise ModelError("The demo's base model is made with torch: pip install 'arkor-ray[train]'")
    from filelock import FileLock, Timeout  # comes with torch

    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_dir / f".{_name(recipe)}.lock")  # the kernel's, so it ends with its owner
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report(0.0, "another process is making it")
        lock.acquire()
    try:
        if not find_demo_base(cache_dir, recipe):
            _make(cache_dir, recipe, report)
    finally:
        lock.release()
    report(1.0, "ready")
    return cache_dir / _name(recipe)


def base_reference(name: str) -> str:
    """Of a model that a program without the service's catalogue is told: the demo's own by its name, which is made if need be,
    any other as it is, a folder with its absolute path."""
    from arkor_ray.settings import DEMO_BASE, Settings

    if name.lower() == DEMO_BASE:
        return str(ensure_demo_base(Settings.load(cluster=False, storage_url="", s3_endpoint_url=None).demo_base_cache))
    folder = Path(name).expanduser()
    return str(folder.absolute()) if (folder / "config.json").is_file() else name


def find_demo_base(cache_dir: Path, recipe: Recipe = RECIPE) -> Path | None:
    """The finished base model under `cache_dir` if it is there, with every byte that was written."""
    folder = Path(cache_dir) / _name(recipe)
    try:
        contents = json.loads((folder / _CONTENTS).read_text())
        whole = contents["files"] == _describe(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if whole else None


def _make(cache_dir: Path, recipe: Recipe, report: Progress) -> None:
    final = cache_dir / _name(recipe)
    # Whoever held the lock before may have died in the middle.
    for leftover in cache_dir.glob(f".{_name(recipe)}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f".{_name(recipe)}.", suffix=".tmp"))
    try:
        _pretrain_in_child(directory, recipe, report)
        (directory / _CONTENTS).write_text(json.dumps({"recipe": asdict(recipe), "files": _describe(directory)}))
        directory.chmod(0o755)
        if final.exists():  # and is not whole
            final.rename(directory / "replaced")
            shutil.rmtree(directory / "replaced")
        directory.rename(final)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _pretrain_in_child(directory: Path, recipe: Recipe, report: Progress) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_source_root()), os.environ.get("PYTHONPATH")])),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for each other leave the cores to others
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "arkor_ray.demo.pretrain", str(directory), json.dumps(asdict(recipe))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                told = json.loads(line)
                report(told["done"], told["what"])
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if status != 0:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-5:]
            raise InternalError(f"Making the demo's base model failed (exit status {status}): {' / '.join(last)}")


def _describe(folder: Path) -> dict[str, dict[str, object]]:
    return {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != _CONTENTS
    }


def _name(recipe: Recipe) -> str:
    return f"demo-base-{recipe.digest()}"


def _source_root() -> Path:
    # The child finds the package where this process did, installed or not.
    return Path(__file__).resolve().parents[2]


def _silent(done: float, what: str) -> None:
    pass
