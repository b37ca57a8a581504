"""What Serve gives for the handle of a base model's deployment."""

from __future__ import annotations

import asyncio
from typing import Any, Self


class FakeReplica:
    """A deployment handle that takes adapters, or raises `error`, only so many `times` if that is said; with `hangs`, it does
    neither."""

    def __init__(self, error: BaseException | None = None, times: int | None = None) -> None:
        self.error, self.times = error, times
        self.hangs = False

    def options(self, session_id: str) -> Self:
        return self

    @property
    def admit(self) -> Self:
        return self

    async def remote(self, manifest: dict[str, Any], data: bytes | None) -> dict[str, Any]:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None and self.times != 0:
            if self.times is not None:
                self.times -= 1
            raise self.error
        return {"adapter_id": manifest["adapter_id"]}
