"""Loads a base model for the slot engine, and refuses those of which it cannot compute every answer exactly."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from arkor_ray.errors import ModelError
from arkor_ray.gpus import unusable_gpu
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.schemas.model import LOAD_ERRORS, needs_remote_code, wants_remote_code
from arkor_ray.serving.engine.attention import ATTENTION_NAME, RecordBatch
from arkor_ray.serving.engine.kv_cache import LayerShape

logger = logging.getLogger(__name__)

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# These rescale the rotation by the longest sequence in the batch, so a neighbour would change the answer.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class BaseModel:
    """A model ready for `SlotEngine`; `dtype` is that of activations, `context` the longest sequence it is made for."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    context: int


def load_base(
    source: str,
    precision: BasePrecision,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    device: str | None = None,
) -> BaseModel:
    """Reads the weights of a Hub id or an absolute directory; `name` is what messages call the model.

    nf4 quantises while loading (bitsandbytes); its activations are bf16 on a GPU and fp32 on a CPU.
    Raises ModelError when it cannot be read, when the slot engine would not compute it exactly, or when Ray gave this
    process a GPU that torch cannot use.
    """
    if device is None and (fault := unusable_gpu()) is not None:
        raise ModelError(f"Base model {name or source} cannot be served: {fault}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _DTYPES.get(precision) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    if source.startswith("/") and not Path(source, "config.json").is_file():
        raise ModelError(f"Base model {source}: there is no config.json in this directory.")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_config(config)
        if precision == "nf4":
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            options["device_map"] = {"": place}
        options["use_safetensors"] = True  # else weights may be a pickle, whose reader runs what it says
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager", **options)
    except LOAD_ERRORS as error:
        if not trust_remote_code and wants_remote_code(error):
            raise needs_remote_code(name or source) from error
        raise ModelError(f"Base model {name or source} cannot be loaded as {precision}: {error}") from error
    if precision != "nf4":
        model.to(place)  # type: ignore[arg-type]
    return prepare_base(model)


def prepare_base(model: PreTrainedModel) -> BaseModel:
    """Checks a model that is already in memory. Raises ModelError when its family cannot be served exactly."""
    _check_config(model.config)
    model.eval().requires_grad_(False)
    config = model.config.get_text_config()
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return BaseModel(model, parameter.device, parameter.dtype, int(config.max_position_embeddings))


def use_slot_attention(base: BaseModel) -> dict[int, LayerShape]:
    """Switches the model to the engine's attention; returns what each layer keeps per token."""
    model = base.model
    name = type(model).__name__
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except ValueError as error:
        raise ModelError(f"{name} cannot be served: it has no exchangeable attention ({error}).") from error
    record = RecordBatch()
    zero = torch.zeros(1, 1, dtype=torch.long, device=base.device)
    try:
        with torch.inference_mode():
            model(input_ids=zero, position_ids=zero, use_cache=False, arkor_batch=record)
    except (TypeError, AttributeError) as error:  # a model whose layers do not pass keyword arguments on
        raise ModelError(f"{name} cannot be served: its attention cannot be reached ({error}).") from error
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(record.shapes) != list(range(layers)):
        raise ModelError(f"{name} cannot be served: {len(record.shapes)} of its {layers} layers are plain attention.")
    return record.shapes


def reference_logits(base: BaseModel, ids: torch.Tensor) -> torch.Tensor:
    """What the model itself says, before `use_slot_attention`: [tokens, vocab] in fp32 for ids [tokens]."""
    # The models' own code, which has everything their attention needs; sdpa would silently leave out soft capping.
    base.model.set_attn_implementation("eager")
    with torch.inference_mode():
        return base.model(input_ids=ids[None], use_cache=False).logits[0].float()


def _check_config(config: Any) -> None:
    name = config.model_type
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; only decoder models can be served.")
    if getattr(text, "use_bidirectional_attention", None):
        raise ModelError(f"{name} uses bidirectional attention and cannot be served.")
    strange = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise ModelError(f"{name} has layers of type {', '.join(sorted(strange))}, which cannot be served.")
    bad = _rope_types(getattr(text, "rope_parameters", None)) & _BATCH_DEPENDENT_ROPE
    if bad:
        raise ModelError(f"{name} uses rope type {bad.pop()!r}, whose answers would depend on the other requests.")


def _rope_types(rope: Any) -> set[str]:
    if not isinstance(rope, dict):
        return set()
    nested = [_rope_types(value) for value in rope.values() if isinstance(value, dict)]
    return {str(rope.get("rope_type", "default"))}.union(*nested)
