"""Selection of engine and batch size from given times, and how times are measured."""

import shutil
import threading
import time

import pytest
from helpers.small_index import PRODUCTS

from sicot_jax.errors import InputError
from sicot_jax.index.storage import layout
from sicot_jax.recognizer import DeviceEngine
from sicot_jax.serve import engines
from sicot_jax.serve import engines as gpu_pool
from sicot_jax.serve.engines import claim_gpu, create_gpu_pool, visible_gpus


@pytest.fixture
def select(index, monkeypatch):
    """choose() where a call of `name` with `size` photos takes times[name](size) milliseconds."""

    def select_by_times(times, alone=None, providers=None, **more):
        monkeypatch.setattr(
            engines,
            "_load_engines",
            lambda version, kind, threads: {
                name: DeviceEngine(name, *(providers or {}).get(name, ("cpu",))) for name in times
            },
        )

        def milliseconds(engine, shape, size, concurrent):
            assert size == 1 or concurrent == 2, "batches are timed as under load"
            name = engine.run
            return times[name](size) if concurrent == 2 else (alone or {}).get(name, times[name](1))

        monkeypatch.setattr(engines, "_call_ms", milliseconds)
        return engines.select_engine(layout.current_version(index), **more)

    return select_by_times


def test_the_engine_that_answers_one_photo_soonest(select):
    selected = select({"onnx": lambda size: 20.0 * size, "jax": lambda size: 30.0})
    assert selected.kind == "onnx"
    assert selected.run.run == "onnx"
    assert selected.num_classes == PRODUCTS


FALLEN_BACK = "CPUExecutionProvider", "ONNX Runtime could not start CUDAExecutionProvider"


def test_an_engine_on_the_cpu_is_refused_where_a_gpu_is_required(select, caplog):
    times = {"onnx": lambda size: 1.0 * size, "jax": lambda size: 30.0}
    providers = {"onnx": FALLEN_BACK, "jax": ("gpu",)}
    assert select(times, providers=providers).provider == "CPUExecutionProvider"
    assert "could not start CUDAExecutionProvider" in caplog.text
    assert select(times, providers=providers, require_gpu=True).provider == "gpu"
    with pytest.raises(
        InputError, match=r"no engine.*onnx on CPUExecutionProvider, jax on cpu; .*not start CUDA"
    ):
        select(times, providers={"onnx": FALLEN_BACK}, require_gpu=True)
    with pytest.raises(InputError, match=r"onnx on cpu, jax on cpu; install onnxruntime-gpu or"):
        select(times, require_gpu=True)


def test_the_engine_is_chosen_by_one_photo_alone_and_its_batches_under_load(select):
    """Though the other one's photos come sooner under load."""
    times = {"onnx": lambda size: 30.0 * size, "jax": lambda size: 10.0 * size}
    selected = select(times, alone={"onnx": 12.0, "jax": 13.0})
    assert selected.kind == "onnx"
    assert selected.batch_ms[1] == 30.0


def test_batches_grow_while_they_gain(select):
    """The time per photo falls up to 8 and not after that, so that 64 is not tried."""
    selected = select({"onnx": lambda size: 10.0 if size <= 8 else 1.25 * size}, largest=64)
    assert selected.batch_size == 8
    assert list(selected.batch_ms) == [1, 2, 4, 8, 16, 32]


def test_a_gain_that_comes_with_the_second_doubling_is_seen(select):
    selected = select(
        {"onnx": lambda size: {1: 10.0, 2: 20.0, 4: 30.0, 8: 60.0, 16: 120.0}[size]}, largest=64
    )
    assert selected.batch_size == 4
    assert list(selected.batch_ms) == [1, 2, 4, 8, 16]


def test_no_batch_is_larger_than_allowed(select):
    for largest in (4, 7):
        selected = select({"onnx": lambda size: 10.0}, largest=largest)
        assert selected.batch_size == 4
        assert list(selected.batch_ms) == [1, 2, 4]


def test_concurrent_calls_share_their_time():
    """Two of 40 ms each, together: 20 a call. The first one, which compiles, is alone."""
    running = []

    def engine(photos):
        running.append(threading.current_thread())
        time.sleep(0.04)

    assert 20 <= engines._call_ms(engine, (2, 2, 3), 4, concurrent=2) < 40
    assert running[0] is threading.main_thread()
    assert threading.main_thread() not in running[1:]


def test_an_engine_that_fails_is_not_timed():
    def engine(photos):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        engines._call_ms(engine, (2, 2, 3), 4, concurrent=2)


def test_blas_threads_are_limited(index):
    """They would spin on the cores of the engine after every query."""
    pytest.importorskip("fastapi", reason="the service needs its extra")
    import threadpoolctl

    from sicot_jax.serve.model_manager import load_serving_model
    from sicot_jax.serve.settings import ServiceSettings

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert {
            pool["num_threads"]
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "blas"
        } == {2}
        load_serving_model(ServiceSettings(index=str(index), engine="jax", max_batch=1))
        assert {
            pool["num_threads"]
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "blas"
        } == {1}


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
