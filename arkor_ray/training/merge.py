"""An adapter made one with its base model: a folder that `AutoModelForCausalLM.from_pretrained` loads, and needs no PEFT."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from arkor_ray.errors import AdapterError, ConflictError
from arkor_ray.schemas.job import Precision
from arkor_ray.storage.adapter_files import AdapterFiles
from arkor_ray.storage.base_files import BaseFiles

#: What a merge of an adapter that was trained on a 4-bit base is not.
QLORA_CAVEAT = (
    "The adapter was trained on the base model in 4 bits and is merged into its full weights, on which it answers a little "
    "differently. To answer as it was trained, serve the adapter over the 4-bit base."
)


def merge_adapter(adapter: AdapterFiles, files: BaseFiles, folder: Path, dtype: Precision) -> Path:
    """Writes the merged model in `dtype`, with the adapter's tokenizer and chat template. Returns `folder`.

    The base is read in full precision, also for an adapter of a 4-bit base (see QLORA_CAVEAT), on the CPU: it needs memory for
    the model in `dtype`. Raises ConflictError when the folder is there, AdapterError when the adapter does not fit the base.
    """
    import torch
    from peft import PeftModel

    from arkor_ray.training.model import load_tokenizer, load_weights

    refuse_existing(folder)
    model = load_weights(files.path, dtype, torch.device("cpu"), **files.options)
    model.config.use_cache = True  # off for training only
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:100]}.") as temporary:
        source, merged = Path(temporary, "adapter"), Path(temporary, "merged")
        adapter.write(source)
        try:
            # PEFT holds the two factors in fp32 and rounds their product to `dtype` before it adds it.
            speaker: Any = PeftModel.from_pretrained(model, str(source))
            whole = speaker.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError, KeyError) as error:
            raise AdapterError(f"{adapter.source} cannot be merged into {files.options['name']}: {error}") from error
        whole.save_pretrained(merged)
        own = adapter.has_tokenizer
        tokenizer = load_tokenizer(str(source)) if own else load_tokenizer(files.path, **files.options)
        tokenizer.save_pretrained(merged)
        merged.rename(folder)
    return folder


def copy_adapter(adapter: AdapterFiles, folder: Path) -> Path:
    """Writes the adapter as the PEFT folder that it is. Returns `folder`; raises ConflictError when it is there."""
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:100]}.") as temporary:
        adapter.write(Path(temporary, "adapter")).rename(folder)
    return folder


def refuse_existing(folder: Path) -> None:
    """Raises ConflictError when something is there."""
    if folder.exists():
        raise ConflictError(f"--output {folder} is there already; remove it, or name another folder.")
