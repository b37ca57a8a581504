from __future__ import annotations

import pytest

from arkor_ray.client.job_file import load_job_file
from arkor_ray.errors import InvalidRequestError

MINIMAL = "model: tiny\ndataset: owner/data\n"


def load(tmp_path, text, **arguments):
    path = tmp_path / "my-run.yaml"
    path.write_text(text)
    return load_job_file(path, **arguments)


def test_snake_case_and_camel_case_give_the_same_job(tmp_path):
    snake = load(
        tmp_path,
        "name: n\nmodel: m\ndataset: {name: a/b, split: train}\nlora: {r: 8, max_length: 64, load_in_4bit: true}\n"
        "max_steps: 5\nsave_steps: {ratio: 0.5}\ndataset_split: {enabled: true, test_size: 0.2}\nnum_workers: 2\n",
    )
    camel = load(
        tmp_path,
        "name: n\nmodel: m\ndatasetSource: {type: huggingface, name: a/b, split: train}\nloraR: 8\nmaxLength: 64\n"
        "loadIn4bit: true\nmaxSteps: 5\nsaveSteps: {ratio: 0.5}\ndatasetSplit: {enabled: true, testSize: 0.2}\nnumWorkers: 2\n",
    )
    assert snake == camel
    assert snake.config["datasetSplit"] == {"enabled": True, "testSize": 0.2}


def test_the_name_is_that_of_the_argument_then_of_the_file_then_of_its_path(tmp_path):
    assert load(tmp_path, MINIMAL).name == "my-run"
    assert load(tmp_path, MINIMAL + "name: inside\n").name == "inside"
    assert load(tmp_path, MINIMAL + "name: inside\n", name="given").name == "given"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINIMAL + "max_stpes: 3\n", "unknown key 'max_stpes'; did you mean 'max_steps'"),
        (MINIMAL + "maxStpes: 3\n", "did you mean 'max_steps'"),
        (MINIMAL + "lora: {alhpa: 3}\n", "did you mean 'lora.alpha'"),
        ("model: m\ndataset: {nmae: a/b}\n", "did you mean 'dataset.name'"),
        (MINIMAL + "save_steps: {every: 3}\n", "unknown key 'save_steps.every'"),
        (MINIMAL + "max_steps: 3\nmaxSteps: 3\n", "max_steps is given twice"),
        (MINIMAL + "loraR: 3\nlora: {r: 3}\n", "r is given twice"),
        (MINIMAL + "max_steps: -3\n", r"maxSteps: .*greater than or equal to 1 \(got -3\)"),
        (MINIMAL + "lora: 16\n", "lora must hold keys"),
        ("model: m\ndataset: 3\n", "dataset must be"),
        ("model: m\ndataset: ./rows.jsonl\n", "dataset: there is no file"),
        ("dataset: a/b\n", "model is missing"),
        ("model: m\n", "dataset is missing"),
        ("- a\n", "must hold keys and values"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, sentence):
    with pytest.raises(InvalidRequestError, match=sentence) as raised:
        load(tmp_path, text)
    assert "my-run.yaml" in raised.value.message


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"Cannot read .*none\.yaml"):
        load_job_file(tmp_path / "none.yaml")


def test_a_data_set_beside_the_file_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = tmp_path / "data" / "rows.jsonl"
    rows.write_text("{}\n")
    monkeypatch.chdir("/")
    job = load(tmp_path, "model: m\ndataset: data/rows.jsonl\n")
    assert job.config["datasetSource"] == {"type": "blob", "url": rows.as_uri()}
    assert load(tmp_path, f"model: m\ndataset: {rows}\n") == job
