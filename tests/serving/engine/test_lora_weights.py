"""The strict loader takes what it can serve exactly, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from arkor_ray.errors import AdapterError
from arkor_ray.serving.engine.lora_slots import lora_linears
from arkor_ray.serving.engine.lora_weights import LoraWeights, parse_adapter
from tests.serving.tiny import SavedAdapter, make_adapter

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory) -> SavedAdapter:
    return make_adapter(llama, tmp_path_factory.mktemp("strict") / "a", seed=1)


@pytest.fixture(scope="module")
def linears(llama) -> dict[str, tuple[int, int]]:
    return lora_linears(llama)


def parse(saved: SavedAdapter, linears: dict[str, tuple[int, int]], tensors: Any = None, **config: Any) -> LoraWeights:
    data = saved.data if tensors is None else save(tensors)
    return parse_adapter("a", data, saved.config | config, linears, max_rank=64)


def test_plain_adapter_is_whole(saved, linears):
    weights = parse(saved, linears)
    assert set(weights.pairs) == set(linears)
    assert weights.rank == 8
    assert {pair.scale for pair in weights.pairs.values()} == {2.0}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [3]),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("invented_tomorrow", {"x": 1}),
    ],
)
def test_what_is_not_plain_lora_is_refused(saved, linears, option, value):
    with pytest.raises(AdapterError):
        parse(saved, linears, **{option: value})


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[KEY]


def _unknown_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.replace("layers.0", "layers.7")] = tensors[KEY].clone()


def _embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(8, 320)


def _full_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(320, 64)


def _magnitude(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(64)


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY] = torch.empty(0)  # what a careless save under ZeRO-3 leaves


def _no_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY] = torch.empty(0, 64)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY][3, 3] = float("nan")


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY][3, 3] = float("inf")


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY] = torch.ones(8, 32)


def _other_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY] = torch.ones(4, 64)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY] = torch.ones(8, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    "damage",
    [_without, _unknown_layer, _embedding, _full_weight, _magnitude, _empty, _no_rank, _nan, _infinite, _other_shape,
     _other_rank, _integers],
)  # fmt: skip
def test_damaged_tensors_are_refused(saved, linears, damage):
    tensors = load(saved.data)
    damage(tensors)
    with pytest.raises(AdapterError):
        parse(saved, linears, tensors)


def test_target_that_matches_nothing_is_refused(saved, linears):
    with pytest.raises(AdapterError, match="w_pack"):
        parse(saved, linears, target_modules=[*saved.config["target_modules"], "w_pack"])


def test_promised_layers_without_tensors_are_refused(llama, linears, tmp_path):
    narrow = make_adapter(llama, tmp_path / "narrow", seed=1, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="lack their weights"):
        parse(narrow, linears, target_modules=["q_proj", "v_proj"])


def test_broken_file_is_refused(saved, linears):
    for data in (b"", b"\x10" + b"\0" * 20, saved.data[:-5]):
        with pytest.raises(AdapterError):
            parse_adapter("a", data, saved.config, linears, max_rank=64)


def test_rank_beyond_the_limit_is_refused(saved, linears):
    with pytest.raises(AdapterError, match="up to 4"):
        parse_adapter("a", saved.data, saved.config, linears, max_rank=4)
