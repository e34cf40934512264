"""Records are read into their buffers whatever preadv returns; a failed read names its expert and spoils no other."""

import os
import threading
import time

import numpy as np
import pytest
from support.patience import DEADLINE, Clock, wait_until
from support.tiny_experts import random_experts, write_expert_file

from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.errors import MimoError
from mlx_mimo.experts import reader as reader_module
from mlx_mimo.experts.reader import MEMORY, ExpertReader, ReadRequest


@pytest.fixture
def files(tmp_path):
    for layer in (1, 4):
        write_expert_file(tmp_path, layer, random_experts(seed=layer, experts=6))
    return expert_files(tmp_path)


def record(file, expert) -> bytes:
    data = file.path.read_bytes()
    return data[file.offset(expert) : file.offset(expert) + file.layout.nbytes]


def scattered(file) -> list[np.ndarray]:
    return [np.zeros(tensor.nbytes, dtype=np.uint8) for tensor in file.layout.tensors]


def everything(files):
    """One request for each record, and where each goes."""
    targets = {(layer, e): scattered(file) for layer, file in files.items() for e in range(file.num_experts)}
    requests = [ReadRequest(layer, e, [memoryview(b) for b in buffers]) for (layer, e), buffers in targets.items()]
    return requests, targets


def assert_all_right(files, targets):
    for (layer, expert), buffers in targets.items():
        assert b"".join(b.tobytes() for b in buffers) == record(files[layer], expert)


@pytest.fixture(params=["threads", "inline"])
def big(request, monkeypatch):
    """Tiny batches are read by the caller; this sends them to the threads."""
    if request.param == "threads":
        monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)


@pytest.mark.usefixtures("big")
def test_every_record_is_read_with_one_system_call(files):
    reader = ExpertReader(files, threads=3)
    requests, targets = everything(files)
    reader.read(requests)
    assert_all_right(files, targets)
    assert reader.calls == len(requests)
    assert reader.bytes_read == sum(file.layout.nbytes * file.num_experts for file in files.values())
    assert reader.seconds > 0
    assert reader.idle
    reader.close()


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_short_reads_are_continued(files, limit):
    def short(fd, views, offset):
        return os.preadv(fd, [views[0][:limit]], offset)

    reader = ExpertReader(files, preadv=short)
    file, buffers = files[4], scattered(files[4])
    reader.read([ReadRequest(4, 5, [memoryview(b) for b in buffers])])
    assert_all_right(files, {(4, 5): buffers})
    assert reader.calls >= file.layout.nbytes // limit
    reader.close()


@pytest.mark.usefixtures("big")
def test_an_interrupted_system_call_is_repeated(files):
    calls = []

    def interrupted(fd, views, offset):
        calls.append(offset)
        if len(calls) % 2:
            raise InterruptedError
        return os.preadv(fd, views, offset)

    reader = ExpertReader(files, threads=1, preadv=interrupted)
    requests, targets = everything(files)
    reader.read(requests)
    assert_all_right(files, targets)
    reader.close()


@pytest.mark.usefixtures("big")
def test_an_error_names_file_layer_and_expert_and_the_others_arrive(files):
    lost = files[4].offset(2)

    def failing(fd, views, offset):
        if offset == lost and os.fstat(fd).st_ino == files[4].path.stat().st_ino:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, views, offset)

    reader = ExpertReader(files, threads=2, preadv=failing)
    requests, targets = everything(files)
    batch = reader.submit(requests)
    errors = batch.wait()
    failed = [(request.layer, request.expert) for request, error in zip(requests, errors) if error]
    assert failed == [(4, 2)]
    message = str(next(error for error in errors if error))
    assert message.startswith("model-experts-4.safetensors: layer 4 expert 2")
    assert "Input/output error" in message
    del targets[4, 2]
    assert_all_right(files, targets)
    with pytest.raises(MimoError, match="layer 4 expert 2"):
        reader.read(requests)
    reader.close()


@pytest.mark.usefixtures("big")
def test_an_unexpected_error_in_a_thread_reaches_the_caller(files):
    def broken(fd, views, offset):
        raise ZeroDivisionError

    reader = ExpertReader(files, preadv=broken)
    with pytest.raises(MimoError, match="ZeroDivisionError"):
        reader.read(everything(files)[0])
    reader.close()


def test_a_file_cut_short_while_open_is_an_error(files):
    reader = ExpertReader(files)
    file = files[1]
    os.truncate(file.path, file.offset(3) + 10)
    with pytest.raises(MimoError, match=r"model-experts-1.*layer 1 expert 3 ends .* early"):
        reader.read([ReadRequest(1, 3, [memoryview(b) for b in scattered(file)])])
    buffers = scattered(file)
    reader.read([ReadRequest(1, 2, [memoryview(b) for b in buffers])])
    assert_all_right(files, {(1, 2): buffers})
    reader.close()


def test_a_file_removed_while_open_is_still_read(files):
    wanted = record(files[1], 0)
    reader = ExpertReader(files)
    files[1].path.unlink()
    buffers = scattered(files[1])
    reader.read([ReadRequest(1, 0, [memoryview(b) for b in buffers])])
    assert b"".join(b.tobytes() for b in buffers) == wanted
    reader.close()


def test_a_missing_or_short_file_is_refused_at_start(files):
    os.truncate(files[4].path, files[4].offset(5))
    with pytest.raises(MimoError, match=r"model-experts-4.safetensors: [\d,]+ bytes expected, [\d,]+ found"):
        ExpertReader(files)
    files[4].path.unlink()
    with pytest.raises(MimoError, match=r"model-experts-4.safetensors: cannot be opened"):
        ExpertReader(files)


def test_buffers_of_another_size_are_refused(files):
    reader = ExpertReader(files)
    with pytest.raises(MimoError, match="buffers hold 8"):
        reader.read([ReadRequest(1, 0, [memoryview(bytearray(8))])])
    reader.close()


def test_submit_does_not_wait_and_no_more_than_the_threads_run(files, monkeypatch):
    monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)
    gate, running, most = threading.Event(), [], []

    def slow(fd, views, offset):
        running.append(1)
        most.append(len(running))
        gate.wait(DEADLINE)
        running.pop()
        return os.preadv(fd, views, offset)

    reader = ExpertReader(files, threads=3, preadv=slow)
    requests, targets = everything(files)
    batch = reader.submit(requests)
    assert wait_until(lambda: len(most) >= 3)
    assert not batch.done
    assert not reader.idle
    gate.set()
    assert batch.wait() == [None] * len(requests)
    assert max(most) == 3
    assert_all_right(files, targets)
    reader.close()


def test_it_knows_whether_its_reads_wait_for_the_disk(files, monkeypatch):
    clock = Clock()

    def slow(fd, views, offset):
        clock.sleep(0.03)
        return os.preadv(fd, views, offset)

    monkeypatch.setattr(reader_module, "time", clock)
    reader = ExpertReader(files, threads=3, preadv=slow)
    requests, _ = everything(files)
    reader.read(requests)  # inline: the caller cannot do anything else
    assert reader.waiting == 0
    monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)
    for _ in range(12):
        reader.read(requests[:2])
    waiting = reader.waiting
    assert waiting == pytest.approx(1 - (1 - MEMORY) ** 12)
    monkeypatch.undo()
    reader.read(requests[:2])
    assert reader.waiting == waiting * (1 - MEMORY)
    reader.close()


def test_reads_that_keep_the_processor_busy_do_not_wait(files, monkeypatch):
    monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)
    clock = iter(range(0, 1000, 5))  # each read takes five seconds of its thread, and at least as long
    monkeypatch.setattr("mlx_mimo.experts.reader.time.thread_time", lambda: next(clock))
    reader = ExpertReader(files, threads=1)
    reader.waiting = 1.0
    reader.read(everything(files)[0][:4])
    assert reader.waiting == 1 - MEMORY
    reader.close()


def test_nothing_is_read_after_close(files):
    reader = ExpertReader(files)
    reader.close()
    with pytest.raises(MimoError, match="after the reader was closed"):
        reader.read(everything(files)[0])


def test_an_empty_batch_is_done(files):
    reader = ExpertReader(files)
    assert reader.submit([]).wait() == []
    reader.close()


def test_a_thread_that_cannot_start_leaves_the_reader_usable(files, monkeypatch):
    monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)
    reader = ExpertReader(files, threads=3)
    requests, targets = everything(files)
    start = threading.Thread.start

    def failing(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="start new thread"):
        reader.read(requests)
    monkeypatch.setattr(threading.Thread, "start", start)
    reader.drain()
    reader.read(requests)
    assert_all_right(files, targets)
    reader.close()


def test_an_interrupt_during_a_read_by_the_caller_is_raised(files):
    calls = []

    def interrupting(fd, views, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return os.preadv(fd, views, offset)

    reader = ExpertReader(files, preadv=interrupting)
    requests, targets = everything(files)
    with pytest.raises(KeyboardInterrupt):
        reader.read(requests)
    assert reader.idle
    reader.read(requests)
    assert_all_right(files, targets)


def test_drain_waits_for_a_batch_that_nobody_has(files, monkeypatch):
    monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)

    def slow(fd, views, offset):
        time.sleep(0.02)
        return os.preadv(fd, views, offset)

    reader = ExpertReader(files, threads=2, preadv=slow)
    requests, targets = everything(files)
    reader.submit(requests)
    reader.drain()
    assert_all_right(files, targets)
    reader.close()
