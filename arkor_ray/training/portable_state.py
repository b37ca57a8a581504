"""What LoRA training needs to go on, whole and free of how many workers and which ZeRO stage held it in pieces.

DeepSpeed keeps fp32 weights and optimizer state in flat tensors, of which each worker has some parts. `Shards` knows
which stretch of which flat tensor is which stretch of which parameter; gathering and restoring are copies along that
map, with one reduction per kind of state instead of one per parameter. DeepSpeed's own checkpoints cannot be loaded
at another world size.

8-bit optimizer states are stored as their values together with the scale of the block they were in: restored into the
same layout they get back the very same bits, in another layout they are quantised anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WEIGHTS = "weights"
BLOCK = 256  # bitsandbytes' block size for 8-bit optimizer states

Tensors = dict[str, torch.Tensor]


@dataclass
class PortableState:
    """On the host, in fp32. `tensors` maps a kind ("weights", "exp_avg", …) to parameter names to whole tensors.

    `optimizer_steps` is the optimizer's own count: with fp16, updates that overflowed are not in it.
    """

    tensors: dict[str, Tensors]
    optimizer_steps: int = 0
    loss_scaler: dict[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> Tensors:
        return self.tensors[WEIGHTS]


@dataclass(frozen=True)
class _Stretch:
    """flat[flat_start : flat_start + length] is parameter `name`, flattened, from `start` on."""

    name: str
    start: int
    length: int
    flat: torch.Tensor
    flat_start: int


class Shards:
    """The map between an engine's flat tensors on this worker and the trainable parameters."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._optimizer = engine.basic_optimizer
        self._shapes = {
            name: torch.Size(getattr(p, "ds_shape", p.shape))
            for name, p in engine.module.named_parameters()
            if p.requires_grad
        }
        self._starts: dict[str, int] = {}
        self._total = 0
        for name, shape in self._shapes.items():
            self._starts[name] = self._total
            self._total += shape.numel()
        self._replicated = engine.zero_optimization_stage() == 0
        self._stretches = list(self._find_stretches())

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Whole shapes of the trainable parameters by name."""
        return self._shapes

    def gather(self, *, weights_only: bool = False) -> PortableState | None:
        """Collective. The whole state on rank 0, None elsewhere; the copy is finished when it returns."""
        kinds = [WEIGHTS] if weights_only else [WEIGHTS, *_kinds(self._optimizer)]
        state = PortableState({kind: self._gather(kind) for kind in kinds})
        if dist.get_rank() != 0:
            return None
        state.optimizer_steps = next((int(s["step"]) for s in self._optimizer.state.values() if "step" in s), 0)
        state.loss_scaler = _get_loss_scaler(self._engine.optimizer)
        return state

    def restore(self, state: PortableState) -> None:
        """Puts the whole state, given on every worker, back into this worker's parts.

        The module's own weights must have been set before the engine was made (`set_weights`): DeepSpeed copies them
        into its low-precision buffers then, and would go on with stale ones for a step otherwise.
        """
        for flat in {id(s.flat): s.flat for s in self._stretches}.values():
            mine = [s for s in self._stretches if s.flat is flat]
            _scatter(state.tensors[WEIGHTS], mine, flat.data)
            if state.optimizer_steps > 0:
                values = {}
                for kind in _kinds(self._optimizer):
                    values[kind] = torch.zeros_like(flat.data, dtype=torch.float32)
                    _scatter(state.tensors[kind], mine, values[kind])
                _set_optimizer_state(self._optimizer, flat, values, state.optimizer_steps)
        _set_loss_scaler(self._engine.optimizer, state.loss_scaler)

    def _gather(self, kind: str) -> Tensors:
        buffer = torch.zeros(self._total, dtype=torch.float32, device=self._engine.device)
        views: dict[int, Tensors] = {}
        for s in self._stretches:
            if kind == WEIGHTS:
                source = s.flat.detach().reshape(-1)
            else:
                per_element = views.get(id(s.flat))
                if per_element is None:
                    per_element = views[id(s.flat)] = _optimizer_state(self._optimizer, s.flat)
                if kind not in per_element:
                    continue  # no update has been applied yet
                source = per_element[kind].reshape(-1)
            at = self._starts[s.name] + s.start
            buffer[at : at + s.length] = source[s.flat_start : s.flat_start + s.length]
        if not self._replicated and dist.get_world_size() > 1:
            dist.reduce(buffer, dst=0)
        if dist.get_rank() != 0:
            return {}
        host = buffer.cpu()
        return {
            name: host[self._starts[name] : self._starts[name] + shape.numel()].view(shape)
            for name, shape in self._shapes.items()
        }

    def _find_stretches(self) -> Iterator[_Stretch]:
        stage, optimizer = self._engine.zero_optimization_stage(), self._engine.optimizer
        for name, param in self._engine.module.named_parameters():
            if not param.requires_grad:
                continue
            if stage == 0:
                yield _Stretch(name, 0, param.numel(), param, 0)
            elif stage in (1, 2):
                mapping = param._hp_mapping
                if mapping is not None:
                    flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
                    if flats is None:
                        flats = optimizer.fp32_groups_flat_partition  # the optimizer of bf16 at ZeRO-1
                    whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield _Stretch(name, whole.start, whole.numel, flats[mapping.param_group_index], part.start)
            else:
                group, flat_start, length = optimizer.grad_position[optimizer.get_param_id(param)]
                start = dist.get_rank() * length
                length = min(length, param.ds_numel - start)  # the last worker's part is padded
                if length > 0:
                    yield _Stretch(name, start, length, optimizer.fp32_partitioned_groups_flat[group], flat_start)


def set_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """Copies whole tensors into the trainable parameters of a model that no engine has yet."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.copy_(weights[name])


def _scatter(whole: Tensors, stretches: list[_Stretch], flat: torch.Tensor) -> None:
    target = flat.reshape(-1)  # a view: flat tensors and parameters are contiguous
    for s in stretches:
        piece = whole[s.name].reshape(-1)[s.start : s.start + s.length]
        target[s.flat_start : s.flat_start + s.length].copy_(piece)


def _kinds(optimizer: torch.optim.Optimizer) -> list[str]:
    """Kinds of per-element state, the same on every worker also where tensors differ in size."""
    if isinstance(optimizer, torch.optim.SGD):
        return []
    moments = ["exp_avg", "exp_avg_sq"]
    return [*moments, *(f"{kind}.scale" for kind in moments)] if _is_8bit(optimizer) else moments


def _is_8bit(optimizer: Any) -> bool:
    return getattr(getattr(optimizer, "args", None), "optim_bits", 32) == 8


def _optimizer_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> Tensors:
    """Per-element state of one flat tensor in fp32; empty before the first update."""
    state = optimizer.state.get(flat) or {}
    if "state1" not in state:  # torch's AdamW
        return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}
    values: Tensors = {}
    for kind, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        stored = state[f"state{number}"].reshape(-1)
        if stored.dtype == torch.uint8:
            scale = state[f"absmax{number}"].repeat_interleave(BLOCK)[: stored.numel()]
            values[kind] = state[f"qmap{number}"][stored.long()] * scale
            values[f"{kind}.scale"] = scale
        else:  # bitsandbytes keeps small tensors in 32 bits
            values[kind] = stored
    return values


def _set_optimizer_state(optimizer: Any, flat: torch.Tensor, values: Tensors, steps: int) -> None:
    if isinstance(optimizer, torch.optim.SGD):
        return
    (group,) = optimizer.param_groups
    if not hasattr(optimizer, "init_state"):
        where = flat.device if group.get("fused") else None
        moments = {kind: values[kind].view_as(flat) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[flat] = {"step": torch.tensor(float(steps), device=where), **moments}
        return
    # bitsandbytes looks the tensor up in its group, where ZeRO-3 has each one only while it updates it.
    usual, group["params"] = group["params"], [flat]
    optimizer.init_state(group, flat, 0, 0)
    group["params"] = usual
    state = optimizer.state[flat]
    state["step"] = steps
    for kind, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        stored = state[f"state{number}"]
        if stored.dtype == torch.uint8:
            codes, absmax = _quantise(
                values[kind].reshape(-1), values[f"{kind}.scale"].reshape(-1), state[f"qmap{number}"]
            )
            stored.copy_(codes.view_as(stored))
            state[f"absmax{number}"].copy_(absmax)
        else:
            stored.copy_(values[kind].view_as(stored))


def _quantise(values: torch.Tensor, scales: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-wise codes (elements,) uint8 and scales (blocks,).

    A block whose elements all come from one block keeps its scale, so its codes come back bit by bit; any other block
    is scaled by its largest element.
    """
    blocks = -(-values.numel() // BLOCK)
    padded = torch.zeros(blocks * BLOCK, device=values.device).index_copy_(
        0, torch.arange(values.numel(), device=values.device), values
    )
    old = torch.zeros_like(padded)
    old[: values.numel()] = scales
    padded, old = padded.view(blocks, BLOCK), old.view(blocks, BLOCK)
    largest_old = old.amax(dim=1)
    # Padding has scale 0 and must not make a block look mixed.
    unmixed = ((old == largest_old[:, None]) | (old == 0)).all(dim=1) & (largest_old > 0)
    unmixed &= (padded.abs() <= largest_old[:, None] * 1.0001).all(dim=1)
    absmax = torch.where(unmixed, largest_old, padded.abs().amax(dim=1))
    relative = padded / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    edges = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize(relative.reshape(-1)[: values.numel()].contiguous(), edges.contiguous())
    return codes.to(torch.uint8), absmax


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _get_loss_scaler(optimizer: Any) -> dict[str, float]:
    scaler = getattr(optimizer, "loss_scaler", None)
    return {name: float(getattr(scaler, name)) for name in _SCALER_FIELDS if hasattr(scaler, name)}


def _set_loss_scaler(optimizer: Any, fields: dict[str, float]) -> None:
    scaler = getattr(optimizer, "loss_scaler", None)
    for name, value in fields.items():
        if hasattr(scaler, name):
            setattr(scaler, name, type(getattr(scaler, name))(value))
