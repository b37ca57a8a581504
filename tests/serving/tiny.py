"""Tiny random models and adapters, and PEFT's own answers to compare with."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from arkor_ray.schemas.base import utcnow
from arkor_ray.schemas.checkpoint import CheckpointManifest, ManifestFile, ParityProbe
from arkor_ray.storage import layout

VOCAB = 320
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(
    family: str = "llama", *, vocab: int = VOCAB, hidden: int = 64, layers: int = 2, seed: int = 0, **extra: Any
) -> PreTrainedModel:
    """A random model of a family, fp32 on CPU. Its weights are large enough that answers differ between prompts."""
    options: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden * 2, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": hidden // 4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        "initializer_range": 0.15,
    } | extra  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class SavedAdapter:
    """A PEFT folder as training would write it."""

    path: Path
    config: dict[str, Any]
    data: bytes


def make_adapter(model: PreTrainedModel, path: Path, *, seed: int, r: int = 8, **options: Any) -> SavedAdapter:
    """A random adapter on `model`, saved with PEFT under `path`; the model itself is left as it was."""
    torch.manual_seed(seed)
    config = LoraConfig(**({"r": r, "lora_alpha": 2 * r, "target_modules": ALL, "init_lora_weights": False,
                            "task_type": "CAUSAL_LM"} | options))  # fmt: skip
    peft_model = get_peft_model(model, config)
    peft_model.save_pretrained(path)
    peft_model.unload()
    return SavedAdapter(
        path, json.loads((path / "adapter_config.json").read_text()), (path / "adapter_model.safetensors").read_bytes()
    )


def peft_answer(model: PreTrainedModel, adapter: SavedAdapter | None, prompt: list[int], tokens: int) -> list[int]:
    """What `PeftModel.from_pretrained` and greedy `generate` say."""
    speaker: Any = model if adapter is None else PeftModel.from_pretrained(model, adapter.path)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = speaker.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    if adapter is not None:
        speaker.unload()
    return out[0, len(prompt) :].tolist()


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def make_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most VOCAB tokens: every byte, a few merges, and the turn markers."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(["user assistant system the weather is fine and the answer is here"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )


def save_base(model: PreTrainedModel, path: Path) -> Path:
    """The base model as a directory that `load_base` reads, with its tokenizer."""
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def commit_adapter(
    store: Any, adapter: SavedAdapter, job_id: str, step: int, *, base_model: str, precision: str = "fp32",
    probe: ParityProbe | None = None, tokenizer: PreTrainedTokenizerFast | None = None,
) -> CheckpointManifest:  # fmt: skip
    """Puts an adapter into storage as training does: its files, then the manifest."""
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.save_pretrained(adapter.path)
    adapter_id = layout.adapter_id(job_id, step)
    files = []
    for path in sorted(adapter.path.iterdir()):
        if path.is_file() and path.name != "README.md":
            data = path.read_bytes()
            store.put(layout.adapter_prefix(adapter_id) + path.name, data)
            files.append(ManifestFile(path=path.name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    manifest = CheckpointManifest(
        adapter_id=adapter_id, job_id=job_id, step=step, base_model=base_model, base_precision=precision,
        r=adapter.config["r"], lora_alpha=adapter.config["lora_alpha"], target_modules=ALL, files=files, probe=probe,
        template_sha256=hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(), created_at=utcnow(),
    )  # fmt: skip
    store.put(layout.manifest_key(adapter_id), manifest.to_bytes(), if_absent=True)
    return manifest


def probe_of(model: PreTrainedModel, adapter: SavedAdapter, ids: list[int]) -> ParityProbe:
    """What the training side says about `ids`."""
    speaker = PeftModel.from_pretrained(model, adapter.path)
    with torch.no_grad():
        logprobs = torch.log_softmax(speaker(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    speaker.unload()
    return ParityProbe(token_ids=ids, logprobs=[float(logprobs[i, token]) for i, token in enumerate(ids[1:])])


def peft_chat(base: PreTrainedModel, adapter: SavedAdapter | None, messages: list[dict[str, str]], tokens: int) -> str:
    """The text that PEFT's greedy answer to a chat decodes to."""
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = peft_answer(base, adapter, tokenizer(text, add_special_tokens=False)["input_ids"], tokens)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True)
