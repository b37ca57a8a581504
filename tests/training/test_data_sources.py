"""Fetching, with servers on this machine standing in for the world."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.schemas.dataset import BlobSource, HuggingFaceSource
from arkor_ray.schemas.job import JobConfig
from arkor_ray.storage.local import LocalStore
from arkor_ray.training import data_sources
from arkor_ray.training.data_sources import fetch_blob, load_from_hub, load_rows, parse_rows
from arkor_ray.training.job_spec import DatasetPolicy

PRIVATE_OK = DatasetPolicy(allow_private_hosts=True, timeout_s=20)
ROWS = b'{"text": "one"}\n{"text": "two"}\n'


class Server:
    """`routes` maps a path to (status, headers, body), or to a list of these, one for each request."""

    def __init__(self) -> None:
        self.routes: dict[str, object] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                answer = outer.routes[self.path]
                status, headers, body = answer.pop(0) if isinstance(answer, list) else answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture
def other():
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    """In this module alone: other threads of the process still sleep."""
    monkeypatch.setattr(data_sources, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))


def blob(url: str, token: str | None = None) -> BlobSource:
    return BlobSource(type="blob", url=url, token=token)


def test_the_token_goes_to_the_first_origin_only(server, other) -> None:
    server.routes = {"/a": (302, {"Location": "/b"}, b""), "/b": (307, {"Location": other.url("/c")}, b"")}
    other.routes = {"/c": (200, {}, ROWS)}
    assert fetch_blob(blob(server.url("/a"), "secret"), PRIVATE_OK) == ROWS
    assert [headers.get("authorization") for _, headers in server.seen] == ["Bearer secret", "Bearer secret"]
    assert [headers.get("authorization") for _, headers in other.seen] == [None]


def test_private_addresses_are_refused(server) -> None:
    with pytest.raises(DatasetError, match="ARKOR_RAY_DATASETS_ALLOW_PRIVATE_HOSTS=1"):
        fetch_blob(blob(server.url("/a")), DatasetPolicy())
    assert server.seen == []


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "127.0.0.1",
        "0.0.0.0",
        "::1",
        "fe80::1",
        "::ffff:10.0.0.1",
        "fd00::1",
    ],
)
def test_names_that_resolve_to_private_addresses_are_refused(monkeypatch, address) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))
    answer = [public, (family, socket.SOCK_STREAM, 6, "", (address, 80))]
    monkeypatch.setattr(data_sources.socket, "getaddrinfo", lambda *args, **kwargs: answer)
    with pytest.raises(DatasetError, match="private address"):
        fetch_blob(blob("http://innocent.example/x"), DatasetPolicy())


def test_the_connection_goes_to_the_address_that_was_checked(server, monkeypatch) -> None:
    """A name that resolves to another address a moment later (DNS rebinding) gains nothing."""
    monkeypatch.setattr(data_sources, "_public_address", lambda host, port: "127.0.0.1")
    server.routes = {"/x": (200, {}, ROWS)}
    assert fetch_blob(blob(f"http://innocent.example:{server.port}/x"), DatasetPolicy()) == ROWS
    assert server.seen[0][1]["host"] == f"innocent.example:{server.port}"


def test_every_redirect_is_checked(server, monkeypatch) -> None:
    allowed = iter(["127.0.0.1"])
    real = data_sources._public_address
    monkeypatch.setattr(data_sources, "_public_address", lambda h, p: next(allowed, None) or real(h, p))
    server.routes = {"/x": (302, {"Location": server.url("/secret")}, b"")}
    with pytest.raises(DatasetError, match="private address"):
        fetch_blob(blob(server.url("/x")), DatasetPolicy())
    assert [path for path, _ in server.seen] == ["/x"]


def test_redirects_end(server) -> None:
    server.routes = {"/loop": (302, {"Location": "/loop"}, b"")}
    with pytest.raises(DatasetError, match="redirects more than 5 times"):
        fetch_blob(blob(server.url("/loop")), PRIVATE_OK)


def test_a_redirect_to_a_file_is_refused(server) -> None:
    server.routes = {"/x": (302, {"Location": "file:///etc/passwd"}, b"")}
    with pytest.raises(DatasetError, match="no plain http"):
        fetch_blob(blob(server.url("/x")), DatasetPolicy(allow_private_hosts=True, allow_local_paths=True))


def test_size_is_counted_after_decompression(server) -> None:
    server.routes = {"/x": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"a" * 100_000))}
    with pytest.raises(DatasetError, match="larger than the limit of 1000 bytes"):
        fetch_blob(blob(server.url("/x")), DatasetPolicy(allow_private_hosts=True, max_bytes=1000))


def test_a_client_error_is_the_users_and_shows_neither_token_nor_query(server) -> None:
    server.routes = {"/x?signature=abc": (403, {}, b"")}
    with pytest.raises(DatasetError, match="HTTP 403") as raised:
        fetch_blob(blob(server.url("/x?signature=abc"), "secret"), PRIVATE_OK)
    assert "secret" not in str(raised.value) and "abc" not in str(raised.value)
    assert len(server.seen) == 1


def test_a_server_error_is_tried_again(server) -> None:
    server.routes = {"/x": [(503, {}, b""), (200, {}, ROWS)]}
    assert fetch_blob(blob(server.url("/x")), PRIVATE_OK) == ROWS


def test_a_server_that_stays_down_ends_the_job_with_what_it_said(server, monkeypatch) -> None:
    monkeypatch.setattr(data_sources.time, "sleep", lambda seconds: None)
    server.routes = {"/x": (500, {}, b"")}
    with pytest.raises(DatasetError, match=r"after 5 attempts: .*HTTP 500"):
        fetch_blob(blob(server.url("/x")), PRIVATE_OK)


def test_local_files_only_when_allowed(tmp_path) -> None:
    path = tmp_path / "rows with space.jsonl"
    path.write_bytes(ROWS)
    with pytest.raises(DatasetError, match="ARKOR_RAY_DATASETS_ALLOW_LOCAL_PATHS=1"):
        fetch_blob(blob(path.as_uri()), DatasetPolicy())
    assert fetch_blob(blob(path.as_uri()), DatasetPolicy(allow_local_paths=True)) == ROWS
    with pytest.raises(DatasetError, match="No such file"):
        fetch_blob(blob((tmp_path / "none").as_uri()), DatasetPolicy(allow_local_paths=True))


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
