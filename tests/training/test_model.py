from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from arkor_ray.errors import ModelError, ServiceUnavailableError
from arkor_ray.schemas.job import JobConfig
from arkor_ray.serving.engine.base_model import load_base
from arkor_ray.training.model import (
    add_lora,
    context_length,
    load_base_model,
    load_config,
    load_tokenizer,
    target_modules,
    target_names,
)
from tests.own_code import give_own_code
from tests.training.tiny import make_base_model, make_spec

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
CPU = torch.device("cpu")


def adapted(model) -> set[str]:
    """Full names of the layers that PEFT puts LoRA on for our targets."""
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=target_modules(model)))
    return set(peft_model.targeted_module_names)


def test_llama_gets_its_projections_by_name(base_model, tmp_path) -> None:
    config: JobConfig = make_spec(tmp_path, base_model).config
    model = load_base_model(str(base_model), config, "fp32", CPU)
    assert target_modules(model) == PROJECTIONS
    assert target_names(add_lora(model, config, str(base_model))) == PROJECTIONS


def test_gpt2s_conv1d_layers_are_linear_too() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    assert target_modules(model) == ["c_attn", "c_fc", "c_proj"]


def test_router_of_a_mixture_of_experts_is_left_alone() -> None:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=1, head_dim=8, num_experts=2, vocab_size=20))
    assert not any(name.endswith(".gate") for name in adapted(model))


def test_gemma_4_gets_its_text_layers_and_nothing_of_its_towers() -> None:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration
    from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig, Gemma4VisionConfig

    config = Gemma4Config(vision_config=Gemma4VisionConfig(), audio_config=Gemma4AudioConfig())
    for part in (config.text_config, config.vision_config, config.audio_config):
        part.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.num_kv_shared_layers = 0
    with torch.device("meta"):
        names = adapted(Gemma4ForConditionalGeneration(config))
    assert {name.rsplit(".", 1)[-1] for name in names} == set(PROJECTIONS)
    assert all("language_model.layers." in name for name in names)
    assert len(names) == 14


def test_lora_starts_the_same_every_time(base_model, tmp_path) -> None:
    config = make_spec(tmp_path, base_model).config

    def start() -> dict[str, torch.Tensor]:
        torch.rand(3)  # whatever happened before
        model = add_lora(load_base_model(str(base_model), config, "fp32", CPU), config, str(base_model))
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    first, second = start(), start()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_context_length(base_model) -> None:
    assert context_length(load_config(str(base_model))) == 128


def test_a_missing_model_is_the_users_error(tmp_path) -> None:
    with pytest.raises(ModelError, match="tokenizer of base model"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_a_hub_out_of_reach_is_not_the_users_error(monkeypatch) -> None:
    import transformers

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect") from ConnectionError("no route")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ServiceUnavailableError, match="cannot be reached"):
        load_tokenizer("someone/model")


def test_revision_and_trust_reach_everything_that_is_loaded(base_model, tmp_path, monkeypatch) -> None:
    path, config = str(base_model), make_spec(tmp_path, base_model).config
    answers = {
        AutoTokenizer: load_tokenizer(path),
        AutoConfig: load_config(path),
        AutoModelForCausalLM: load_base_model(path, config, "fp32", CPU),
    }
    loaded = {}
    for loader, answer in answers.items():

        def note(source, *, revision, trust_remote_code, loader=loader, answer=answer, **rest):
            loaded[loader] = (source, revision, trust_remote_code)
            return answer

        monkeypatch.setattr(loader, "from_pretrained", note)
    options = {"revision": "v1", "trust_remote_code": True, "name": "house"}
    load_tokenizer("a/b", **options)
    load_config("a/b", **options)
    load_base_model("a/b", config, "fp32", CPU, **options)
    assert loaded == dict.fromkeys(answers, ("a/b", "v1", True))


def test_an_adapter_says_which_revision_of_its_base_it_is_for(base_model, tmp_path) -> None:
    config = make_spec(tmp_path, base_model).config
    model = add_lora(load_base_model(str(base_model), config, "fp32", CPU), config, "a/b", revision="v1")
    model.peft_config["default"].save_pretrained(str(tmp_path / "adapter"))
    saved = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (saved.base_model_name_or_path, saved.revision) == ("a/b", "v1")


def test_code_of_a_models_own_runs_only_where_the_operator_trusts_it(tmp_path, monkeypatch) -> None:
    path = give_own_code(make_base_model(tmp_path / "base"), monkeypatch)
    config = make_spec(tmp_path, Path(path)).config
    for load in (load_config, lambda source, **options: load_base_model(source, config, "fp32", CPU, **options)):
        with pytest.raises(ModelError, match=r"'house' brings code of its own.* trust_remote_code: true"):
            load(path, name="house")
    assert not (tmp_path / "modules").exists(), "not even copied for import"
    assert context_length(load_config(path, trust_remote_code=True)) == 128
    model = load_base_model(path, config, "fp32", CPU, trust_remote_code=True)
    assert type(model).__name__ == "HouseForCausalLM"
    assert target_names(add_lora(model, config, path)) == PROJECTIONS


class _Payload:
    """What an attacker puts in place of weights: it writes a file wherever it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._proof,)


@pytest.mark.parametrize("end", ["training", "serving"])
def test_weights_that_are_a_pickle_are_never_read(tmp_path, end) -> None:
    path = make_base_model(tmp_path / "base")
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Payload(tmp_path / "proof")}, path / "pytorch_model.bin")
    config = make_spec(tmp_path, path).config
    with pytest.raises(ModelError, match="safetensors"):
        load_base_model(str(path), config, "fp32", CPU) if end == "training" else load_base(str(path), "fp32")
    assert not (tmp_path / "proof").exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "proof").exists(), "it would have worked"


def test_a_tokenizer_that_is_code_is_refused_since_adapters_could_not_carry_it(base_model, monkeypatch) -> None:
    tokenizer = load_tokenizer(str(base_model))
    theirs = type("HouseTokenizer", (type(tokenizer),), {"__module__": "transformers_modules.house.tokenization_house"})
    monkeypatch.setattr(tokenizer, "__class__", theirs)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(ModelError, match=r"'house' is code of its own \(HouseTokenizer\)"):
        load_tokenizer("a/b", trust_remote_code=True, name="house")
