"""The operator's file of base models: what it may say, and the sentences for what it may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from arkor_ray import catalogue
from arkor_ray.catalogue import Catalogue, read_catalogue
from arkor_ray.schemas.model import CatalogueEntry, split_reference

FILE = """
models:
  - name: Qwen/Qwen3-8B
    revision: 9c925d6
    aliases: [unsloth/gemma-4-E4B-it]
    serving: {gpus: 1, replicas: 2, max_length: 8192}
  - name: house-model
    source: s3://models/house-model/
    trust_remote_code: true
    training: {max_workers: 2}
"""


def read(tmp_path: Path, text: str) -> Catalogue:
    path = tmp_path / "catalogue.yaml"
    path.write_text(text)
    return read_catalogue(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_an_entry_says_where_a_model_is_and_what_it_gets(tmp_path):
    hub, house = read(tmp_path, FILE).models
    assert (hub.source, hub.reference, hub.trust_remote_code) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B@9c925d6", False)
    assert (hub.serving.gpus, hub.serving.replicas, hub.serving.max_length, hub.serving.slots) == (1, 2, 8192, None)
    assert (house.reference, house.trust_remote_code, house.training.max_workers) == (
        "s3://models/house-model",
        True,
        2,
    )


@pytest.mark.parametrize("text", [catalogue.__doc__, (Path(__file__).parents[1] / "README.md").read_text()])
def test_the_examples_of_the_documentation_are_accepted(tmp_path, text):
    [example] = re.findall(r"```yaml\n(models:.*?)```", text, re.DOTALL)
    assert read(tmp_path, example).models[0].source == "acme/chat-8b"


def test_every_name_is_listed_and_found_whatever_its_case(tmp_path):
    listed = read(tmp_path, FILE)
    assert listed.names() == ["Qwen/Qwen3-8B", "unsloth/gemma-4-E4B-it", "house-model"]
    assert listed.named(" UNSLOTH/gemma-4-e4b-IT ") is listed.models[0]
    assert listed.named("Qwen/Qwen3") is None


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ("{name: a/b, trust_remote_code: 'yes'}", "entry a/b: trust_remote_code: must be true or false (got 'yes')"),
        ("{name: a/b, trust_remote_code: 1}", "must be true or false"),
        ("{name: a/b, trust_remote: true}", "no key trust_remote; did you mean trust_remote_code?"),
        ("{name: a/b, serving: {slot: 1}}", "no key serving.slot; did you mean slots?"),
        ("{name: a/b, serving: {slots: 0}}", "entry a/b: serving.slots: "),
        ("{name: a/b, serving: {gpus: 2}}", "entry a/b: serving.gpus: "),
        ("{name: a/b, serving: many}", "serving: must hold keys and values"),
        ("{name: a/b, revision: 1234567}", "revision: must be text; put it in quotes (got 1234567)"),
        ("{name: a/b, revision: ../main}", "revision '../main' must be a commit, a tag or a branch"),
        ("{name: a/b, aliases: x}", "aliases: must be a list, such as [NAME]"),
        ("{name: a/b, aliases: [A/B]}", "entry a/b: a name is there twice"),
        ("{name: x, source: /models/x, revision: main}", "revision 'main' is for Hub ids"),
        ("{name: x}", "s3://bucket/prefix; the name is taken where there is none (got 'x')"),
        ("{name: x, sorce: a/b}", "there is no key sorce; did you mean source?"),
        ("{name: x, source: relative/dir/x}", "(got 'relative/dir/x')"),
        ("{name: x, source: 's3://models'}", "entry x: source: must be s3://bucket/prefix"),
        ("{name: x, source: 's3://models//x'}", "must be s3://bucket/prefix"),
        ("{name: x, source: 's3://Models/../x'}", "must be s3://bucket/prefix"),
        ("{source: a/b}", "entry 1: name is missing"),
        ("{name: ''}", "entry 1: name: "),
        ("a/b", "entry 1 must hold keys and values"),
        ("{name: a/b, name: c/d}", "the key name is there twice"),
        (
            "{name: a/b}\n  - {name: c/d, aliases: [A/b]}",
            "A/b names two base models, a/b (entry a/b) and c/d (entry c/d)",
        ),
        ("{name: a/b}\n  - {name: other, source: a/b}", "entries a/b and other are the same base model, a/b"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_entry_and_the_remedy(tmp_path, entry, remedy):
    assert remedy in refusal(tmp_path, f"models:\n  - {entry}\n")


@pytest.mark.parametrize("text", ["", "models: {a: b}", "models: [{name: a/b}]\nmodel: []", "[]", "models: ["])
def test_a_file_that_is_no_catalogue_is_refused_by_its_name(tmp_path, text):
    assert str(tmp_path / "catalogue.yaml") in refusal(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml cannot be read"):
        read_catalogue(tmp_path / "nothing.yaml")


def test_the_text_of_a_catalogue_does_for_its_file(tmp_path):
    listed = read(tmp_path, FILE)
    assert read_catalogue(listed.model_dump_json(exclude_defaults=True)) == listed


def test_two_revisions_of_one_repository_are_two_base_models(tmp_path):
    text = "models: [{name: old, source: a/b, revision: v1}, {name: new, source: a/b, revision: v2}, {name: a/b}]"
    listed = read(tmp_path, text)
    assert [entry.reference for entry in listed.models] == ["a/b@v1", "a/b@v2", "a/b"]
    assert [listed.of_base(entry.reference) for entry in listed.models] == listed.models


def test_names_given_elsewhere_are_entries_or_further_aliases(tmp_path):
    listed = read(tmp_path, FILE).with_names({"tiny": "/models/tiny", "big": "Qwen/Qwen3-8B@9c925d6", "next": "c/d@v2"})
    assert listed.models[0].aliases == ["unsloth/gemma-4-E4B-it", "big"]
    assert [(entry.name, entry.reference) for entry in listed.models[2:]] == [
        ("tiny", "/models/tiny"),
        ("next", "c/d@v2"),
    ]
    assert listed.with_names({"TINY": "/models/tiny"}) == listed, "the same name for the same base says nothing new"


def test_a_name_given_elsewhere_for_another_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="HOUSE-model names two base models"):
        read(tmp_path, FILE).with_names({"HOUSE-model": "a/b"})


def test_what_is_listed_nowhere_gets_the_defaults(tmp_path):
    entry: CatalogueEntry = read(tmp_path, FILE).of_base("Qwen/Qwen3-8B")  # listed, but at a revision
    assert (entry.name, entry.reference, entry.revision) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None)
    assert not entry.trust_remote_code and entry.serving.replicas is None and entry.training.max_workers is None


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("a/b", ("a/b", None)),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("/models/a@b", ("/models/a@b", None)),
        ("s3://models/a@b", ("s3://models/a@b", None)),
    ],
)
def test_only_the_hub_has_revisions(reference: str, parts: tuple[Any, Any]):
    assert split_reference(reference) == parts
