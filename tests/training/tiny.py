"""A tiny base model with a chat template, rows to train it on, and jobs of them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from arkor_ray.schemas.job import JobConfig
from arkor_ray.training.job_spec import DatasetPolicy, JobSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def make_tokenizer(template: str = CHATML):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def make_base_model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Ragged conversations, some with a system message or two turns."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for index in range(count):
        messages = [{"role": "user", "content": text(2, 12)}, {"role": "assistant", "content": text(1, 8)}]
        if index % 3 == 0:
            messages.insert(0, {"role": "system", "content": text(1, 3)})
        if index % 4 == 0:
            messages += [{"role": "user", "content": text(1, 4)}, {"role": "assistant", "content": text(1, 4)}]
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.as_uri()


def make_spec(folder: Path, base_model: Path, job_id: str = "job-1", rows: int = 21, **config) -> JobSpec:
    """A job of `rows` rows in `folder`; `config` in the wire's spelling."""
    folder.mkdir(parents=True, exist_ok=True)
    wire = {
        "model": str(base_model),
        "datasetSource": {"type": "blob", "url": write_rows(folder / "rows.jsonl", make_rows(rows))},
        "batchSize": 2,
        "maxSteps": 8,
        "saveSteps": 4,
        "learningRate": 1e-2,
        "loraR": 4,
        "loraAlpha": 8,
        **config,
    }
    return JobSpec(
        job_id,
        JobConfig.parse(wire),
        str(base_model),
        (folder / "store").as_uri(),
        dataset_policy=DatasetPolicy(allow_local_paths=True),
        scratch_dir=folder / "scratch",
    )
