"""What goes to the Hub, as a stand-in for it sees it; the client is huggingface_hub's own, in a process of `jobs/export.py`."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from arkor_ray.errors import AuthenticationError, ConflictError, InvalidRequestError, ServiceUnavailableError
from arkor_ray.training import hub

ROOT = Path(__file__).parents[2]


class Hub(ThreadingHTTPServer):
    """One repository: `files` are in it; `status` is what a commit is answered with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        tree = [
            {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
            for path, data in self.server.files.items()
        ]
        self._answer(200, tree if "/tree/" in self.path else {})

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.url}/owner/triage"})
        elif "/preupload/" in self.path:
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer(200, {"files": [{"path": file["path"], **plain} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path and self.server.status == 200:
            for value in map(json.loads, body.splitlines()):
                if value["key"] == "file":
                    self.server.files[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
            url = f"{self.server.url}/owner/triage/commit/1"
            self._answer(200, {"commitUrl": url, "commitOid": "1", "success": True, "hookOutput": ""})
        elif "/commit/" in self.path:
            self._answer(self.server.status, {"error": "You may not write here"})
        else:  # the card's validation
            self._answer(200, {"errors": [], "warnings": []})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def standin() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What its weights are does not matter here."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path


def export(hub: Hub, adapter: Path) -> subprocess.CompletedProcess:
    """`jobs/export.py` with a Hub to push to."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / "export.py", "--adapter", adapter, "--push-to-hub", "owner/triage"]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=120)


def test_an_adapter_is_pushed_as_it_is_with_a_card(standin, adapter):
    run = export(standin, adapter)
    assert (run.returncode, run.stdout) == (0, f"it is at {standin.url}/owner/triage\n"), run.stderr
    [created] = standin.created
    assert (created["name"], created["organization"], created["visibility"]) == ("triage", "owner", "private")
    assert standin.tokens == {"Bearer hf_secret"}
    card = standin.files.pop("README.md").decode()
    assert "library_name: peft\n" in card and "base_model: owner/base\n" in card
    wanted = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert standin.files == wanted


@pytest.fixture
def here(standin, monkeypatch) -> Hub:
    """The stand-in for this process as well."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", standin.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return standin


def push(folder: Path) -> str:
    return hub.push_folder(
        folder,
        "owner/triage",
        base_model="/models/base",
        merged=True,
        token="hf_secret",
        private=False,
        notes=["Careful."],
    )


def test_the_card_of_a_merged_model_has_its_notes_and_no_path_of_a_machine(here, adapter):
    assert push(adapter) == f"{here.url}/owner/triage"
    card = here.files["README.md"].decode()
    assert "library_name: transformers\n" in card and "Careful." in card
    assert "base_model" not in card and "/models" not in card
    assert here.created[0]["visibility"] == "public"


def test_a_repository_with_files_is_not_touched(here, adapter):
    here.files["model.safetensors"] = b"theirs"
    with pytest.raises(ConflictError, match=r"has files already, such as model\.safetensors; name a new repository"):
        push(adapter)
    assert here.files == {"model.safetensors": b"theirs"}


@pytest.mark.parametrize(
    ("status", "error", "sentence"),
    [
        (403, AuthenticationError, "does not let this HF_TOKEN write to owner/triage"),
        (400, InvalidRequestError, "The Hub refuses owner/triage"),
    ],
)
def test_what_the_hub_refuses_is_told_without_the_token(here, adapter, status, error, sentence):
    here.status = status
    with pytest.raises(error, match=sentence) as raised:
        push(adapter)
    assert "hf_secret" not in str(raised.value)


def test_a_hub_that_refuses_connections_is_told_as_away(here, adapter):
    here.server_close()
    with pytest.raises(ServiceUnavailableError, match="The Hub cannot be reached for owner/triage: "):
        push(adapter)


def test_what_could_not_be_pushed_is_told_before_the_work():
    with pytest.raises(InvalidRequestError, match="must be owner/name"):
        hub.check("triage", "token")
    with pytest.raises(AuthenticationError, match="set HF_TOKEN"):
        hub.check("owner/triage", None)
