"""A process that was given a GPU works on it, or says why it cannot; it does not quietly take the CPU."""

from __future__ import annotations

import pytest
import ray
import torch

from arkor_ray.errors import ModelError, TrainingError
from arkor_ray.gpus import unusable_gpu
from arkor_ray.serving.engine.base_model import load_base
from arkor_ray.training import rendezvous
from arkor_ray.training.workers import join_workers


@pytest.fixture
def given(monkeypatch):
    """What Ray gave this process: call it with the GPUs' ids, torch's CUDA, and whether torch sees one."""

    def give(ids: list[int], *, cuda: str | None = None, seen: bool = False) -> None:
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: ids)
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)

    return give


def test_a_torch_for_cpus_is_told_with_the_build_that_has_cuda(given):
    given([0])
    fault = unusable_gpu()
    assert "a GPU of node 10.0.0.7, but torch" in fault and "the build for CPUs" in fault
    assert "--build-arg TORCH_INDEX=" in fault


def test_a_torch_with_cuda_that_finds_no_gpu_is_told_with_where_to_look(given):
    given([0], cuda="12.8")
    assert "finds none there: see whether `nvidia-smi` does" in unusable_gpu()


def test_without_a_gpu_of_rays_or_with_one_that_works_nothing_is_said(given):
    given([])
    assert unusable_gpu() is None
    given([0], cuda="12.8", seen=True)
    assert unusable_gpu() is None


def test_outside_of_ray_there_is_nothing_to_ask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not ray.is_initialized() and unusable_gpu() is None


def test_neither_training_nor_serving_takes_the_cpu_instead(given, tmp_path):
    given([0])
    with pytest.raises(TrainingError, match="the build for CPUs"):
        join_workers()
    with pytest.raises(TrainingError, match="the build for CPUs"):
        rendezvous._join("nccl", "127.0.0.1", 1, 0, 1, 1)
    with pytest.raises(ModelError, match=r"house cannot be served: Ray gave a GPU .* the build for CPUs"):
        load_base(str(tmp_path), "bf16", name="house")
