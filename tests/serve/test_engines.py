"""Which engine and which batches are chosen, by times that are given; and the quiet that the times
are measured in.
"""

import threading
import time

import pytest
from helpers.index_maker import PRODUCTS

from sicot_jax.index.storage import layout
from sicot_jax.serve import engines


@pytest.fixture
def chosen(index, monkeypatch):
    """choose() where a call of `name` with `size` photos takes times[name](size) milliseconds."""

    def choose(times, alone=None, **more):
        monkeypatch.setattr(
            engines, "_load_engines", lambda version, kind, threads: {name: name for name in times}
        )

        def milliseconds(engine, shape, size, concurrent):
            assert size == 1 or concurrent == 2, "batches are timed as under load"
            return (
                times[engine](size)
                if concurrent == 2
                else (alone or {}).get(engine, times[engine](1))
            )

        monkeypatch.setattr(engines, "_call_ms", milliseconds)
        return engines.select_engine(layout.current_version(index), **more)

    return choose


def test_the_engine_that_answers_one_photo_soonest(chosen):
    found = chosen({"onnx": lambda size: 20.0 * size, "jax": lambda size: 30.0})
    assert found.kind == "onnx"
    assert found.run == "onnx"
    assert found.num_classes == PRODUCTS


def test_the_engine_is_chosen_by_one_photo_alone_and_its_batches_under_load(chosen):
    """Though the other one's photos come sooner under load."""
    times = {"onnx": lambda size: 30.0 * size, "jax": lambda size: 10.0 * size}
    found = chosen(times, alone={"onnx": 12.0, "jax": 13.0})
    assert found.kind == "onnx"
    assert found.batch_ms[1] == 30.0


def test_batches_as_large_as_they_gain_by(chosen):
    """Halves and quarters of a photo's time up to 8; nothing after that, so that 64 is not tried."""
    found = chosen({"onnx": lambda size: 10.0 if size <= 8 else 1.25 * size}, largest=64)
    assert found.batch_size == 8
    assert list(found.batch_ms) == [1, 2, 4, 8, 16, 32]


def test_a_gain_that_comes_with_the_second_doubling_is_seen(chosen):
    found = chosen(
        {"onnx": lambda size: {1: 10.0, 2: 20.0, 4: 30.0, 8: 60.0, 16: 120.0}[size]}, largest=64
    )
    assert found.batch_size == 4
    assert list(found.batch_ms) == [1, 2, 4, 8, 16]


def test_no_batch_is_larger_than_allowed(chosen):
    for largest in (4, 7):
        found = chosen({"onnx": lambda size: 10.0}, largest=largest)
        assert found.batch_size == 4
        assert list(found.batch_ms) == [1, 2, 4]


def test_calls_concurrent_share_their_time():
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


def test_numpys_threads_are_held(index):
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
        load_serving_model(ServiceSettings(index=str(index), engine="jax", largest_batch=1))
        assert {
            pool["num_threads"]
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "blas"
        } == {1}
