"""The files of an adapter as clients see them, in events and in lists of checkpoints."""

from __future__ import annotations

from urllib.parse import quote

from arkor_ray.schemas.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Artifact, CheckpointManifest

FINAL = "final"

_KINDS = {WEIGHTS_FILE: "weights", CONFIG_FILE: "adapter_config"}


def artifacts(api_url: str, manifest: CheckpointManifest) -> list[Artifact]:
    """One entry per file of the manifest; `url` gives its bytes to whoever may read the job."""
    reference = FINAL if manifest.final else str(manifest.step)
    folder = f"{api_url}/v1/jobs/{manifest.job_id}/checkpoints/{reference}/files"
    return [
        Artifact(
            pathname=file.path,
            kind=_KINDS.get(file.path, "tokenizer"),
            size_bytes=file.size_bytes,
            url=f"{folder}/{quote(file.path)}",
        )
        for file in manifest.files
    ]
