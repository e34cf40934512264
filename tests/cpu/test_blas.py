"""BLAS gets one thread for little work, the kernels' number for more, and afterwards what it had."""

import pytest

pytest.importorskip("numba")
threadpoolctl = pytest.importorskip("threadpoolctl")

from mlx_mimo.cpu import blas, kernels  # noqa: E402


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def two_threads(monkeypatch):
    if not blas.limitable():
        pytest.skip("NumPy's BLAS is none that threadpoolctl knows: there is nothing to limit")
    monkeypatch.setattr(kernels, "_threads", 2)
    with blas._libraries().limit(limits=3):
        yield


def test_little_work_is_for_one_thread(two_threads):
    with blas.limited(1000):
        assert blas_threads() == {1}
    assert blas_threads() == {3}


def test_much_work_is_for_as_many_as_the_kernels_use(two_threads):
    with blas.limited(10**9):
        assert blas_threads() == {2}
    assert blas_threads() == {3}


def test_a_failure_within_leaves_no_limit_behind(two_threads):
    with pytest.raises(ZeroDivisionError), blas.limited(1000):
        _ = 1 / 0
    assert blas_threads() == {3}


def test_with_a_library_that_nobody_can_limit_nothing_is_done(monkeypatch):
    """As with Accelerate, which NumPy's wheels for macOS bring: threadpoolctl finds no BLAS."""
    found = blas_threads()
    monkeypatch.setattr(threadpoolctl.ThreadpoolController, "_load_libraries", lambda self: None)
    blas._libraries.cache_clear()
    try:
        assert blas.limitable() == []
        with blas.limited(1000):
            monkeypatch.undo()
            assert blas_threads() == found
    finally:
        blas._libraries.cache_clear()
