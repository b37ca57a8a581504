from __future__ import annotations

import json
from pathlib import Path

import pytest

from arkor_ray.errors import AdapterError
from arkor_ray.schemas.checkpoint import CheckpointManifest
from arkor_ray.storage import layout
from arkor_ray.storage.adapter_files import AdapterFiles, read_adapter
from arkor_ray.storage.local import LocalStore

CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 4, "lora_alpha": 8}


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """A folder as PEFT writes it; what the weights are does not matter here."""
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def store_as(peft: Path, root: Path, adapter_id: str) -> CheckpointManifest:
    """Puts the folder into storage as the adapter of a job."""
    files = read_adapter(str(peft))
    job_id, step = layout.parse_adapter_id(adapter_id)
    first = files.commit(LocalStore(root.parent / "scratch"), "/models/base", "nf4")
    manifest = first.model_copy(
        update={"adapter_id": adapter_id, "job_id": job_id, "step": step or 9, "final": step is None}
    )
    return AdapterFiles("", files.files, "", manifest).commit(LocalStore(root), "/models/base", "nf4")


def test_a_peft_folder_names_its_base(peft):
    found = read_adapter(str(peft))
    assert (found.base_model, found.base_precision, found.manifest) == ("owner/base", None, None)
    assert set(found.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert read_adapter(peft.as_uri()).sha256 == found.sha256
    assert not found.has_tokenizer


@pytest.mark.parametrize(("base", "reference"), [("owner/base", "owner/base@v1"), ("/models/a", "/models/a")])
def test_a_revision_belongs_to_bases_of_the_hub(peft, base, reference):
    (peft / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": base, "revision": "v1"}))
    assert read_adapter(str(peft)).base_model == reference


def test_an_adapter_in_storage_comes_with_its_manifest(peft, tmp_path):
    root = tmp_path / "runs"
    manifest = store_as(peft, root, "job-step-4")
    found = read_adapter(str(root / "adapters" / "job-step-4"))
    assert found.manifest and found.manifest.sha256 == manifest.sha256
    assert (found.adapter_id, found.base_model, found.base_precision) == ("job-step-4", "/models/base", "nf4")


def test_a_jobs_output_is_its_only_final_adapter(peft, tmp_path):
    root = tmp_path / "runs"
    store_as(peft, root, "job-step-4")
    with pytest.raises(AdapterError, match="has 0 final adapters; name one of job-step-4"):
        read_adapter(str(root))
    store_as(peft, root, "job-final")
    assert read_adapter(str(root)).adapter_id == "job-final"
    store_as(peft, root, "other-final")
    with pytest.raises(AdapterError, match="has 2 final adapters"):
        read_adapter(str(root))


def test_bytes_that_are_not_the_manifests_are_refused(peft, tmp_path):
    root = tmp_path / "runs"
    store_as(peft, root, "job-final")
    (root / "adapters" / "job-final" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is not what its manifest tells"):
        read_adapter(str(root))


def test_what_is_no_adapter_is_told(peft, tmp_path):
    with pytest.raises(AdapterError, match="There is no adapter"):
        read_adapter(str(tmp_path / "none"))
    (peft / "adapter_config.json").write_text(json.dumps({**CONFIG, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(AdapterError, match="PREFIX_TUNING"):
        read_adapter(str(peft))
    (peft / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="base_model_name_or_path"):
        read_adapter(str(peft))
    (peft / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        read_adapter(str(peft))
