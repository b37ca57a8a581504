"""A model that brings code of its own, as repositories of the Hub do; the code is a plain Llama by another name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_CONFIG = """
from transformers import LlamaConfig


class HouseConfig(LlamaConfig):
    model_type = "house_llama"
"""
_MODEL = """
from transformers import LlamaForCausalLM

from .configuration_house import HouseConfig


class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig
"""


def give_own_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Turns a saved Llama into such a model; the code is copied for import into a folder beside it. Returns its path."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    (folder / "configuration_house.py").write_text(_CONFIG)
    (folder / "modeling_house.py").write_text(_MODEL)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "house_llama"
    config["architectures"] = ["HouseForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "configuration_house.HouseConfig",
        "AutoModelForCausalLM": "modeling_house.HouseForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
