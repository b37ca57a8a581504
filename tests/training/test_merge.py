"""Merged models are held against PEFT's own answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from arkor_ray.demo.testing import make_random_adapter, make_tiny_model
from arkor_ray.errors import AdapterError, ConflictError
from arkor_ray.storage.adapter_files import read_adapter
from arkor_ray.storage.locations import fetch_base
from arkor_ray.training.merge import copy_adapter, merge_adapter

IDS = torch.arange(5, 60)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"), "qwen3")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return read_adapter(str(make_random_adapter(base, tmp_path_factory.mktemp("adapter"))))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def peft_logits(base, adapter) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter.source))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.6)])
def test_the_merged_model_says_what_peft_says(base, adapter, tmp_path, dtype, tolerance):
    folder = merge_adapter(adapter, fetch_base(str(base)), tmp_path / "merged", dtype)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    wanted = peft_logits(base, adapter)
    assert (logits(merged) - wanted).abs().max() < tolerance
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - wanted).abs().max() > 2 * tolerance
    assert sorted(path.suffix for path in folder.iterdir() if "model" in path.name) == [".safetensors"]
    assert merged.config.use_cache


def test_tokenizer_and_template_come_along(base, adapter, tmp_path):
    folder = merge_adapter(adapter, fetch_base(str(base)), tmp_path / "merged", "fp32")
    own, found = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    assert found.chat_template == own.chat_template
    assert found("The lamp flickers.")["input_ids"] == own("The lamp flickers.")["input_ids"]

    changed = AutoTokenizer.from_pretrained(base)
    changed.chat_template = "{{ messages[0].content }}"
    changed.save_pretrained(tmp_path / "changed")
    files = {path.name: path.read_bytes() for path in (tmp_path / "changed").iterdir()}
    folder = merge_adapter(
        replace(adapter, files=adapter.files | files), fetch_base(str(base)), tmp_path / "own", "fp32"
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages[0].content }}"


def test_an_adapter_of_a_4_bit_base_is_merged_into_full_weights(base, tmp_path):
    from arkor_ray.training.bare import run_bare
    from arkor_ray.training.callbacks import ListEventSink
    from tests.training.tiny import make_base_model, make_spec

    small = make_base_model(tmp_path / "small")
    spec = make_spec(tmp_path / "run", small, loadIn4bit=True, maxSteps=4)
    run_bare(spec, ListEventSink())
    adapter = read_adapter(spec.storage_url)
    assert adapter.base_precision == "nf4"
    folder = merge_adapter(adapter, fetch_base(str(small)), tmp_path / "merged", "fp32")
    adapter.write(tmp_path / "peft")
    wanted = peft_logits(small, replace(adapter, source=str(tmp_path / "peft")))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(merged.config, "quantization_config")
    assert (logits(merged) - wanted).abs().max() < 1e-4


def test_nothing_is_written_over(base, adapter, tmp_path):
    (tmp_path / "there").mkdir()
    for write in (
        lambda folder: merge_adapter(adapter, fetch_base(str(base)), folder, "fp32"),
        lambda folder: copy_adapter(adapter, folder),
    ):
        with pytest.raises(ConflictError, match="is there already"):
            write(tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing(adapter, tmp_path):
    other = make_tiny_model(tmp_path / "other", "qwen3", hidden=96)
    with pytest.raises(AdapterError, match="cannot be merged into"):
        merge_adapter(adapter, fetch_base(str(other)), tmp_path / "merged", "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_copy_is_the_peft_folder(base, adapter, tmp_path):
    folder = copy_adapter(adapter, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == adapter.files
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(model, folder)), peft_logits(base, adapter))
