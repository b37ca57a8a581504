from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from arkor_ray.demo import base_model
from arkor_ray.demo.base_model import ensure_demo_base, find_demo_base
from arkor_ray.demo.pretrain import Recipe
from arkor_ray.errors import InternalError, ModelError

SMALL = Recipe(conversations=60, vocab_size=400, hidden_size=32, intermediate_size=64, layers=1)


@pytest.fixture
def makers(monkeypatch):
    """Each call of the child process, which here writes two files at once; `makers.error` lets it fail."""

    class Makers(list):
        error: Exception | None = None

    calls = Makers()

    def make(directory, recipe, report):
        calls.append(directory)
        (directory / "model.safetensors").write_bytes(b"weights")
        if calls.error:
            raise calls.error
        (directory / "config.json").write_text("{}")
        report(0.5, "training")

    monkeypatch.setattr(base_model, "_pretrain_in_child", make)
    return calls


def test_what_is_made_is_found_and_nothing_else_is_left(tmp_path, makers):
    told = []
    assert find_demo_base(tmp_path, SMALL) is None
    folder = ensure_demo_base(tmp_path, lambda *report: told.append(report), SMALL)
    assert told == [(0.5, "training"), (1.0, "ready")]
    assert find_demo_base(tmp_path, SMALL) == folder
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_a_finished_model_is_used_again(tmp_path, makers):
    folder = ensure_demo_base(tmp_path, recipe=SMALL)
    told = []
    assert ensure_demo_base(tmp_path, lambda *report: told.append(report), SMALL) == folder
    assert len(makers) == 1 and told == [(1.0, "ready")]


def test_another_recipe_is_another_model(tmp_path, makers):
    other = Recipe(**{**vars(SMALL), "seed": 1})
    assert ensure_demo_base(tmp_path, recipe=SMALL) != ensure_demo_base(tmp_path, recipe=other)
    assert len(makers) == 2


@pytest.mark.parametrize("damage", ["changed", "missing", "unlisted", "garbled"])
def test_a_folder_that_is_not_whole_is_made_again(tmp_path, makers, damage):
    folder = ensure_demo_base(tmp_path, recipe=SMALL)
    if damage == "changed":
        (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "unlisted":
        (folder / "contents.json").unlink()
    else:
        (folder / "contents.json").write_text("{")
    assert find_demo_base(tmp_path, SMALL) is None
    assert ensure_demo_base(tmp_path, recipe=SMALL) == folder == find_demo_base(tmp_path, SMALL)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(makers) == 2


def test_a_failure_leaves_nothing_and_the_next_caller_starts_anew(tmp_path, makers):
    makers.error = InternalError("no space left")
    with pytest.raises(InternalError, match="no space left"):
        ensure_demo_base(tmp_path, recipe=SMALL)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    makers.error = None
    assert find_demo_base(tmp_path, SMALL) is None
    assert ensure_demo_base(tmp_path, recipe=SMALL).is_dir()


def test_what_a_killed_maker_left_is_removed(tmp_path, makers):
    leftover = tmp_path / f".demo-base-{SMALL.digest()}.abc.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    ensure_demo_base(tmp_path, recipe=SMALL)
    assert not leftover.exists()


def test_without_torch_the_error_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"arkor-ray\[train\]"):
        ensure_demo_base(tmp_path, recipe=SMALL)


def test_importing_the_demo_brings_in_no_torch():
    source = (
        "import sys, arkor_ray.demo.base_model, arkor_ray.demo.triage, arkor_ray.demo.testing;"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", source]).returncode == 0


def test_a_model_by_the_demos_name_is_made_and_any_other_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "ensure_demo_base", lambda cache: cache / "made")
    monkeypatch.setenv("ARKOR_RAY_CACHE_DIR", str(tmp_path / "cache"))
    assert base_model.base_reference("Arkor-Ray/demo-base") == str(tmp_path / "cache" / "demo-base" / "made")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert base_model.base_reference("mine") == str(tmp_path / "mine")
    for name in ("owner/name@v1", "s3://bucket/model", "nonesuch"):
        assert base_model.base_reference(name) == name
