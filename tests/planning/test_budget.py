"""The budget: bytes of the released model by arithmetic, and of converted directories by their headers."""

from dataclasses import replace

import pytest
from mlx.utils import tree_flatten
from support.converted import converted_directory, fp8_directory

from mlx_mimo import load
from mlx_mimo.checkpoint.directory import read_config
from mlx_mimo.checkpoint.recipe import named
from mlx_mimo.config import released
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import MimoError, UsageError
from mlx_mimo.planning.backend import kernels_available
from mlx_mimo.planning.budget import Budget, ItemBytes, auto_expert_bytes, estimate, fit, item_bytes, kv_bytes, measure
from mlx_mimo.runtime.load import on_cpu
from mlx_mimo.units import GB, format_size, parse_size, parse_speed

FULL = ModelArgs.from_dict(released.CONFIG)


def full(recipe: str, context: int = 32768) -> Budget:
    return estimate(released.CONFIG, named(recipe), FULL, context, 2048, 2, 2)


@pytest.mark.parametrize(
    ("recipe", "megabytes_an_expert", "gigabytes"),
    [
        ("2bit", 7.86, 94.6),
        ("3bit", 11.01, 132.5),
        ("4bit", 14.16, 170.3),
        ("mxfp4", 13.37, 160.9),
        ("8bit", 26.74, 322),
    ],
)
def test_the_released_models_experts_at_each_recipe(recipe, megabytes_an_expert, gigabytes):
    budget = full(recipe)
    assert budget.num_experts == 47 * 256
    assert budget.slot_bytes / 1e6 == pytest.approx(megabytes_an_expert, abs=0.006)
    assert budget.experts / 1e9 == pytest.approx(gigabytes, abs=0.5)
    assert budget.slot_bytes % 16384 == 0
    assert budget.trunk / 1e9 == pytest.approx(6.45, abs=0.06)


def test_kv_caches_of_the_released_model():
    assert kv_bytes(FULL, 32768, 2) - kv_bytes(FULL, 32767, 2) == 23040
    assert kv_bytes(FULL, 32768, 2) / 1e9 == pytest.approx(
        0.755 + 0.077, abs=0.005
    )  # global layers, and windows with their slack
    assert kv_bytes(FULL, 262144, 2) / 1e9 == pytest.approx(6.12, abs=0.02)


@pytest.mark.parametrize("recipe", ["4bit", "mxfp4", "mixed-3-4", "bf16"])
@pytest.mark.parametrize("item", [ItemBytes(2, 2, 2), ItemBytes(4, 4, 4), ItemBytes(4, 2, 2), ItemBytes(4, 4, 2)])
def test_the_estimate_from_config_equals_the_measure_of_what_convert_writes(recipe, item):
    """To the byte, so that `plan` before a download and `auto` after it agree."""
    config = read_config(fp8_directory())
    args = ModelArgs.from_dict(config)
    sizes = (args, 512, 64, *item)
    assert estimate(config, named(recipe), *sizes) == measure(converted_directory(recipe), *sizes)


def test_auto_leaves_room_for_everything_else():
    budget = full("4bit")
    rest = budget.trunk + budget.kv + budget.transients
    for available in (24 * GB, 48 * GB, 96 * GB, 400 * GB):
        room = auto_expert_bytes(budget, available)
        assert room + rest <= available - 4 * GB
        assert room > 0


def test_auto_refuses_what_cannot_fit():
    with pytest.raises(MimoError, match="before the first expert"):
        auto_expert_bytes(full("4bit"), 8 * GB)


def test_auto_refuses_with_what_is_needed():
    """On 16 GB: 7.5 GB with the smallest chunk and 4 GB for the system exceed the 11 GB that are free."""
    budget = full("4bit")
    with pytest.raises(
        MimoError, match=r"11\.0 GB of memory are free; 7\.5 GB are needed before the first expert, and 4"
    ):
        fit(budget, 11 * GB)
    needed = budget.with_chunk(256).non_expert_bytes + 4 * GB
    assert fit(budget, needed + 2 * budget.slot_bytes).expert_bytes == 2 * budget.slot_bytes


def test_more_memory_never_leaves_less_for_experts():
    budget = full("4bit")
    small = replace(budget, trunk=GB // 4, token_bytes=0, score_bytes=0)
    rooms = [auto_expert_bytes(small, size * GB // 4) for size in range(12, 200)]
    assert rooms == sorted(rooms)
    assert rooms[0] > 0


# The prefill chunk


@pytest.mark.parametrize(
    ("available", "chunk"), [(12, 256), (12.5, 512), (13, 1024), (24, 2048), (64, 2048), (96, 4096), (240, 2048)]
)
def test_the_chunk_grows_with_free_memory(available, chunk):
    """It is small where activations would take more than they leave to experts, large where experts stream anyway and
    it takes at most a twentieth of their room, and usual where everything is resident."""
    found = fit(full("4bit"), int(available * GB))
    assert found.chunk == chunk
    assert found.expert_bytes + found.budget.non_expert_bytes <= (available - 4) * GB
    assert (found.expert_bytes == found.budget.experts) == (available == 240)


def test_the_usual_chunk_is_kept_where_few_experts_are_absent():
    """At 2 bits 96 GB hold 90 % of the experts; a larger chunk would leave room for fewer."""
    found = fit(full("2bit"), 106 * GB)
    assert (found.chunk, found.expert_bytes > 0.85 * found.budget.experts) == (2048, True)
    assert found.expert_bytes < found.budget.experts


@pytest.mark.parametrize("available", [14, 96])
def test_a_fixed_chunk_is_kept(available):
    """mlx-lm's commands compute 2048 tokens at a time, so room is left for that."""
    found = fit(full("4bit"), available * GB, fixed=True)
    assert found.chunk == 2048
    assert found.expert_bytes == auto_expert_bytes(full("4bit"), available * GB)
    with pytest.raises(MimoError, match=r"8\.9 GB are needed before the first expert"):
        fit(full("4bit"), 12 * GB, fixed=True)


def test_a_cpu_never_gets_the_large_chunk():
    assert fit(full("4bit"), 96 * GB, large=False).chunk == 2048


def test_a_size_for_experts_is_granted_at_the_chunks_expense():
    budget = full("4bit")
    beside = budget.trunk + budget.kv
    for left, chunk in ((2 * GB, 2048), (GB, 1024), (0, 256)):
        found = fit(budget, beside + 20 * GB + left, 20 * GB)
        assert (found.expert_bytes, found.chunk) == (20 * GB, chunk)
    assert fit(budget, 400 * GB, 10**15).expert_bytes == budget.experts
    assert fit(budget, 400 * GB, "all").expert_bytes == budget.experts
    assert fit(budget, 100 * GB, 80 * GB).chunk == 4096
    assert fit(budget, 92 * GB, 80 * GB).chunk == 2048  # the larger one's 3.2 GB would leave the system nothing


def test_a_model_of_a_short_context_keeps_the_usual_chunk():
    assert fit(full("4bit", context=2048), 96 * GB).chunk == 2048


# On a CPU


def item(kernels: bool, trunk_kernels: bool = True) -> ItemBytes:
    return item_bytes(cpu=True, kernels=kernels, trunk_kernels=trunk_kernels)


@pytest.mark.parametrize("recipe", ["4bit", "2bit", "mxfp4", "bf16"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.filterwarnings("ignore::mlx_mimo.experts.residency.ResidencyWarning")
def test_budgeted_slot_and_trunk_bytes_are_those_that_load_allocates(recipe, kernels, monkeypatch):
    """The kernels read scales and matrices in 16 bits; MLX's own operations need them in float32."""
    if not kernels:
        monkeypatch.setenv("MLX_MIMO_CPU_KERNELS", "0")
    elif not kernels_available():
        pytest.skip("no numba")
    directory = converted_directory(recipe)
    args = ModelArgs.from_dict(read_config(directory))
    budget = measure(directory, args, 512, 64, *item_bytes(on_cpu()))
    model, _ = load(directory, expert_memory=3 * budget.slot_bytes)
    held = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    counters = model.residency.counters
    assert counters.slot_bytes == budget.slot_bytes
    assert counters.slots == 3
    assert held == pytest.approx(budget.trunk, rel=0.01)
    model.residency.close()


def test_without_kernels_a_cpu_holds_fewer_experts():
    experts = {
        kernels: estimate(released.CONFIG, named("4bit"), FULL, 1, 1, *item(kernels)).slot_bytes
        for kernels in (True, False)
    }
    assert experts[True] == full("4bit").slot_bytes
    assert experts[False] / experts[True] == pytest.approx(1.11, abs=0.01)


def test_with_an_adapter_the_trunk_does_not_use_the_kernels():
    trunk = [
        estimate(released.CONFIG, named("bf16"), FULL, 1, 1, *item(True, trunk_kernels)).trunk
        for trunk_kernels in (True, False)
    ]
    assert trunk[1] / trunk[0] == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * GB), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("17", 17), (5, 5)]
)
def test_a_size_is_parsed_with_its_unit(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "12 parsecs", "0", 0, "1e9", "nan", "0.5", "0.0001kB"])
def test_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(UsageError, match="expected"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GB/s", 6e9), ("800 MB/s", 8e8), ("6GBps", 6e9), ("1.5GiB", 1.5 * 2**30), ("0.5GB/s", 5e8), ("6 gb/s", 6e9)],
)
def test_a_speed_is_parsed_with_its_unit(text, expected):
    assert parse_speed(text) == expected


@pytest.mark.parametrize("text", ["fast", "", "0.5", "6", "6000000000", "5B/s", "0GB/s", "-1GB/s"])
def test_text_that_is_not_a_speed_is_refused(text):
    with pytest.raises(UsageError, match="6GB/s"):
        parse_speed(text)


@pytest.mark.parametrize("text", ["10Gbps", "10gbps", "10Gb/s", "800 Mb/s", "10Gbit/s", "10 Gbits/s", "8Gib/s"])
def test_sizes_in_bits_are_refused_with_a_hint(text):
    with pytest.raises(UsageError, match="bits"):
        parse_speed(text)


def test_sizes_are_shown_as_the_flag_takes_them():
    assert [format_size(n) for n in (999, 14_155_776, 24 * GB, 2 * 10**12)] == [
        "999 bytes",
        "14.2 MB",
        "24.0 GB",
        "2.0 TB",
    ]
