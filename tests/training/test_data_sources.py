"""Rows out of files, and out of a Hub that is only played."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fsspec import AbstractFileSystem

from arkor_ray.errors import DatasetError
from arkor_ray.schemas.dataset import HuggingFaceSource
from arkor_ray.schemas.job import JobConfig
from arkor_ray.storage import layout
from arkor_ray.storage.local import LocalStore
from arkor_ray.training import data_sources
from arkor_ray.training.data_sources import load_from_hub, load_rows, parse_rows
from arkor_ray.training.job_spec import DatasetPolicy
from tests.training.data_server import Server

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


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def hub_config(**wire) -> JobConfig:
    source = {"type": "huggingface", "name": "someone/tickets", **wire.pop("source", {})}
    return JobConfig.parse({"model": "m", "datasetSource": source, **wire})


class Builder:
    """What `datasets` makes of a repository with these files; `calls` keeps what is loaded of it."""

    def __init__(self, *files: str, unpacked: int = 10, calls: list | None = None) -> None:
        self.config = SimpleNamespace(data_files={"train": list(files), "test": list(files)})
        self.info = SimpleNamespace(download_size=None)  # the card tells none
        self._unpacked, self._calls = unpacked, calls if calls is not None else []

    def download_and_prepare(self) -> None:
        self._calls.append("download")

    def as_dataset(self, *, split: str):
        self._calls.append(split)
        rows = [{"text": f"{split} row"}]
        return SimpleNamespace(data=SimpleNamespace(nbytes=self._unpacked), to_list=lambda: rows)


class HubFiles(AbstractFileSystem):
    """What the Hub tells of the files of `someone/tickets`: their sizes."""

    protocol = "hf"
    cachable = False
    sizes: ClassVar[dict[str, int | None]] = {"a": 60, "b": 40, "untold": None}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": self.sizes[path.removeprefix("datasets/someone/tickets@1/")]}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub and the `datasets` functions; returns what was loaded, repository by repository."""
    import datasets
    from fsspec.registry import _registry

    calls: list = []
    monkeypatch.setitem(_registry, "hf", HubFiles)

    def load_dataset_builder(name, subset):
        calls.append((name, subset))
        return Builder(f"hf://datasets/{name}@1/a", calls=calls)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: ["train", "validation", "test"])
    return calls


@pytest.mark.parametrize(
    ("wire", "calls"),
    [
        ({}, [(None, "train")]),
        ({"source": {"split": "train[:500]", "subset": "en"}}, [("en", "train[:500]")]),
        ({"datasetSplit": "dev"}, [(None, "dev")]),
        ({"evalSteps": 5}, [(None, "train"), (None, "validation")]),
        (
            {"evalSteps": 5, "source": {"split": "validation"}},
            [(None, "validation"), (None, "test")],
        ),
        ({"evalSteps": 5, "datasetSplit": {"enabled": True}}, [(None, "train")]),
    ],
)
def test_hub_names_and_splits_are_passed_on(hub, wire, calls) -> None:
    config = hub_config(**wire)
    load_from_hub(config.dataset_source, config, DatasetPolicy())
    wanted = [[("someone/tickets", subset), "download", split] for subset, split in calls]
    assert hub == [each for call in wanted for each in call]


@pytest.mark.parametrize("file", ["/etc/passwd", "http://169.254.169.254/x", "hf://datasets/other/name@1/a"])
def test_a_repository_may_name_its_own_files_only(hub, monkeypatch, file) -> None:
    import datasets

    own = "hf://datasets/someone/tickets@1/a"
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: Builder(own, file, calls=hub))
    with pytest.raises(DatasetError, match="outside its own repository"):
        load_from_hub(hub_config().dataset_source, hub_config(), DatasetPolicy())
    assert hub == []


@pytest.mark.parametrize(
    ("names", "limit", "said"),
    [
        (["a", "b"], 99, "have 100 bytes or more, and the limit is 99"),
        (["untold", "b"], 1000, "does not say how large 'hf://datasets/someone/tickets@1/untold'"),
    ],
)
def test_a_repository_that_may_be_over_the_limit_is_not_downloaded(hub, monkeypatch, names, limit, said) -> None:
    import datasets

    files = [f"hf://datasets/someone/tickets@1/{name}" for name in names]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: Builder(*files, calls=hub))
    with pytest.raises(DatasetError, match=rf"^datasetSource\.name: .*{said}.*a source of type blob"):
        load_from_hub(hub_config().dataset_source, hub_config(), DatasetPolicy(max_bytes=limit))
    assert hub == []


def test_a_repository_at_the_limit_is_downloaded(hub, monkeypatch) -> None:
    import datasets

    files = [f"hf://datasets/someone/tickets@1/{name}" for name in "ab"]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: Builder(*files, calls=hub))
    load_from_hub(hub_config().dataset_source, hub_config(), DatasetPolicy(max_bytes=100))
    assert hub == ["download", "train"]


def test_a_repository_over_the_limit_when_it_is_unpacked_is_refused(hub, monkeypatch) -> None:
    import datasets

    bomb = Builder("hf://datasets/someone/tickets@1/a", unpacked=1000)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: bomb)
    with pytest.raises(DatasetError, match="1000 bytes when it is unpacked"):
        load_from_hub(hub_config().dataset_source, hub_config(), DatasetPolicy(max_bytes=999))


@pytest.mark.parametrize(
    "pattern",
    ["{url}/x.jsonl", "{url}/*.jsonl", "{folder}/*.jsonl", "file://{folder}/x.jsonl", "zip://x.jsonl::{url}/x.zip"],
)
def test_a_repositorys_card_cannot_make_a_request_or_look_at_this_machine(
    server, monkeypatch, tmp_path, pattern
) -> None:
    """With the real look-up of `datasets`, which finds such files before anybody could ask which ones it has found."""
    import datasets

    (tmp_path / "x.jsonl").write_bytes(ROWS)
    server.routes = {"/x.jsonl": (200, {}, ROWS)}
    pattern = pattern.format(url=server.url(""), folder=tmp_path)

    def load_dataset_builder(name: str, subset: str | None):
        found = datasets.data_files.DataFilesList.from_patterns([pattern], base_path=str(tmp_path))
        return Builder(*found)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(DatasetError, match="names files outside its own repository"):
        load_from_hub(hub_config().dataset_source, hub_config(), DatasetPolicy())
    assert server.seen == []


def test_rows_of_a_real_builder_come_as_they_are_stored(monkeypatch, tmp_path) -> None:
    """A column of images is not opened: it may name any file and any URL."""
    import datasets

    real = datasets.load_dataset_builder
    rows = [{"text": "one", "picture": "/etc/passwd"}, {"text": "two", "picture": None}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    options = {"data_files": str(tmp_path / "x.jsonl"), "features": features, "cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: real("json", **options))
    monkeypatch.setattr(data_sources, "_check_files", lambda source, builder, policy: None)
    monkeypatch.setattr(data_sources, "_own_files_only", lambda name: nullcontext())
    source = HuggingFaceSource(type="huggingface", name="someone/tickets", split="train[:1]")
    [row] = load_from_hub(source, hub_config(), DatasetPolicy())["train"]
    assert row == {"text": "one", "picture": {"bytes": None, "path": "/etc/passwd"}}


@pytest.mark.parametrize("name", ["json", "/etc", "../secret", "a/b/c", "-x"])
def test_paths_are_no_hub_names(hub, name) -> None:
    source = HuggingFaceSource(type="huggingface", name=name)
    with pytest.raises(DatasetError, match="no data set name of the Hub"):
        load_from_hub(source, hub_config(), DatasetPolicy())
    assert hub == []


HUB_THAT_HANGS = """
import threading, time
from types import SimpleNamespace

data_files = SimpleNamespace(resolve_pattern=None)

def download_and_prepare():
    threading.Thread(target=time.sleep, args=(600,)).start()
    time.sleep(600)

def load_dataset_builder(name, subset):
    return SimpleNamespace(config=SimpleNamespace(data_files={}), download_and_prepare=download_and_prepare)
"""
HUB_THAT_ANSWERS = """
import datetime
from types import SimpleNamespace

data_files = SimpleNamespace(resolve_pattern=None)
ROWS = {"train": [{"text": "one", "data": [1]}, {"text": "two", "at": datetime.date(2026, 1, 2)}], "validation": []}

def get_dataset_split_names(name, subset):
    return list(ROWS)

def as_dataset(split):
    return SimpleNamespace(data=SimpleNamespace(nbytes=1), to_list=lambda: ROWS[split])

def load_dataset_builder(name, subset):
    config = SimpleNamespace(data_files={})
    return SimpleNamespace(config=config, download_and_prepare=lambda: None, as_dataset=as_dataset)
"""


@pytest.fixture
def use_hub(tmp_path, monkeypatch):
    """Another `datasets` for the processes that are started, from its source."""

    def use(source: str) -> None:
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / "datasets.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "packages")

    return use


def test_a_hub_that_never_ends_has_as_long_as_a_url(use_hub, tmp_path) -> None:
    use_hub(HUB_THAT_HANGS)
    with pytest.raises(DatasetError, match=r"'someone/tickets' .* within 2 s, .* ARKOR_RAY_DATASETS_TIMEOUT_S"):
        load_rows("job-1", hub_config(), LocalStore(tmp_path / "store"), DatasetPolicy(timeout_s=2))
    assert list(LocalStore(tmp_path / "store").list("")) == []


def test_every_attempt_has_the_rows_of_the_first(use_hub, tmp_path) -> None:
    """Also where the Hub has an evaluation split without rows, and values that JSON has not."""
    use_hub(HUB_THAT_ANSWERS)
    store, config = LocalStore(tmp_path / "store"), hub_config(evalSteps=5)
    first = load_rows("job-1", config, store, DatasetPolicy())
    assert first == {"train": [{"text": "one", "data": [1]}, {"text": "two", "at": "2026-01-02"}]}
    assert load_rows("job-1", config, store, DatasetPolicy()) == first


@pytest.mark.parametrize(
    "rows",
    [
        [{"train": [{"text": "one"}], "text": "a whole row"}],
        [{"data": [1, 2], "messages": []}],
        [[{"text": "in a list"}], "not json", 5, None],
    ],
)
def test_a_stored_row_is_read_as_the_row_that_it_is(tmp_path, rows) -> None:
    path, store = tmp_path / "rows.json", LocalStore(tmp_path / "store")
    path.write_text(json.dumps(rows))
    config = JobConfig.parse({"model": "m", "datasetSource": {"type": "blob", "url": path.as_uri()}})
    policy = DatasetPolicy(allow_local_paths=True)
    assert load_rows("job-1", config, store, policy) == {"train": rows}
    path.unlink()
    assert load_rows("job-1", config, store, policy) == {"train": rows}


def test_an_evaluation_split_without_rows_that_an_earlier_version_stored_counts_as_none(tmp_path) -> None:
    store = LocalStore(tmp_path)
    for name, data in (("train.jsonl", ROWS), ("eval.jsonl", b""), ("index.json", b'["eval", "train"]')):
        store.put(layout.dataset_prefix("job-1") + name, data)
    rows = load_rows("job-1", hub_config(evalSteps=5), store, DatasetPolicy())
    assert rows["eval"] == [] and len(rows["train"]) == 2


def test_an_unknown_dataset_is_the_users_error(monkeypatch) -> None:
    import datasets

    def missing(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", missing)
    with pytest.raises(DatasetError, match="doesn't exist"):
        load_from_hub(HuggingFaceSource(type="huggingface", name="a/b"), hub_config(), DatasetPolicy())


def test_a_hub_that_its_own_client_has_given_up_on_is_not_tried_again(monkeypatch) -> None:
    import datasets
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def unreachable(name, subset):
        asked.append(name)
        raise ConnectionError("Couldn't reach 'a/b' on the Hub") from LocalEntryNotFoundError("after 5 tries")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(DatasetError, match="The Hub cannot be reached"):
        load_from_hub(HuggingFaceSource(type="huggingface", name="a/b"), hub_config(), DatasetPolicy())
    assert asked == ["a/b"]


def test_a_connection_to_the_hub_that_breaks_is_tried_again(monkeypatch) -> None:
    import datasets
    from huggingface_hub.utils import httpx

    asked = []

    def broken(name, subset):
        asked.append(name)
        raise httpx.ReadError("connection reset by peer")

    monkeypatch.setattr(datasets, "load_dataset_builder", broken)
    monkeypatch.setattr(data_sources, "time", SimpleNamespace(sleep=lambda seconds: None))
    with pytest.raises(DatasetError, match=r"The Hub cannot be reached for data set 'a/b': .*reset by peer"):
        load_from_hub(HuggingFaceSource(type="huggingface", name="a/b"), hub_config(), DatasetPolicy())
    assert len(asked) == data_sources.FETCH_ATTEMPTS
