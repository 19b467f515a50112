"""Which GPU a worker has; none is needed to tell."""

import shutil

import pytest

from sicot_jax.errors import InputError
from sicot_jax.serve import gpus as devices


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5a")
    monkeypatch.setenv("SICOT_SERVE_DEVICES", "")  # so that it is as before afterwards
    monkeypatch.delenv("SICOT_SERVE_DEVICES")
    monkeypatch.setattr(devices, "_held", [])
    monkeypatch.setattr(devices, "_SECONDS", 0.3)
    yield
    for lock in devices._held:
        lock.close()


def test_each_worker_has_its_own_and_a_new_one_that_of_the_old(gpus, monkeypatch):
    assert devices.visible() == ["3", "GPU-5a"]
    folder = devices.share_out(2)
    try:
        assert [devices.take(), devices.take()] == ["3", "GPU-5a"]
        with pytest.raises(RuntimeError, match="no GPU of 3, GPU-5a is free"):
            devices.take()
        devices._held.pop(0).close()  # as when its process ends
        assert devices.take() == "3"
    finally:
        shutil.rmtree(folder)


def test_one_worker_or_no_gpu_shares_nothing(gpus, monkeypatch):
    assert devices.share_out(1) is None
    assert devices.take() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.visible() == []
    assert devices.share_out(4) is None
    assert devices.take() is None


@pytest.mark.parametrize(
    ("given", "found"),
    [("0,-1,1", ["0"]), ("NoDevFiles", []), ("1, MIG-a/b-c", ["1", "MIG-a/b-c"])],
)
def test_names_as_cuda_reads_them(gpus, monkeypatch, given, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert devices.visible() == found


def test_more_workers_than_gpus_are_refused(gpus):
    with pytest.raises(InputError, match="--workers 3 on 2 GPUs, wanted at most one a GPU"):
        devices.share_out(3)
