"""Streamed and resident experts equal mlx-lm's own layer bit for bit, whatever is resident."""

import mlx.core as mx
import numpy as np
import pytest
from support.tiny_experts import EXPERTS, HIDDEN, TOP_K, random_experts, reference_glu, write_expert_file

from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.experts.compute import MLXCompute
from mlx_mimo.experts.layer import ResidentSwitchGLU, StreamedSwitchGLU
from mlx_mimo.experts.pool import Pool
from mlx_mimo.experts.reader import ExpertReader

FORMS = ["affine4", "affine3", "mxfp4", "bf16", "f16", "f32"]
SHAPES = [(1, 1), (4, 1), (1, 5), (2, 9), (1, 1), (1, 30)]  # decode, batch, few tokens, prefill


def tokens(shape, seed=0):
    """Activations (B, L, hidden) and chosen experts (B, L, K), distinct for each token."""
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((*shape, HIDDEN)), dtype=mx.float32)
    chosen = np.argsort(rng.random((*shape, EXPERTS)), axis=-1)[..., :TOP_K]
    return x, mx.array(chosen.astype(np.uint32))


class Files:
    def __init__(self, directory, form, layers=(1,)):
        self.truth = {layer: random_experts(form, seed=layer) for layer in layers}
        for layer, tensors in self.truth.items():
            write_expert_file(directory, layer, tensors)
        self.files = expert_files(directory)
        self.reader = ExpertReader(self.files, threads=3)
        self.compute = MLXCompute(self.files[layers[0]].layout, HIDDEN)

    def streamed(self, slots, layer=1, pool=None, **options):
        hits_first = options.pop("hits_first", False)
        pool = pool or Pool(self.files, slots, self.reader, widen=self.compute.widen, **options)
        return StreamedSwitchGLU(layer, pool, self.compute, hits_first)


RESIDENCIES = [1, TOP_K // 2, TOP_K, EXPERTS // 2, EXPERTS]


@pytest.mark.parametrize(
    ("form", "slots"),
    [
        pytest.param(form, slots, marks=[] if form == "affine4" or slots == TOP_K else [pytest.mark.long])
        for form in FORMS
        for slots in RESIDENCIES
    ],
)
def test_streamed_equals_mlx_lms_layer(tmp_path, form, slots):
    files = Files(tmp_path, form)
    reference = reference_glu(files.truth[1])
    for policy in ("lfu", "lru"):
        layer = files.streamed(slots, policy=policy)
        for seed, shape in enumerate(SHAPES):
            x, chosen = tokens(shape, seed)
            assert mx.array_equal(layer(x, chosen), reference(x, chosen)), (policy, shape)


@pytest.mark.parametrize("form", FORMS)
def test_resident_equals_mlx_lms_layer(tmp_path, form):
    files = Files(tmp_path, form)
    reference = reference_glu(files.truth[1])
    layer = ResidentSwitchGLU(files.files[1], files.reader, files.compute)
    files.reader.close()  # everything is in memory
    for shape in SHAPES:
        x, chosen = tokens(shape)
        assert mx.array_equal(layer(x, chosen), reference(x, chosen)), shape


class HostCompute(MLXCompute):
    """Needs slots on the host, as the CPU kernels do."""

    takes_lazy = False

    def __call__(self, x, slots, banks, grouped=False):
        assert isinstance(slots, np.ndarray)
        return super().__call__(x, slots, banks, grouped)


def test_the_resident_layer_passes_slots_on_the_host_where_they_are_needed(tmp_path):
    files = Files(tmp_path, "affine4")
    reference = reference_glu(files.truth[1])
    layer = ResidentSwitchGLU(files.files[1], files.reader, HostCompute(files.files[1].layout, HIDDEN))
    for shape in SHAPES:
        x, chosen = tokens(shape)
        assert mx.array_equal(layer(x, chosen), reference(x, chosen)), shape


def test_the_resident_layer_evaluates_no_index(tmp_path):
    """It can be compiled: inside a compiled function nothing can be evaluated."""
    files = Files(tmp_path, "affine4")
    layer = ResidentSwitchGLU(files.files[1], files.reader, files.compute)
    x, chosen = tokens((1, 1))

    @mx.compile
    def call(x, chosen):
        return layer(x, chosen)

    assert mx.allclose(call(x, chosen), layer(x, chosen), atol=1e-6)


@pytest.mark.parametrize("slots", [TOP_K - 1, TOP_K + 1, EXPERTS])
def test_computing_hits_first_changes_no_bit(tmp_path, slots):
    files = Files(tmp_path, "affine4")
    reference = reference_glu(files.truth[1])
    for hits_first in (True, None):
        layer = files.streamed(slots, hits_first=hits_first)
        for seed in range(12):
            files.reader.waiting = seed / 12
            x, chosen = tokens((1, 1 + seed % 3), seed)
            assert mx.array_equal(layer(x, chosen), reference(x, chosen))


@pytest.mark.parametrize(
    ("hits_first", "waiting", "pieces"), [(None, 0.9, 2), (None, 0.1, 1), (True, 0.1, 2), (False, 1, 1)]
)
def test_hits_are_computed_first_while_reads_wait_for_the_disk(tmp_path, hits_first, waiting, pieces):
    files, calls = Files(tmp_path, "affine4"), []
    layer = files.streamed(EXPERTS // 2, hits_first=hits_first)
    layer.compute = lambda x, slots, banks, grouped=False: (
        calls.append(slots.size) or files.compute(x, slots, banks, grouped)
    )
    layer.compute.takes_lazy = True
    chosen = np.arange(TOP_K, dtype=np.uint32)[None, None]
    layer(tokens((1, 1))[0], mx.array(chosen))
    files.reader.waiting = waiting
    calls.clear()
    layer(tokens((1, 1))[0], mx.array(chosen + TOP_K - 1))
    assert calls == ([1, TOP_K - 1] if pieces == 2 else [TOP_K])


def test_lazy_outputs_are_right_in_any_order_of_evaluation(tmp_path):
    files = Files(tmp_path, "affine4", layers=(1, 2))
    references = {layer: reference_glu(files.truth[layer]) for layer in (1, 2)}
    first = files.streamed(5)
    second = files.streamed(5, layer=2, pool=first.pool)
    results = []
    for seed in range(20):
        for number, layer in ((1, first), (2, second)):
            x, chosen = tokens((1, 2), seed)
            results.append((layer(x, chosen), references[number](x, chosen)))
    for found, wanted in reversed(results):
        assert mx.array_equal(found, wanted)


@pytest.mark.parametrize("slots", [2, 5, 9])
def test_prefill_reads_an_expert_at_most_once_a_call(tmp_path, slots):
    files = Files(tmp_path, "affine4")
    layer = files.streamed(slots)
    for seed in range(4):
        before = files.reader.bytes_read
        x, chosen = tokens((1, 100), seed)
        used = np.unique(np.array(chosen))
        present = np.count_nonzero(layer.pool.slots_of(1, used) >= 0)
        mx.eval(layer(x, chosen))
        assert files.reader.bytes_read - before == (used.size - present) * files.files[1].layout.nbytes


def test_prefill_computes_each_pair_once(tmp_path):
    files = Files(tmp_path, "affine4")

    class Counting(MLXCompute):
        pairs = 0

        def __call__(self, x, slots, banks, grouped=False):
            Counting.pairs += slots.size
            return super().__call__(x, slots, banks, grouped)

    pool = Pool(files.files, 3, files.reader, widen=True)
    layer = StreamedSwitchGLU(1, pool, Counting(files.files[1].layout, HIDDEN))
    x, chosen = tokens((2, 40))
    layer(x, chosen)
    assert Counting.pairs == chosen.size


def test_the_trace_has_each_call_in_the_routers_order(tmp_path):
    files = Files(tmp_path, "affine4")
    layer, seen = files.streamed(6), []
    layer.trace = lambda number, chosen: seen.append((number, chosen.copy()))
    x, chosen = tokens((2, 3))
    layer(x, chosen)
    ((number, traced),) = seen
    assert number == 1
    np.testing.assert_array_equal(traced, np.array(chosen).reshape(6, TOP_K))


def test_a_call_without_tokens_returns_an_empty_array(tmp_path):
    files = Files(tmp_path, "affine4")
    assert files.streamed(4)(mx.zeros((1, 0, HIDDEN)), mx.zeros((1, 0, TOP_K), dtype=mx.uint32)).shape == (
        1,
        0,
        TOP_K,
        HIDDEN,
    )


def test_streamed_layers_have_no_parameters(tmp_path):
    """Loading weights and saving adapters must not see the banks."""
    files = Files(tmp_path, "affine4")
    assert files.streamed(4).parameters() == {}
    assert ResidentSwitchGLU(files.files[1], files.reader, files.compute).parameters() == {}
