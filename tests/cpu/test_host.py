"""Functions on the host take MLX arrays as NumPy arrays, and refuse MLX's transformations."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mimo.cpu.host import host, on_host
from mlx_mimo.errors import MimoError


def test_contiguous_float32_is_read_in_place():
    x = mx.array(np.arange(6, dtype=np.float32).reshape(2, 3))
    mx.eval(x)
    assert np.shares_memory(host(x), np.asarray(x))


def test_other_types_and_layouts_become_contiguous_float32():
    x = mx.arange(6).reshape(2, 3)
    for array in (x.astype(mx.bfloat16), x.astype(mx.float32).T):
        found = host(array)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.tolist() == array.tolist()


def test_one_result_or_several_are_returned():
    assert on_host(lambda a, b: a + b)(mx.array([1.0]), mx.array([2.0])).item() == 3.0
    first, second = on_host(lambda a: [a, 2 * a])(mx.array([1.0]))
    assert (first.item(), second.item()) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f, x: mx.grad(lambda x: f(x).sum())(x), "no gradient"),
        (lambda f, x: mx.jvp(f, [x], [x]), "no forward derivative"),
        (lambda f, x: mx.vmap(f)(x), "vmap"),
        (lambda f, x: mx.compile(f)(x), "compile"),
    ],
)
def test_transformations_raise(transform, message):
    with pytest.raises(MimoError, match=message):
        transform(on_host(lambda a: a + 1), mx.ones((2, 2)))
