"""An adapter as a PEFT folder, and the gate that nothing broken passes on its way there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from peft import get_peft_model_state_dict

from arkor_ray.errors import TrainingError
from arkor_ray.schemas.checkpoint import WEIGHTS_FILE
from arkor_ray.training.model import target_names
from arkor_ray.training.portable_state import Tensors
from arkor_ray.training.supervision import template_sha256

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast


class AdapterExport:
    """Writes adapters of one PEFT model.

    Made on the training thread and used on another: it keeps no hold of the model's tensors.
    """

    def __init__(
        self, model: PeftModel, shapes: dict[str, torch.Size], tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
    ) -> None:
        config: Any = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        self._config = config
        self._tokenizer = tokenizer
        self._dtype = dtype
        self.target_modules = target_names(model)
        self.template_sha256 = template_sha256(tokenizer)
        # PEFT decides how parameters are called in a file; a number instead of each tensor shows where it goes.
        names = list(shapes)
        marked = get_peft_model_state_dict(
            model, state_dict={name: torch.tensor(i) for i, name in enumerate(names)}, save_embedding_layers=False
        )
        self._file_names = {names[int(mark)]: key for key, mark in marked.items()}
        self._expected = {self._file_names[name]: shape for name, shape in shapes.items()}
        adapted = model.targeted_module_names
        promised = {f"base_model.model.{m}.lora_{half}.weight" for m in adapted for half in "AB"}
        if promised != set(self._expected):
            raise TrainingError(
                f"The model's trainable weights are not those of its LoRA config: {promised ^ set(self._expected)}"
            )

    @property
    def r(self) -> int:
        return self._config.r

    @property
    def lora_alpha(self) -> float:
        return float(self._config.lora_alpha)

    def weights(self, state: Tensors, step: int) -> bytes:
        """`adapter_model.safetensors` of the fp32 weights `state`, in the precision that training computes in.

        Raises TrainingError when they do not pass the gate.
        """
        tensors = {self._file_names[name]: tensor.to(self._dtype).contiguous() for name, tensor in state.items()}
        check_adapter(tensors, self._expected, step)
        return safetensors.torch.save(tensors, metadata={"format": "pt"})

    def check(self, data: bytes, step: int) -> None:
        """The gate, for an `adapter_model.safetensors` that another process wrote. Raises TrainingError."""
        try:
            tensors = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise TrainingError(
                f"The adapter of step {step} that an earlier attempt put into storage cannot be read: {error}. "
                "Submit the job anew."
            ) from error
        check_adapter(tensors, self._expected, step)

    def write(self, folder: Path, weights: bytes) -> list[Path]:
        """The whole folder, flat; returns its files, sorted by name."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS_FILE).write_bytes(weights)
        self._config.save_pretrained(str(folder))
        self._tokenizer.save_pretrained(str(folder))
        return sorted(path for path in folder.iterdir() if path.is_file())


def check_adapter(tensors: Tensors, expected: dict[str, torch.Size], step: int) -> None:
    """The gate before publishing. Raises TrainingError that names the tensor and what is wrong with it.

    ZeRO-3 without a gather gives empty tensors, a diverged run gives nan, and a run whose gradients never arrived
    leaves every B at zero.
    """
    if set(tensors) != set(expected):
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise TrainingError(
            f"The adapter of step {step} lacks {missing or 'nothing'} and has besides {extra or 'nothing'}."
        )
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.shape != expected[name]:
            raise TrainingError(
                f"The adapter of step {step} has {name} of shape {tuple(tensor.shape)}, not {tuple(expected[name])}."
            )
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"The adapter of step {step} has values in {name} that are not finite: training has diverged. "
                "Try a lower learning_rate, or precision bf16 instead of fp16."
            )
    if step >= 1 and not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise TrainingError(f"The adapter of step {step} is still zero in every lora_B: no update has reached it.")
