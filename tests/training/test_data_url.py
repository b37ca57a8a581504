"""Fetching, with servers on this machine standing in for the world."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.schemas.dataset import BlobSource
from arkor_ray.training import data_url
from arkor_ray.training.data_url import fetch_blob
from arkor_ray.training.job_spec import DatasetPolicy
from tests.training.data_server import Server

PRIVATE_OK = DatasetPolicy(allow_private_hosts=True, timeout_s=20)
REFUSED = "at a private address|where clouds keep credentials"
ROWS = b'{"text": "one"}\n{"text": "two"}\n'


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
    monkeypatch.setattr(data_url, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))


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
        "172.31.255.255",
        "192.168.1.1",
        "100.100.100.200",
        "169.254.169.254",
        "127.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:0:10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::a9fe:a9fe",
        "2002:a00:1::",
        "2001:0:a00:1::f5ff:fffe",
        "2001:db8::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_names_that_resolve_to_private_addresses_are_refused(monkeypatch, address) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))
    answer = [public, (family, socket.SOCK_STREAM, 6, "", (address, 80))]
    monkeypatch.setattr(data_url.socket, "getaddrinfo", lambda *args, **kwargs: answer)
    with pytest.raises(DatasetError, match=REFUSED):
        fetch_blob(blob("http://innocent.example/x"), DatasetPolicy())


def test_the_connection_goes_to_the_address_that_was_checked(server, monkeypatch) -> None:
    """A name that resolves to another address a moment later (DNS rebinding) gains nothing."""
    monkeypatch.setattr(data_url, "_allowed_address", lambda host, port, policy: "127.0.0.1")
    server.routes = {"/x": (200, {}, ROWS)}
    assert fetch_blob(blob(f"http://innocent.example:{server.port}/x"), DatasetPolicy()) == ROWS
    assert server.seen[0][1]["host"] == f"innocent.example:{server.port}"


def test_every_redirect_is_checked(server, monkeypatch) -> None:
    allowed = iter(["127.0.0.1"])
    real = data_url._allowed_address
    monkeypatch.setattr(data_url, "_allowed_address", lambda *given: next(allowed, None) or real(*given))
    server.routes = {"/x": (302, {"Location": server.url("/secret")}, b"")}
    with pytest.raises(DatasetError, match=REFUSED):
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
    monkeypatch.setattr(data_url.time, "sleep", lambda seconds: None)
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


# What no check of a name sees: the C library reads these as addresses of this machine or of its cloud's metadata.
@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "2852039166", "[::ffff:7f00:1]", "localhost", "①②⑦.⓪.⓪.①"],
)
def test_addresses_in_disguise_are_refused(host) -> None:
    with pytest.raises(DatasetError, match=rf"{REFUSED}|cannot be the name"):
        fetch_blob(blob(f"http://{host}/x"), DatasetPolicy())


@pytest.mark.parametrize("policy", [DatasetPolicy(), PRIVATE_OK])
@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "169.254.170.2", "100.100.100.200", "fd00:ec2::254", "::ffff:a9fe:a9fe", "64:ff9b::a9fe:a9fe"],
)
def test_where_clouds_keep_credentials_nothing_is_fetched_even_if_private_hosts_are_allowed(
    monkeypatch, address, policy
) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    answer = [(family, socket.SOCK_STREAM, 6, "", (address, 80))]
    monkeypatch.setattr(data_url.socket, "getaddrinfo", lambda *args, **kwargs: answer)
    with pytest.raises(DatasetError, match="where clouds keep credentials"):
        fetch_blob(blob("http://metadata.google.internal/computeMetadata/v1/"), policy)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://[::1", "Invalid URL"),
        ("http://host:port/x", "Invalid URL"),
        ("http://127.0.0.1:99999/x", "no URL|Invalid URL"),
        ("gopher://127.0.0.1:6379/_FLUSHALL", "no plain http"),
        ("http://user:pass@127.0.0.1/x", "no plain http"),
        ("http://" + "a" * 64 + ".example/x", "cannot be the name"),
        ("//169.254.169.254/latest", REFUSED),
        ("http://127.0.0.1\\.example.com/x", r"cannot be|resolved|no URL"),
    ],
)
def test_redirects_that_lead_astray_are_the_users_error(server, monkeypatch, location, reason) -> None:
    real, allowed = data_url._allowed_address, iter(["127.0.0.1"])
    monkeypatch.setattr(data_url, "_allowed_address", lambda *given: next(allowed, None) or real(*given))
    monkeypatch.setattr(data_url, "FETCH_ATTEMPTS", 1)
    server.routes = {"/x": (302, {"Location": location}, b"")}
    with pytest.raises(DatasetError, match=reason):
        fetch_blob(blob(server.url("/x")), DatasetPolicy())
    assert len(server.seen) == 1


def test_a_redirect_that_says_nowhere_is_the_users_error(server) -> None:
    server.routes = {"/x": (302, {}, b"")}
    with pytest.raises(DatasetError, match="HTTP 302"):
        fetch_blob(blob(server.url("/x")), PRIVATE_OK)


def test_proxies_of_the_environment_are_not_asked(server, other, monkeypatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, other.url(""))
    server.routes = {"/x": (200, {}, ROWS)}
    assert fetch_blob(blob(server.url("/x")), PRIVATE_OK) == ROWS
    assert other.seen == []


def test_a_gzip_bomb_is_never_unpacked_beyond_the_limit(server) -> None:
    """Packed 32 MB; unpacking a whole chunk of it at once, as HTTP clients do, would take a thousand times its size."""
    packed = gzip.compress(bytes(32 * 2**20))
    unpack = data_url._Gunzip()
    assert len(unpack(packed, 1001)) == 1001
    server.routes = {"/x": (200, {"Content-Encoding": "gzip"}, packed)}
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match="larger than the limit of 1000 bytes"):
            fetch_blob(blob(server.url("/x")), DatasetPolicy(allow_private_hosts=True, max_bytes=1000))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd", "deflate", "compress"])
def test_packings_that_were_not_asked_for_are_refused(server, encoding) -> None:
    server.routes = {"/x": (200, {"Content-Encoding": encoding}, b"...")}
    with pytest.raises(DatasetError, match="only gzip"):
        fetch_blob(blob(server.url("/x")), PRIVATE_OK)


@pytest.mark.parametrize(
    ("packed", "reason"),
    [(gzip.compress(ROWS)[:-4], "breaks off"), (b"no gzip", "no gzip stream"), (b"", "breaks off")],
)
def test_a_damaged_packing_is_the_users_error(server, packed, reason) -> None:
    server.routes = {"/x": (200, {"Content-Encoding": "gzip"}, packed)}
    with pytest.raises(DatasetError, match=reason):
        fetch_blob(blob(server.url("/x")), PRIVATE_OK)


def test_gzip_of_several_members_is_read_whole(server) -> None:
    server.routes = {"/x": (200, {"Content-Encoding": "gzip"}, gzip.compress(ROWS) + gzip.compress(ROWS))}
    assert fetch_blob(blob(server.url("/x")), PRIVATE_OK) == ROWS + ROWS


@pytest.mark.parametrize("slow", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_a_server_that_drips_is_left_when_the_time_is_over(slow) -> None:
    """A byte now and then, in its headers or in its body, keeps every timeout of a single read from running out."""
    ended = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(slow)
            while not ended.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with pytest.raises(DatasetError, match=r"could not be fetched within 0\.5 s"):
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
                fetch_blob(blob(url), DatasetPolicy(allow_private_hosts=True, timeout_s=0.5))
        finally:
            ended.set()
            dripping.join()
