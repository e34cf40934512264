"""Records read into banks become arrays that MLX computes with, whether read in place or copied."""

import mlx.core as mx
import numpy as np
import pytest
from support.tiny_experts import random_experts, write_expert_file

from mlx_mimo.checkpoint.record import RecordTensor, open_expert_file
from mlx_mimo.errors import MimoError
from mlx_mimo.experts.banks import Banks, host_writable, memory_dtype, slot_bytes

FORMS = ["affine4", "affine3", "mxfp4", "bf16", "f16", "f32"]


@pytest.fixture(params=[True, False], ids=["in place", "copied"])
def in_place(request):
    return request.param


def put(banks, file, expert, slot):
    data = file.path.read_bytes()[file.offset(expert) :]
    for buffer in banks.buffers(slot):
        buffer[:] = data[: buffer.nbytes]
        data = data[buffer.nbytes :]


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_record_read_into_a_slot_becomes_its_tensors(tmp_path, form, widen, in_place):
    tensors = random_experts(form, experts=5)
    file = open_expert_file(write_expert_file(tmp_path, 3, tensors))
    banks = Banks(file.layout, 3, widen, in_place)
    put(banks, file, 4, 2)
    put(banks, file, 1, 0)
    banks.landed([2, 0])
    for tensor in file.layout.tensors:
        bank, wanted = banks.arrays[tensor.name], tensors[tensor.name].astype(memory_dtype(tensor, widen))
        assert same(bank[2], wanted[4])
        assert same(bank[0], wanted[1])
        assert not bank[1].astype(mx.float32).any()


def test_a_slot_can_be_written_again_after_it_was_used(tmp_path, in_place):
    tensors = random_experts(experts=4)
    file = open_expert_file(write_expert_file(tmp_path, 3, tensors))
    banks = Banks(file.layout, 2, True, in_place)
    for expert in range(4):
        put(banks, file, expert, 1)
        banks.landed([1])
        for name, bank in banks.arrays.items():
            wanted = tensors[name][expert].astype(bank.dtype)
            assert mx.array_equal(bank[1] + 0, wanted + 0)


@pytest.mark.parametrize("slots", [2, 9])
def test_resize_keeps_the_slots_that_remain(tmp_path, slots, in_place):
    tensors = random_experts(experts=5)
    file = open_expert_file(write_expert_file(tmp_path, 3, tensors))
    banks = Banks(file.layout, 5, False, in_place)
    for expert in range(5):
        put(banks, file, expert, expert)
    banks.landed(range(5))
    banks.move([(4, 1)])
    banks.resize(slots)
    wanted = [0, 4, 2, 3, 4]
    for name, bank in banks.arrays.items():
        assert bank.shape[0] == slots
        for slot in range(min(slots, 5)):
            assert same(bank[slot], tensors[name][wanted[slot]])
    put(banks, file, 3, slots - 1)
    banks.landed([slots - 1])
    assert all(same(bank[slots - 1], tensors[name][3]) for name, bank in banks.arrays.items())


def test_slot_bytes_equal_the_memory_of_the_banks(tmp_path):
    file = open_expert_file(write_expert_file(tmp_path, 3, random_experts("affine4")))
    for widen in (False, True):
        banks = Banks(file.layout, 7, widen)
        assert sum(bank.nbytes for bank in banks.arrays.values()) == 7 * banks.slot_bytes
    assert slot_bytes(file.layout) == file.layout.nbytes
    assert slot_bytes(file.layout, widen=True) > file.layout.nbytes


def test_the_host_can_write_into_arrays_on_the_cpu():
    if mx.default_device() == mx.cpu:
        assert host_writable()


def test_a_backend_that_returns_copies_is_not_writable(monkeypatch):
    real = np.asarray
    monkeypatch.setattr("mlx_mimo.experts.banks.np.asarray", lambda array: real(array).copy())
    assert not host_writable()


def test_a_backend_without_host_access_is_not_writable(monkeypatch):
    def refuse(array):
        raise RuntimeError("not on this device")

    monkeypatch.setattr("mlx_mimo.experts.banks.np.asarray", refuse)
    assert not host_writable()


def test_banks_reject_tensors_of_an_unknown_type():
    with pytest.raises(MimoError, match="experts of type F8_E4M3"):
        memory_dtype(RecordTensor("gate_proj.weight", "F8_E4M3", (2, 2), 0, 4), False)
