from __future__ import annotations

import httpx
import pytest

from arkor_ray.cli.file_server import served


@pytest.mark.parametrize("service", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_one_file_and_nothing_else_is_served_while_the_block_runs(tmp_path, service):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "grüße"}\n', encoding="utf-8")
    (tmp_path / "secret").write_text("no")
    with served(file, to=service) as url:
        assert httpx.get(url).content == file.read_bytes()
        assert httpx.get(url.replace("rows.jsonl", "secret")).status_code == 404
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
