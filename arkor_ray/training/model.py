"""The base model, its tokenizer, and LoRA on its text layers."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arkor_ray.errors import ModelError, ServiceUnavailableError
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.schemas.job import JobConfig, Precision
from arkor_ray.schemas.model import LOAD_ERRORS, needs_remote_code, wants_remote_code

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Linear layers of text decoders that are no attention or MLP projection: routers, and Gemma's per-layer embeddings.
_NOT_ADAPTED = re.compile(r"(gate|router|shared_expert_gate|score|classifier|lm_head|per_layer_\w+)$")


def load_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, name: str | None = None
) -> PreTrainedTokenizerFast:
    """Of a Hub id or a directory, with a pad token, for right padding. `name` is what messages call the model.

    Raises ModelError, or ServiceUnavailableError when the Hub is out of reach.
    """
    from transformers import AutoTokenizer

    name = name or source
    with _loading(name, "tokenizer", trust_remote_code):
        tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if not type(tokenizer).__module__.startswith("transformers."):
        raise ModelError(
            f"The tokenizer of base model {name!r} is code of its own ({type(tokenizer).__name__}). Adapters carry their "
            "tokenizer as data and could not be served; use a model with a tokenizer of transformers",
            param="config.model",
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"Base model {name!r} has no fast tokenizer (tokenizer.json), which gives tokens their offsets.",
            param="config.model",
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_config(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, name: str | None = None
) -> PretrainedConfig:
    """The model's configuration; arguments and errors are those of `load_tokenizer`."""
    from transformers import AutoConfig

    with _loading(name or source, "configuration", trust_remote_code):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def context_length(config: PretrainedConfig) -> int:
    """Longest sequence the model was made for, in tokens."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(text, name, None), int):
            return getattr(text, name)
    return 4096


def resolve_precision(config: JobConfig, device: torch.device) -> Precision:
    """The job's precision; absent, bf16 on GPU and fp32 on CPU."""
    return config.precision or ("bf16" if device.type == "cuda" else "fp32")


def base_precision(config: JobConfig, precision: Precision) -> BasePrecision:
    """What the manifest says the base weights were held in."""
    return "nf4" if config.load_in_4bit else precision


def load_base_model(
    source: str,
    config: JobConfig,
    precision: Precision,
    device: torch.device,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> PreTrainedModel:
    """Frozen base weights in `precision`, or 4-bit NF4 that computes in it. Raises ModelError like `load_tokenizer`.

    Where ZeRO-3 is configured in transformers (see deepspeed.zero3_init), the weights are sharded as they load.
    """
    return load_weights(
        source,
        precision,
        device,
        load_in_4bit=config.load_in_4bit,
        revision=revision,
        trust_remote_code=trust_remote_code,
        name=name,
    )


def load_weights(
    source: str,
    precision: Precision,
    device: torch.device,
    *,
    load_in_4bit: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> PreTrainedModel:
    """`load_base_model` without a job."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch_dtype(precision)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    options["use_safetensors"] = True  # else weights may be a pickle, whose reader runs what it says
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
        options["device_map"] = {"": str(device)}
    with _loading(name or source, "weights", trust_remote_code):
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    if load_in_4bit:
        _keep_4bit_layers_trainable(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def add_lora(
    model: PreTrainedModel,
    config: JobConfig,
    source: str,
    *,
    revision: str | None = None,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """LoRA on the text decoder's linear layers; the same start on every worker of any world size, from the job's seed.

    `source` and `revision` are what the adapter's own configuration says about its base.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=target_modules(model),
        base_model_name_or_path=source,
        revision=revision,
    )
    torch.manual_seed(config.seed)
    try:
        peft_model = get_peft_model(model, lora, autocast_adapter_dtype=autocast_adapter_dtype)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be added to base model {source!r}: {error}", param="config.model") from error
    peft_model.peft_config["default"].base_model_name_or_path = source
    return peft_model


def target_modules(model: PreTrainedModel) -> list[str] | str:
    """PEFT's `target_modules` for attention and MLP projections of the text decoder only.

    A list of names where these names occur nowhere else (every text model); otherwise a pattern that is held to the
    decoder, so that vision and audio towers with layers of the same names stay as they are. Raises ModelError when
    there is nothing to adapt.
    """
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    inside = f"{path}." if path else ""
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    chosen = [name for name in linear if name.startswith(inside) and not _NOT_ADAPTED.search(name)]
    head = model.get_output_embeddings()
    chosen = [name for name in chosen if model.get_submodule(name) is not head]
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no linear layer in its text decoder to put LoRA on.", param="config.model"
        )
    leaves = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    same_name = [n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in leaves]
    if set(same_name) == set(chosen):
        return leaves
    anchor = re.escape(path.rsplit(".", 1)[-1]) if path else ""
    return rf".*\b{anchor}\..*\.({'|'.join(leaves)})"


def target_names(peft_model: PeftModel) -> list[str]:
    """Names of the adapted layers without their path, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name in peft_model.targeted_module_names})


def _keep_4bit_layers_trainable(model: PreTrainedModel) -> None:
    """Forbids bitsandbytes a kernel for CPUs with AVX512-BF16 that knows no gradient.

    It would repack a layer's weights for it at the first forward pass in eval mode and stay with it: after an evaluation,
    training would silently lose all gradients that pass through the layer.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def torch_dtype(precision: Precision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _is_linear(module: torch.nn.Module) -> bool:
    """nn.Linear and its quantised subclasses, and GPT-2's Conv1D, which is a linear layer by another name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


@contextlib.contextmanager
def _loading(name: str, what: str, trust_remote_code: bool) -> Iterator[None]:
    try:
        yield
    except (*LOAD_ERRORS, RuntimeError) as error:
        import torch

        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__name__ in (
                "ConnectError",
                "ConnectTimeout",
            ):
                raise ServiceUnavailableError(f"The Hub cannot be reached for base model {name!r}: {error}") from error
            cause = cause.__cause__ or cause.__context__
        if not trust_remote_code and wants_remote_code(error):
            raise needs_remote_code(name) from error
        raise ModelError(
            f"The {what} of base model {name!r} cannot be loaded: {error}", param="config.model"
        ) from error
