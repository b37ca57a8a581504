"""The demo's base model, made for real: once for all who ask, and able to learn what the demo teaches."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from arkor_ray.demo.base_model import ensure_demo_base, find_demo_base
from arkor_ray.demo.pretrain import Recipe
from arkor_ray.demo.triage import DEMO_JOB, held_out_examples, score_answer, triage_examples
from arkor_ray.errors import InternalError

pytestmark = pytest.mark.integration

ASK = """
import sys
from pathlib import Path
from arkor_ray.demo.base_model import ensure_demo_base
from arkor_ray.demo.pretrain import Recipe
recipe = Recipe(conversations=60, vocab_size=400, hidden_size=32, intermediate_size=64, layers=1)
print(ensure_demo_base(Path(sys.argv[1]), lambda done, what: print(what), recipe))
"""


def test_of_concurrent_processes_one_makes_the_model_and_the_others_wait(tmp_path):
    asking = [
        subprocess.Popen([sys.executable, "-c", ASK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = [process.communicate()[0].splitlines() for process in asking]
    assert [process.returncode for process in asking] == [0, 0, 0]
    assert sum("training the tokenizer" in lines for lines in told) == 1
    assert len({lines[-1] for lines in told}) == 1


def test_a_maker_that_is_killed_makes_way_for_the_next(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", ASK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    next(line for line in first.stdout if "training the tokenizer" in line or "writing" in line)
    first.kill()
    first.communicate()
    second = subprocess.run([sys.executable, "-c", ASK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "training the tokenizer" in second.stdout
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [second.stdout.split("/")[-1].strip()]


def test_a_child_that_fails_is_quoted(tmp_path):
    broken = Recipe(conversations=3, hidden_size=0)
    with pytest.raises(InternalError, match=r"exit status 1.*Error"):
        ensure_demo_base(tmp_path, recipe=broken)
    assert find_demo_base(tmp_path, broken) is None


def test_lora_turns_the_talkative_base_into_one_that_sorts_tickets(tmp_path):
    folder = ensure_demo_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lora = LoraConfig(r=DEMO_JOB["loraR"], lora_alpha=DEMO_JOB["loraAlpha"], target_modules="all-linear")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora)

    base = _scores(model, tokenizer)
    assert base["valid_json"] == 0.0
    _fine_tune(model, tokenizer)
    tuned = _scores(model, tokenizer)
    assert tuned["valid_json"] >= 0.85, tuned
    assert tuned["category"] >= 0.75, tuned


def _scores(model, tokenizer) -> dict[str, float]:
    """The share of held-out tickets with each part of the answer right."""
    examples = held_out_examples(36)
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        [example.prompt for example in examples],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    model.eval()
    tokens = model.generate(**prompts, max_new_tokens=70, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    model.train()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    scores = [vars(score_answer(text, example.answer)) for text, example in zip(texts, examples, strict=True)]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def _fine_tune(model, tokenizer) -> None:
    """DEMO_JOB as a plain loop."""
    examples = [
        tokenizer.apply_chat_template(example.messages, return_dict=True, return_assistant_tokens_mask=True)
        for example in triage_examples()
    ]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=DEMO_JOB["learningRate"], weight_decay=DEMO_JOB["weightDecay"])
    schedule = get_scheduler(DEMO_JOB["lrSchedulerType"], optimizer, DEMO_JOB["warmupSteps"], DEMO_JOB["maxSteps"])
    order = random.Random(0)
    for _ in range(DEMO_JOB["maxSteps"]):
        batch = order.sample(examples, DEMO_JOB["batchSize"])
        length = max(len(example["input_ids"]) for example in batch)
        tokens = torch.zeros(len(batch), length, dtype=torch.long)
        labels = torch.full_like(tokens, -100)
        for row, example in enumerate(batch):
            ids, said = torch.tensor(example["input_ids"]), torch.tensor(example["assistant_masks"]).bool()
            tokens[row, : len(ids)] = ids
            labels[row, : len(ids)] = torch.where(said, ids, -100)
        # Padding lies right of everything, where a causal model does not look.
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
