"""The doctor asks the nodes of a real Ray."""

from __future__ import annotations

import pytest
import ray

from arkor_ray.doctor.findings import Finding, Status
from arkor_ray.doctor.ray_cluster import probe
from arkor_ray.settings import Settings

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings.load(data_dir=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def address(settings: Settings):
    """A Ray whose processes have these settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.environment().items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def ask(address: str, settings: Settings) -> dict[str, Finding]:
    return {finding.name.split()[0]: finding for finding in probe(address, settings.environment(), limit_s=180)}


def test_a_node_with_the_same_settings_is_well(address: str, settings: Settings):
    found = ask(address, settings)
    assert (found["ray"].status, "1 nodes, 1 CPUs" in found["ray"].found) == (Status.OK, True), found
    assert (found["node"].status, found["clock"].status) == (Status.OK, Status.OK)
    assert not (settings.data_dir / "arkor.db").exists(), "looking changes nothing"


def test_a_node_with_other_settings_is_told_by_the_variables_alone(address: str, settings: Settings):
    url = "postgresql://arkor:hunter-two@database/arkor"
    found = ask(address, settings.model_copy(update={"database_url": url}))
    assert (found["node"].status, "ARKOR_RAY_DATABASE_URL" in found["node"].found) == (Status.FAIL, True)
    assert "hunter-two" not in repr(found)
