"""After an interrupt or a read that could not be started, the table names no expert whose bytes were not read."""

import linecache
import sys
from contextlib import closing, nullcontext

import numpy as np
import pytest
from support.pool_cases import assert_consistent, need, serve
from support.tiny_experts import EXPERTS

from mlx_mimo.experts import banks as banks_module
from mlx_mimo.experts import pool as pool_module
from mlx_mimo.experts import reader as reader_module
from mlx_mimo.experts import residents as residents_module

pytestmark = pytest.mark.usefixtures("where_reads_run")


def test_an_interrupt_while_waiting_leaves_the_pool_consistent(make, monkeypatch):
    pool = make(8)
    submit = pool.reader.submit

    def interrupting(requests, background=False):
        batch = submit(requests, background)
        wait = batch.wait
        calls = []

        def once():
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return wait()

        batch.wait = once
        return batch

    monkeypatch.setattr(pool.reader, "submit", interrupting)
    with pytest.raises(KeyboardInterrupt):
        serve(pool, need(1, 0, 1, 2))
    assert_consistent(pool)
    monkeypatch.setattr(pool.reader, "submit", submit)
    serve(pool, need(1, 0, 1, 2))


def interrupted(nth: int, work) -> bool:
    """Runs `work` with a KeyboardInterrupt at the nth line of the pool's code that this thread comes to.

    Lines that begin `with` are left out: they are traced again before the lock is released, where no signal is handled.
    """
    lines = 0

    def each(frame, event, _):
        nonlocal lines
        if event != "line" or linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with"):
            return each
        lines += 1
        if lines == nth:
            sys.settrace(None)
            raise KeyboardInterrupt
        return each

    sys.settrace(lambda frame, *_: each if frame.f_code.co_filename in POOL_CODE else None)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return lines >= nth  # preload does not raise the interrupt


POOL_CODE = {module.__file__ for module in (pool_module, reader_module, residents_module, banks_module)}


@pytest.mark.parametrize(
    ("what", "in_place"),
    [
        ("together", True),
        ("waves", False),
        ("guess", True),
        ("preload", False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("together", False), ("waves", True), ("guess", False), ("preload", True)]
        ),
    ],
)
def test_an_interrupt_at_any_line_leaves_the_next_call_right(make, what, in_place):
    pool, rng = make(7, in_place=in_place), np.random.default_rng(0)
    for _ in range(3):
        serve(pool, need(1, *range(6)))

    def work():
        experts = rng.permutation(EXPERTS)[:5]
        if what == "preload":
            pool.preload()
        elif what == "guess":
            with closing(pool.serve(need(1, *experts[:2]), hold=True)) as steps:
                for _ in steps:
                    pool.guess(2, experts[2:])
        else:
            serve(pool, need(1, *experts, together=what == "together"))

    nth = 1
    while interrupted(nth, work):
        serve(pool, need(1 + nth % 2, *rng.permutation(EXPERTS)[:4]))
        pool.reader.drain()
        serve(pool, need(1, 0))
        assert_consistent(pool)
        if what == "preload":
            pool.residents.forget()
        nth += 1
    assert nth > 20, "lines interrupted"


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("what", ["serve", "guess", "preload"])
def test_reads_that_cannot_be_started_leave_no_expert_in_the_table(make, monkeypatch, error, late, what):
    pool = make(8)
    serve(pool, need(1, 0, 1))
    pool.residents.uses[[3, 4]] = 1
    submit = pool.reader.submit

    def failing(requests, background=False):
        if late:
            submit(requests, background)
        raise error

    monkeypatch.setattr(pool.reader, "submit", failing)
    with pytest.raises(type(error)) if (what, type(error)) != ("preload", KeyboardInterrupt) else nullcontext():
        if what == "serve":
            serve(pool, need(1, 1, 2, 3))
        elif what == "guess":
            pool.guess(2, np.array([3, 4]))
        else:
            pool.preload()
    monkeypatch.setattr(pool.reader, "submit", submit)
    serve(pool, need(1, 2, 3, 4))
    serve(pool, need(2, 3, 4))
    assert_consistent(pool)
