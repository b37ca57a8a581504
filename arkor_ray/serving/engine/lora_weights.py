"""The strict loader: adapter bytes become LoRA weights that are known to fit the base model, or an AdapterError.

Nothing is skipped. Every tensor in the file must belong to a linear layer of the base that the adapter's configuration
promises, every promised layer must have its tensors, and whatever changes the meaning of the weights and is not plain
LoRA is refused. An adapter that is only half understood would answer with something near the base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

from arkor_ray.errors import AdapterError

# PEFT options that say nothing about the forward pass of a trained adapter, or that are read below.
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Ways to begin training that leave the base weights alone. The others (PiSSA, OLoRA, LoftQ, CorDA...) rewrite the base.
_PLAIN_INITS = {True, False, None, "gaussian", "eva", "orthogonal"}
_REFUSALS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in the LoRA layers",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "layer_replication": "replicated layers",
}
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class LoraPair:
    """One linear layer's update: x + scale * x A^T B^T, with A [r, in] and B [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoraWeights:
    """A verified adapter in host memory; `pairs` by the name of the linear layer in the base model."""

    adapter_id: str
    pairs: Mapping[str, LoraPair]

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs.values())


def parse_adapter(
    adapter_id: str, data: bytes, config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]], *, max_rank: int
) -> LoraWeights:
    """Weights from the bytes of `adapter_model.safetensors` and the dict of `adapter_config.json`.

    `linears` are the base model's layers that can carry LoRA, name -> (in_features, out_features).
    """
    _check_config(adapter_id, config)
    tensors = _read(adapter_id, data)
    promised = {name for name in linears if _is_target(name, config)}
    _check_promise(adapter_id, config, promised)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in promised:
            raise AdapterError(f"Adapter {adapter_id}: tensor {key} belongs to no layer that can be served with LoRA.")
        if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
            raise AdapterError(
                f"Adapter {adapter_id}: tensor {key} has shape {list(tensor.shape)} and type {tensor.dtype}; "
                "a matrix of floats is needed."
            )
        if not _finite(tensor):
            raise AdapterError(f"Adapter {adapter_id}: tensor {key} holds values that are not finite.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    missing = sorted(name for name in promised if sides.get(name, {}).keys() != {"A", "B"})
    if missing:
        raise AdapterError(
            f"Adapter {adapter_id}: {len(missing)} of {len(promised)} target layers lack their weights, "
            f"first {missing[0]}."
        )
    pairs = {
        name: _pair(adapter_id, name, sides[name]["A"], sides[name]["B"], config, linears[name], max_rank)
        for name in sorted(promised)
    }
    return LoraWeights(adapter_id, pairs)


def _check_config(adapter_id: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"Adapter {adapter_id} is of type {config.get('peft_type')!r}; only LORA can be served.")
    for option, meaning in _REFUSALS.items():
        if config.get(option):
            raise AdapterError(f"Adapter {adapter_id} uses {meaning}, which cannot be served.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"Adapter {adapter_id} trains biases (bias={config['bias']!r}), which cannot be served.")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, (bool, str, type(None))) or init not in _PLAIN_INITS:
        raise AdapterError(f"Adapter {adapter_id} began with init_lora_weights={init!r}, which changes the base model.")
    strange = sorted(option for option, value in config.items() if value and option not in _UNDERSTOOD)
    if strange:
        raise AdapterError(f"Adapter {adapter_id} uses options that cannot be served: {', '.join(strange)}.")


def _read(adapter_id: str, data: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(data)
    except Exception as error:  # safetensors raises its own SafetensorError, and plain ones for a broken header
        raise AdapterError(f"Adapter {adapter_id} is not a readable safetensors file: {error}") from error


def _finite(tensor: torch.Tensor) -> bool:
    # A sum is several times faster than looking at each value, and only finite if all values are; it may overflow.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _is_target(name: str, config: Mapping[str, Any]) -> bool:
    """PEFT's rule for which layers an adapter sits on."""
    excluded = config.get("exclude_modules")
    if excluded and _matches(name, excluded):
        return False
    targets = config.get("target_modules")
    if targets == "all-linear":
        return True
    if not targets or not _matches(name, targets):
        return False
    wanted = config.get("layers_to_transform")
    if isinstance(targets, str) or name in targets or wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name) for pattern in patterns]
    match = next((m for m in found if m), None) if patterns else _LAYER_INDEX.match(name)
    return match is not None and int(match["index"]) in ([wanted] if isinstance(wanted, int) else wanted)


def _matches(name: str, rule: str | list[str]) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in rule)


def _check_promise(adapter_id: str, config: Mapping[str, Any], promised: set[str]) -> None:
    targets = config.get("target_modules")
    if not promised:
        raise AdapterError(f"Adapter {adapter_id}: its target_modules {targets!r} name no layer of the base model.")
    if isinstance(targets, list):
        unmatched = sorted(item for item in targets if not any(_matches(name, [item]) for name in promised))
        if unmatched:
            raise AdapterError(f"Adapter {adapter_id}: no layer of the base model matches the target {unmatched[0]!r}.")


def _pair(
    adapter_id: str, name: str, a: torch.Tensor, b: torch.Tensor, config: Mapping[str, Any], shape: tuple[int, int],
    max_rank: int,
) -> LoraPair:  # fmt: skip
    rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    in_features, out_features = shape
    if tuple(a.shape) != (rank, in_features) or tuple(b.shape) != (out_features, rank):
        raise AdapterError(
            f"Adapter {adapter_id}: {name} has A {list(a.shape)} and B {list(b.shape)}; with r={rank} the base model "
            f"needs [{rank}, {in_features}] and [{out_features}, {rank}]."
        )
    if rank > max_rank:
        raise AdapterError(f"Adapter {adapter_id}: {name} has rank {rank}; this server takes ranks up to {max_rank}.")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraPair(a, b, scale)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
