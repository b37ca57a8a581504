"""Tiny models and adapters with random weights, in the folder forms that real ones have: made in seconds, offline.

They say nothing sensible; they are for tests of everything that must work whatever a model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arkor_ray.demo.corpus import make_corpus
from arkor_ray.demo.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

#: Attention and MLP projections, by the names that all families below use.
LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")

_CONTEXT = 1024
_HEAD_DIM = 16


def make_tiny_model(
    directory: Path, family: str = "llama", hidden: int = 64, layers: int = 2, vocab: int = 512, seed: int = 0
) -> Path:
    """Write a causal language model with random weights, a real tokenizer and a chat template. Returns `directory`.

    `hidden` must be a multiple of 32. Attention has `hidden / 16` heads of 16, half as many for keys and values. The
    weights are wide enough that greedy decoding has clear winners. The same arguments give the same folder.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is none of {', '.join(FAMILIES)}")
    if hidden % (2 * _HEAD_DIM):
        raise ValueError(f"hidden {hidden} is not a multiple of {2 * _HEAD_DIM}")
    import torch
    from transformers import AutoModelForCausalLM

    directory = Path(directory)
    texts = [message["content"] for conversation in make_corpus(300) for message in conversation]
    tokenizer = train_tokenizer(texts, vocab, _CONTEXT)
    config = _config(family, hidden, layers, tokenizer)
    # A generator of its own is no choice: transformers draws initial weights from the global one.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_random_adapter(
    model_dir: Path,
    out_dir: Path,
    r: int = 8,
    alpha: float = 16,
    seed: int = 0,
    targets: Sequence[str] = LINEAR_TARGETS,
    scale: float = 0.05,
) -> Path:
    """Write a LoRA adapter for the model in `model_dir`, in PEFT form. Returns `out_dir`.

    Both factors are random, B with the standard deviation `scale`: unlike a fresh adapter, it changes what the model
    says, and each seed changes it in another way.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # PEFT's annotation asks for a whole alpha, its arithmetic does not.
    lora: Any = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    peft_model = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            elif "lora_B" in name:
                parameter.normal_(0.0, scale, generator=generator)
    peft_model.save_pretrained(out_dir)
    return Path(out_dir)


def _config(family: str, hidden: int, layers: int, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    from transformers import AutoConfig

    heads = hidden // _HEAD_DIM
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": _CONTEXT,
        "initializer_range": 0.1,
        # With random weights a tied model only ever repeats its last token, which would make token-by-token
        # comparisons easy to pass.
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family != "qwen2":  # which always divides hidden by heads, and that is 16
        shape["head_dim"] = _HEAD_DIM
    if family.startswith("gemma"):
        shape |= {"query_pre_attn_scalar": _HEAD_DIM, "sliding_window": _CONTEXT // 2}
    return AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **shape)
