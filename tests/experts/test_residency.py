"""`attach` and `Residency`: outputs do not depend on what is resident; profiles, traces, resizing, warnings, errors."""

import json
import threading
import warnings
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from support.tiny_experts import EXPERTS, TOP_K, random_experts, tiny_model, write_expert_file

from mlx_mimo.errors import FormatError, MimoError
from mlx_mimo.experts import residency as residency_module
from mlx_mimo.experts.layer import ResidentSwitchGLU, StreamedSwitchGLU
from mlx_mimo.experts.residency import ResidencyWarning
from mlx_mimo.experts.trace import read_trace
from mlx_mimo.runtime.compute import choose_compute

attach = partial(residency_module.attach, compute_for=choose_compute)

LAYERS = 3
ALL, DEMAND = LAYERS * EXPERTS, LAYERS * TOP_K
LENGTHS = [1, 1, 3, 40, 1, 17, 2, 1]


def inputs():
    return [mx.random.normal((1, n, 64), key=mx.random.key(i)) for i, n in enumerate(LENGTHS)]


def outputs(model) -> list[mx.array]:
    result = [model(x) for x in inputs()]
    mx.eval(result)
    return result


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(path)
    return path


@pytest.fixture(scope="module")
def stock(directory):
    """The outputs of the model with mlx-lm's own layers."""
    return outputs(tiny_model(directory))


@pytest.fixture(scope="module", params=["kernels", "mlx"])
def strategy(request):
    """Whether the CPU kernels or MLX compute the experts."""
    if request.param == "kernels":
        pytest.importorskip("numba")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_MIMO_CPU_KERNELS", str(int(request.param == "kernels")))
        yield request.param


@pytest.fixture(scope="module")
def truth(directory, strategy):
    """The outputs of the model with every expert resident."""
    model = tiny_model(directory)
    attach(model, directory).close()
    return outputs(model)


def test_all_resident_equals_mlx_lm(truth, stock, strategy):
    for found, wanted in zip(truth, stock, strict=True):
        assert mx.allclose(found, wanted, atol=1e-5) if strategy == "kernels" else mx.array_equal(found, wanted)


@pytest.fixture
def attached(directory, strategy):
    opened = []

    def open_model(**options):
        model = tiny_model(directory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResidencyWarning)
            residency = attach(model, directory, **options)
        opened.append(residency)
        if mx.default_device() == mx.cpu:
            kind = "KernelCompute" if strategy == "kernels" else "MLXCompute"
            assert type(model.model.layers[1].mlp.switch_mlp.compute).__name__ == kind
        return model, residency

    yield open_model
    for residency in opened:
        residency.close()


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert mx.array_equal(a, b)


RESIDENCIES = [None, ALL // 2, ALL // 4, ALL // 8, DEMAND, DEMAND // 2, 1]
WAYS = [("lfu", False), ("lru", True), ("lfu", True), ("lru", False)]  # policy, look-ahead


@pytest.mark.parametrize(
    ("slots", "policy", "lookahead"),
    [
        pytest.param(slots, *WAYS[(turn + way) % 4], marks=[pytest.mark.long] if way else [])
        for turn, slots in enumerate(RESIDENCIES)
        for way in range(4)
    ],
)
def test_outputs_do_not_depend_on_what_is_resident(attached, truth, slots, policy, lookahead):
    model, residency = attached(slots=slots, policy=policy, lookahead=lookahead)
    assert_same(outputs(model), truth)
    counters = residency.counters
    if slots is not None:
        assert counters.slots == slots
        record = residency.pools[0].layout.nbytes
        assert counters.bytes_read == (counters.misses + counters.lookahead_reads) * record
        assert 0 <= counters.hit_rate <= 1
        assert counters.policy == policy


@pytest.mark.parametrize("hits_first", [False, True, None])
@pytest.mark.parametrize("slots", [ALL // 2, DEMAND])
def test_outputs_do_not_depend_on_computing_hits_first(attached, truth, monkeypatch, slots, hits_first):
    monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)
    model, residency = attached(slots=slots, hits_first=hits_first)
    layers = {residency.modules[layer].hits_first for layer in residency.modules}
    assert layers == ({None} if hits_first is None and mx.default_device() == mx.Device(mx.cpu) else {bool(hits_first)})
    residency.reader._note_waiting = lambda share: None
    residency.reader.waiting = 0.9
    assert_same(outputs(model), truth)


def test_outputs_are_right_on_a_backend_that_copies(attached, truth):
    for slots in (None, 9):
        model, _ = attached(slots=slots, in_place=False)
        assert_same(outputs(model), truth)


def test_every_expert_is_resident_where_the_budget_holds_all(attached):
    model, residency = attached()
    size = residency.counters.slot_bytes
    for budget, kind in [(ALL * size, ResidentSwitchGLU), (ALL * size - 1, StreamedSwitchGLU)]:
        model, residency = attached(expert_memory_bytes=budget)
        assert residency.all_resident == (kind is ResidentSwitchGLU)
        assert isinstance(model.model.layers[1].mlp.switch_mlp, kind)
        assert residency.counters.slots * residency.counters.slot_bytes <= budget


def test_layers_of_other_shapes_share_the_budget(tmp_path):
    forms = {1: "affine4", 2: "mxfp4", 3: "affine4", 4: "bf16"}
    model = tiny_model(tmp_path, form=forms)
    attach(model, tmp_path).close()
    wanted = outputs(model)
    residency = attach(model, tmp_path, expert_memory_bytes=150_000)
    assert sorted(list(pool.files) for pool in residency.pools) == [[1, 3], [2], [4]]
    assert sum(pool.slots * pool.banks.slot_bytes for pool in residency.pools) <= 150_000
    assert_same(outputs(model), wanted)
    residency.resize(expert_memory_bytes=80_000)
    assert_same(outputs(model), wanted)
    residency.close()


def test_too_few_slots_give_one_warning_with_the_memory_that_helps(directory):
    model = tiny_model(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        residency = attach(model, directory, slots=DEMAND - 1)
        outputs(model)
    (warning,) = [w for w in caught if w.category is ResidencyWarning]
    assert f"holds {DEMAND - 1} experts; one token needs {DEMAND}" in str(warning.message)
    assert "--expert-memory" in str(warning.message)
    residency.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(tiny_model(directory), directory, slots=DEMAND).close()


def test_resize_between_tokens_changes_no_output(attached, truth):
    model, residency = attached(slots=ALL // 2)
    found = []
    for x, slots in zip(inputs(), [ALL // 2, 5, 1, 30, 3, 40, ALL, 2]):
        residency.resize(slots=slots)
        assert residency.counters.slots == slots
        found.append(model(x))
        mx.eval(found[-1])
    assert_same(found, truth)


def test_a_resize_requested_by_another_thread_is_done_before_the_next_token(attached, truth):
    model, residency = attached(slots=ALL // 2)
    size = residency.counters.slot_bytes
    found = []
    for step, x in enumerate(inputs()):
        asking = threading.Thread(target=residency.request_resize, args=((3 + 5 * (step % 2)) * size,))
        asking.start()
        asking.join()
        found.append(model(x))
        mx.eval(found[-1])
        assert residency.counters.slots == 3 + 5 * (step % 2)
    assert_same(found, truth)


def test_a_model_that_is_all_resident_cannot_be_resized(attached):
    _, residency = attached()
    for resize in (residency.resize, residency.request_resize):
        with pytest.raises(MimoError, match="all experts are resident"):
            resize(300)


def test_a_resize_below_one_tokens_demand_warns_once(attached):
    _, residency = attached(slots=DEMAND)
    with pytest.warns(ResidencyWarning, match=f"one token needs {DEMAND}"):
        residency.resize(slots=DEMAND - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        residency.resize(slots=DEMAND - 2)
        residency.resize(slots=DEMAND)


def test_a_resize_that_finds_no_memory_warns_and_the_token_is_right(attached, truth, monkeypatch):
    model, residency = attached(slots=DEMAND)
    size = residency.counters.slot_bytes

    def out_of_memory(tensor, slots):
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr(residency.pools[0].banks, "_allocate", out_of_memory)
    residency.request_resize(2 * DEMAND * size)
    with pytest.warns(ResidencyWarning, match="experts keep .* Unable to allocate"):
        found = outputs(model)
    assert residency.counters.slots == DEMAND
    assert_same(found, truth)


def test_saving_a_profile_of_an_all_resident_model_warns(attached, tmp_path):
    _, residency = attached()
    with pytest.warns(ResidencyWarning, match="every expert is resident"):
        residency.save_profile(tmp_path / "profile.json")
    assert not (tmp_path / "profile.json").exists()


def test_a_trace_that_finds_no_room_is_an_error_and_files_are_closed(attached, tmp_path):
    model, residency = attached(slots=DEMAND)
    residency.trace_to(tmp_path / "routing.trace")
    outputs(model)
    residency._trace._file = Full()
    with pytest.raises(MimoError, match="routing.trace: trace cannot be written: No space"):
        residency.close()
    assert not residency.reader._fds


class Full:
    def close(self):
        raise OSError(28, "No space left on device")


def test_a_profile_starts_the_next_run_with_its_experts(attached, truth, tmp_path):
    model, first = attached(slots=DEMAND)
    outputs(model)
    first.save_profile(tmp_path / "profile.json")
    used = np.sort(first.pools[0].residents.uses)[::-1]

    model, second = attached(slots=DEMAND)
    seen = []
    assert second.load_profile(tmp_path / "profile.json", lambda done, wanted: seen.append((done, wanted))) == DEMAND
    assert seen[-1] == (DEMAND, DEMAND)
    table = second.pools[0].residents
    assert sorted(table.uses[table.key_of].tolist(), reverse=True) == used[:DEMAND].tolist()
    assert (second.counters.hits, second.counters.misses, second.counters.preloaded) == (0, 0, DEMAND)
    assert_same(outputs(model), truth)
    second.save_profile(tmp_path / "profile.json")
    grown = json.loads((tmp_path / "profile.json").read_text())
    assert grown["tokens"] == pytest.approx(2 * sum(LENGTHS))


def test_preloading_can_be_interrupted(attached, truth, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_mimo.experts.pool.PRELOAD_EXPERTS", 4)
    model, first = attached(slots=DEMAND)
    outputs(model)
    first.save_profile(tmp_path / "p")

    def interrupt(done, wanted):
        if done == 8:
            raise KeyboardInterrupt

    model, second = attached(slots=DEMAND)
    assert second.load_profile(tmp_path / "p", interrupt) == 8
    assert second.pools[0].residents.resident == 8
    assert_same(outputs(model), truth)


def test_a_profile_that_cannot_be_used_warns(attached, truth, tmp_path):
    model, residency = attached(slots=DEMAND)
    (tmp_path / "p").write_text('{"format": "mlx-mimo expert profile", "version": 1, "model": "another"}')
    for name in ("p", "nowhere"):
        with pytest.warns(ResidencyWarning, match=f"^{name}: .*starting without it"):
            assert residency.load_profile(tmp_path / name) == 0
    assert_same(outputs(model), truth)


@pytest.mark.parametrize("slots", [None, DEMAND])
def test_a_trace_holds_every_call(attached, tmp_path, slots):
    model, residency = attached(slots=slots)
    model(inputs()[0])
    residency.trace_to(tmp_path / "t")
    outputs(model)
    residency.close()
    trace = read_trace(tmp_path / "t")
    assert (trace.layers, trace.num_experts, trace.top_k) == ((1, 2, 3), EXPERTS, TOP_K)
    assert [call.layer for call in trace.calls] == [1, 2, 3] * len(LENGTHS)
    assert [call.chosen.shape[0] for call in trace.calls[::3]] == LENGTHS
    assert trace.slot_bytes == residency.counters.slot_bytes


def test_a_read_error_reaches_the_caller_and_the_next_token_is_right(attached, truth, monkeypatch):
    model, residency = attached(slots=DEMAND)
    real, calls = residency.reader._preadv, []

    def failing(fd, views, offset):
        calls.append(offset)
        if len(calls) % 7 == 0 and len(calls) < 150:
            raise OSError(5, "Input/output error")
        return real(fd, views, offset)

    residency.reader._preadv = failing
    failures = []
    found = []
    for x in inputs():
        while True:
            try:
                found.append(model(x))
                mx.eval(found[-1])
                break
            except MimoError as error:
                failures.append(str(error))
    assert len(failures) > 3
    assert all("Input/output error" in failure for failure in failures)
    assert_same(found, truth)


def test_expert_files_of_another_model_are_rejected(directory, tmp_path):
    model = tiny_model(directory)
    with pytest.raises(FormatError, match=r"no expert file for layers \[1, 2, 3\]"):
        attach(model, tmp_path)
    for layer in (1, 2, 3, 4):
        write_expert_file(tmp_path, layer, random_experts(seed=layer))
    with pytest.raises(FormatError, match=r"expert files for layers \[4\]"):
        attach(model, tmp_path)
    (tmp_path / "model-experts-4.safetensors").unlink()
    write_expert_file(tmp_path, 2, random_experts(experts=EXPERTS - 1))
    with pytest.raises(FormatError, match=r"model-experts-2.safetensors: 15 experts, the router chooses of 16"):
        attach(model, tmp_path)
    for layer in (1, 2, 3):
        write_expert_file(tmp_path, layer, random_experts(hidden=32))
    with pytest.raises(FormatError, match="does not fit"):
        attach(model, tmp_path)
    outputs(model)  # the model is as it was
