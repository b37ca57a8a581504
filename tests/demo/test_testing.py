from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from arkor_ray.demo.testing import FAMILIES, LINEAR_TARGETS, make_random_adapter, make_tiny_model

QUESTION = [{"role": "user", "content": "Is it 42?"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def answer_of(model, tokenizer):
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokens[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_answers_and_takes_lora_on_all_linears(family, tmp_path):
    folder = make_tiny_model(tmp_path / "model", family=family, layers=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert len(set(answer_of(model, tokenizer))) > 2  # not one token over and over
    inputs = torch.tensor([[5, 300, 17]])
    with torch.no_grad():
        base = model(input_ids=inputs).logits
    adapter = make_random_adapter(folder, tmp_path / "adapter", r=4)
    adapted = PeftModel.from_pretrained(model, adapter)
    assert len([name for name, _ in adapted.named_parameters() if "lora_A" in name]) == len(LINEAR_TARGETS)
    with torch.no_grad():
        assert not torch.allclose(adapted(input_ids=inputs).logits, base, atol=0.1)


def test_the_same_arguments_give_the_same_model_and_another_seed_another(tiny, tmp_path):
    same, other = make_tiny_model(tmp_path / "same"), make_tiny_model(tmp_path / "other", seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tiny / name).read_bytes() == (same / name).read_bytes()
    assert (tiny / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_making_a_model_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    make_tiny_model(tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_an_adapter_has_the_rank_alpha_and_targets_asked_for(tiny, tmp_path):
    folder = make_random_adapter(tiny, tmp_path, r=3, alpha=6, targets=("q_proj", "v_proj"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (3, 6, {"q_proj", "v_proj"})
    assert (folder / "adapter_model.safetensors").exists()


def test_adapters_of_two_seeds_answer_differently(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    answers = {
        tuple(answer_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder), tokenizer))
        for folder in (make_random_adapter(tiny, tmp_path / str(seed), seed=seed) for seed in range(3))
    }
    assert len(answers) == 3


def test_a_family_or_width_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of llama"):
        make_tiny_model(tmp_path, family="bert")
    with pytest.raises(ValueError, match="multiple of 32"):
        make_tiny_model(tmp_path, hidden=40)
