from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import make_base_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("base"))
