"""Rows out of files, and out of a Hub that is only played."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.schemas.dataset import HuggingFaceSource
from arkor_ray.schemas.job import JobConfig
from arkor_ray.storage.local import LocalStore
from arkor_ray.training.data_sources import load_from_hub, load_rows, parse_rows
from arkor_ray.training.job_spec import DatasetPolicy

ROWS = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (ROWS, [{"text": "one"}, {"text": "two"}]),
        (b"\xef\xbb\xbf" + ROWS, [{"text": "one"}, {"text": "two"}]),
        (ROWS.replace(b"\n", b"\r\n"), [{"text": "one"}, {"text": "two"}]),
        (b'[{"text": "one"}]', [{"text": "one"}]),
        (b'{"data": [{"text": "one"}]}', [{"text": "one"}]),
        (b'{"text": "one"}', [{"text": "one"}]),
        (b'{"text": "one"}\nnot json\n\n{"text": "two"}', [{"text": "one"}, "not json", {"text": "two"}]),
        ('{"text": "line\u2028separator"}\n'.encode(), [{"text": "line\u2028separator"}]),
    ],
)
def test_jsonl_and_json(data, rows) -> None:
    assert list(parse_rows(data)) == rows


def test_a_row_that_is_nested_without_end_is_a_bad_row() -> None:
    deep = "[" * 200_000
    assert list(parse_rows(deep.encode() + b'\n{"text": "one"}\n')) == [deep, {"text": "one"}]


@pytest.mark.parametrize("data", [b"", b" \n\n"])
def test_an_empty_file_is_an_error(data) -> None:
    with pytest.raises(DatasetError, match="is empty"):
        list(parse_rows(data))


def hub_config(**wire) -> JobConfig:
    source = {"type": "huggingface", "name": "someone/tickets", **wire.pop("source", {})}
    return JobConfig.parse({"model": "m", "datasetSource": source, **wire})


def builder_of(*files: str, size: int | None = None):
    config = SimpleNamespace(data_files={"train": list(files)})
    return SimpleNamespace(config=config, info=SimpleNamespace(download_size=size))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` functions; returns the calls of load_dataset."""
    import datasets

    calls: list[tuple] = []

    def load_dataset(name, subset, *, split):
        calls.append((name, subset, split))
        return [{"text": f"{split} row"}]

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: builder_of(f"hf://datasets/{name}@1/a"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: ["train", "validation", "test"])
    return calls


@pytest.mark.parametrize(
    ("wire", "calls"),
    [
        ({}, [("someone/tickets", None, "train")]),
        ({"source": {"split": "train[:500]", "subset": "en"}}, [("someone/tickets", "en", "train[:500]")]),
        ({"datasetSplit": "dev"}, [("someone/tickets", None, "dev")]),
        ({"evalSteps": 5}, [("someone/tickets", None, "train"), ("someone/tickets", None, "validation")]),
        (
            {"evalSteps": 5, "source": {"split": "validation"}},
            [("someone/tickets", None, "validation"), ("someone/tickets", None, "test")],
        ),
        ({"evalSteps": 5, "datasetSplit": {"enabled": True}}, [("someone/tickets", None, "train")]),
    ],
)
def test_hub_names_and_splits_are_passed_on(hub, tmp_path, wire, calls) -> None:
    load_rows("job-1", hub_config(**wire), LocalStore(tmp_path), DatasetPolicy())
    assert hub == calls


@pytest.mark.parametrize("file", ["/etc/passwd", "http://169.254.169.254/x", "hf://datasets/other/name@1/a"])
def test_a_repository_may_name_its_own_files_only(hub, monkeypatch, file) -> None:
    import datasets

    own = "hf://datasets/someone/tickets@1/a"
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: builder_of(own, file))
    with pytest.raises(DatasetError, match="outside its own repository"):
        load_from_hub(hub_config().dataset_source, hub_config(), DatasetPolicy())
    assert hub == []


def test_a_repository_over_the_limit_is_not_downloaded(hub, monkeypatch) -> None:
    import datasets

    large = builder_of("hf://datasets/someone/tickets@1/a", size=100)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: large)
    with pytest.raises(DatasetError, match="100 bytes"):
        load_from_hub(hub_config().dataset_source, hub_config(), DatasetPolicy(max_bytes=99))
    assert hub == []


@pytest.mark.parametrize("name", ["json", "/etc", "../secret", "a/b/c", "-x"])
def test_paths_are_no_hub_names(hub, name) -> None:
    source = HuggingFaceSource(type="huggingface", name=name)
    with pytest.raises(DatasetError, match="no data set name of the Hub"):
        load_from_hub(source, hub_config(), DatasetPolicy())
    assert hub == []


def test_an_unknown_dataset_is_the_users_error(monkeypatch) -> None:
    import datasets

    def missing(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", missing)
    with pytest.raises(DatasetError, match="doesn't exist"):
        load_from_hub(HuggingFaceSource(type="huggingface", name="a/b"), hub_config(), DatasetPolicy())
