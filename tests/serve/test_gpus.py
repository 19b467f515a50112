"""Assignment of GPUs to workers, without a GPU."""

import shutil

import pytest

from sicot_jax.errors import InputError
from sicot_jax.serve import gpus as gpu_pool
from sicot_jax.serve.gpus import claim_gpu, create_gpu_pool, visible_gpus


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5a")
    monkeypatch.setenv("SICOT_SERVE_GPUS", "")  # so that it is as before afterwards
    monkeypatch.delenv("SICOT_SERVE_GPUS")
    monkeypatch.setattr(gpu_pool, "_held_locks", [])
    monkeypatch.setattr(gpu_pool, "_TIMEOUT_SECONDS", 0.3)
    yield
    for lock in gpu_pool._held_locks:
        lock.close()


def test_each_worker_claims_one_gpu_and_a_new_worker_a_released_one(gpus, monkeypatch):
    assert visible_gpus() == ["3", "GPU-5a"]
    folder = create_gpu_pool(2)
    try:
        assert [claim_gpu(), claim_gpu()] == ["3", "GPU-5a"]
        with pytest.raises(RuntimeError, match="no GPU of 3, GPU-5a is free"):
            claim_gpu()
        gpu_pool._held_locks.pop(0).close()  # as when its process ends
        assert claim_gpu() == "3"
    finally:
        shutil.rmtree(folder)


def test_one_worker_or_no_gpu_shares_nothing(gpus, monkeypatch):
    assert create_gpu_pool(1) is None
    assert claim_gpu() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    assert create_gpu_pool(4) is None
    assert claim_gpu() is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [("0,-1,1", ["0"]), ("NoDevFiles", []), ("1, MIG-a/b-c", ["1", "MIG-a/b-c"])],
)
def test_names_as_cuda_reads_them(gpus, monkeypatch, names, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert visible_gpus() == expected


def test_more_workers_than_gpus_are_refused(gpus):
    with pytest.raises(InputError, match="--workers 3 on 2 GPUs, wanted at most one a GPU"):
        create_gpu_pool(3)
