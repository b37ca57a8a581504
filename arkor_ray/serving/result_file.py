"""One JSONL file of results that comes about over hours, and perhaps several starts.

`NAME.parts/` holds what is there already, a file for every few rows, and `run.json`, what was asked of whom. When every row
has its result, `NAME` is written in the order of the rows and the parts go.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from arkor_ray.errors import ConflictError, ObjectNotFoundError
from arkor_ray.storage.object_store import ObjectStore

Result = dict[str, Any]


class ResultFile:
    """`run` is plain JSON that names all on which results depend; a result is an object with its row's `index`."""

    def __init__(self, store: ObjectStore, name: str, run: Mapping[str, Any]) -> None:
        """Raises ConflictError when the file is there, or parts are of another run."""
        self._store, self._name, self._parts = store, name, f"{name}.parts/"
        self._results: dict[int, Result] = {}
        before = self._run_before()
        if before is None and store.head(name) is not None:
            raise ConflictError(f"{store.url}/{name} is there already; remove it, or name another --output.")
        if before is None:
            store.put(self._parts + "run.json", json.dumps(run, indent=1, sort_keys=True).encode())
        elif before != run:
            changed = sorted(key for key in {*before, *run} if before.get(key) != run.get(key))
            raise ConflictError(
                f"{store.url}/{self._parts} holds results of another run: {', '.join(changed)} differ. Remove the folder, or "
                "name another --output."
            )
        for info in store.list(self._parts):
            if info.key.endswith(".jsonl"):
                self._keep(json.loads(line) for line in store.get(info.key).splitlines())

    @property
    def results(self) -> dict[int, Result]:
        """By row."""
        return self._results

    def missing(self, rows: Iterable[int]) -> list[int]:
        """The rows without a result, or with an error for one: they are tried again."""
        return [row for row in rows if "error" in self._results.get(row, {"error": ""})]

    def add(self, results: Iterable[Result]) -> None:
        """They are kept, whatever happens to this process."""
        results = list(results)
        lines = b"".join(json.dumps(result, ensure_ascii=False).encode() + b"\n" for result in results)
        self._store.put(f"{self._parts}{len(self._results):08d}-{uuid.uuid4().hex}.jsonl", lines)
        self._keep(results)

    def finish(self) -> None:
        """Writes the file, in the order of the rows."""
        lines = (json.dumps(self._results[row], ensure_ascii=False).encode() for row in sorted(self._results))
        self._store.put(self._name, b"".join(line + b"\n" for line in lines))
        # First, so that a start after a half-deleted folder finds a finished file and no run.
        self._store.delete(self._parts + "run.json")
        self._store.delete_prefix(self._parts)

    def _keep(self, results: Iterable[Result]) -> None:
        for result in results:
            known = self._results.get(result["index"])
            if known is None or "error" in known:
                self._results[result["index"]] = result

    def _run_before(self) -> Any:
        try:
            return json.loads(self._store.get(self._parts + "run.json"))
        except ObjectNotFoundError:
            return None
