"""The forecast, with every figure worked out by hand on a model and a machine of round numbers."""

from dataclasses import replace

import pytest
from support.checkpoints import tiny_config

from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import MimoError
from mlx_mimo.planning.budget import Budget
from mlx_mimo.planning.forecast import (
    BANDWIDTH_USED,
    CPU_BANDWIDTH_USED,
    HIT_RATES,
    Range,
    bandwidth_used,
    fit_on,
    forecast,
    hit_rate,
)
from mlx_mimo.planning.machine import Machine
from mlx_mimo.units import GB

# 3 MoE layers of 8 experts, 2 of them for a token: 24 experts, 6 for a token.
ARGS = ModelArgs.from_dict(tiny_config())
BUDGET = Budget(
    trunk=1_000_000,
    experts=2_400_000,  # 24 slots of 100,000
    kv=100_000,
    context=1000,
    chunk=4,
    token_bytes=1000,
    score_bytes=0,
    logits_bytes=6000,
    num_experts=24,
    embedding=200_000,
    record_bytes=50_000,  # half of a slot
)
MACHINE = Machine("m", "metal", 64 * GB, 48 * GB, disk=1e9, disk_from="given", bandwidth=1e10, bandwidth_from="given")
HALF = Range(0.25, 0.5, 0.75)


@pytest.fixture(autouse=True)
def the_model_is_as_the_figures_assume():
    assert (len(ARGS.moe_layers), ARGS.n_routed_experts, ARGS.num_experts_per_tok) == (3, 8, 2)


def test_a_tokens_bytes_are_counted():
    found = forecast(ARGS, BUDGET, MACHINE, 1_200_000, 4, HALF)
    assert (found.slots, found.share, found.expert_bytes) == (12, 0.5, 1_200_000)
    # trunk − embedding + 6 slots + KV
    assert found.memory_bytes_per_token == 800_000 + 600_000 + 100_000
    # 6 records of 50,000, of which 1/4, 1/2 or 3/4 are missed; low is the fewest
    assert found.disk_bytes_per_token == Range(75_000, 150_000, 225_000)
    # trunk + KV + transients (4 tokens of 1000, and logits) + slots
    assert found.total_bytes == 1_000_000 + 100_000 + 10_000 + 1_200_000
    assert not found.all_resident


def test_a_tokens_time_is_memory_router_and_disk():
    speed = forecast(ARGS, BUDGET, MACHINE, 1_200_000, 4, HALF).decode_tps
    # 1.5 MB at 60 % of 10 GB/s, 3 waits of 150 µs, 150 kB at 85 % of 1 GB/s
    assert 1 / speed.expected == pytest.approx(250e-6 + 450e-6 + 176.47e-6, rel=1e-4)
    # 45 %, 300 µs, 225 kB at 70 %
    assert 1 / speed.low == pytest.approx(333.33e-6 + 900e-6 + 321.43e-6, rel=1e-4)
    # 75 %, 70 µs, 75 kB at 100 %
    assert 1 / speed.high == pytest.approx(200e-6 + 210e-6 + 75e-6, rel=1e-4)


def test_resident_experts_do_not_wait_for_the_router_on_a_gpu():
    resident = Range(1.0, 1.0, 1.0)
    gpu = forecast(ARGS, BUDGET, MACHINE, 2_400_000, 4, resident)
    assert gpu.all_resident
    assert gpu.disk_bytes_per_token == Range(0, 0, 0)
    assert 1 / gpu.decode_tps.expected == pytest.approx(250e-6)
    cpu = forecast(ARGS, BUDGET, replace(MACHINE, backend="cpu"), 2_400_000, 4, resident)
    assert 1 / cpu.decode_tps.expected == pytest.approx(1.5e6 / 0.8e10 + 450e-6)  # at 80 %, with 3 waits


def test_a_chunk_takes_the_time_of_its_reading_where_that_is_longer():
    """A token touches 2 of 8 experts, 4 tokens 1 − (3/4)⁴ = 68.4 % of them; half are resident."""
    slow = replace(MACHINE, disk=1e6)
    speed = forecast(ARGS, BUDGET, slow, 1_200_000, 4, HALF).prefill_tps
    read = (1 - 0.75**4 - 0.5) * 24 * 50_000
    assert speed.expected == pytest.approx(4 / (read / 0.85e6))
    assert (speed.low, speed.high) == pytest.approx((4 / (read / 0.70e6), 4 / (read / 1e6)))


def test_a_chunk_takes_the_time_of_its_arithmetic_where_that_is_longer():
    weights = 0
    for layer in range(4):
        heads, kv_heads, (keys, values) = ARGS.heads(layer), ARGS.kv_heads(layer), ARGS.head_dims(layer)
        weights += ARGS.hidden_size * (heads + kv_heads) * (keys + values)  # q and o, k and v
    weights += 3 * ARGS.hidden_size * ARGS.intermediate_size  # the dense layer
    weights += 3 * 2 * 3 * ARGS.hidden_size * ARGS.moe_intermediate_size  # 3 layers, 2 experts, 3 matrices
    speed = forecast(ARGS, BUDGET, MACHINE, 2_400_000, 4, HALF).prefill_tps
    # two operations a weight and token; 10, 17 and 25 operations a second for each byte a second of bandwidth
    assert speed.expected == pytest.approx(1e10 * 17 / (2 * weights))
    assert (speed.low, speed.high) == pytest.approx((1e10 * 10 / (2 * weights), 1e10 * 25 / (2 * weights)))


def test_memory_for_less_than_one_expert_is_refused():
    assert forecast(ARGS, BUDGET, MACHINE, 100_000, 4, HALF).slots == 1
    with pytest.raises(MimoError, match="99,999 bytes holds no expert of 100,000 bytes"):
        forecast(ARGS, BUDGET, MACHINE, 99_999, 4, HALF)


def test_more_memory_than_experts_makes_no_more_slots():
    assert forecast(ARGS, BUDGET, MACHINE, 10**9, 4, HALF).slots == 24


@pytest.mark.parametrize(
    ("share", "low", "expected", "high"),
    [
        (0.0, 0.0, 0.0, 0.0),
        (0.125, 0.64, 0.675, 0.71),
        (0.1875, 0.72, 0.755, 0.79),  # half way from 0.125 to 0.25
        (0.625, 0.915, 0.9475, 0.9675),  # half way from 0.5 to 0.75
        (1.0, 1.0, 1.0, 1.0),
    ],
)
def test_the_hit_rate_is_interpolated_between_the_rows_of_the_table(share, low, expected, high):
    found = hit_rate(share)
    assert (found.low, found.expected, found.high) == pytest.approx((low, expected, high))


def test_the_table_of_hit_rates_never_falls():
    for column in range(4):
        values = [row[column] for row in HIT_RATES]
        assert values == sorted(values)
    assert all(low <= expected <= high for _, low, expected, high in HIT_RATES)


def test_without_a_trace_the_table_gives_the_hit_rate():
    assert forecast(ARGS, BUDGET, MACHINE, 1_200_000, 4).hit_rate == hit_rate(0.5)


def test_a_cpu_reaches_another_share_of_its_bandwidth_than_a_gpu():
    assert bandwidth_used(MACHINE) == bandwidth_used(replace(MACHINE, backend="cuda")) == BANDWIDTH_USED
    assert bandwidth_used(replace(MACHINE, backend="cpu")) == CPU_BANDWIDTH_USED


# Whether it fits at all: the smallest chunk of 256 tokens, 262 kB of transients, beside 1.1 MB of trunk and KV


def small(available: int) -> Machine:
    return replace(MACHINE, backend="cpu", available=available)


def test_all_experts_fit_to_the_byte():
    needed = 1_100_000 + 256 * 1000 + 6000 + 2_400_000
    assert fit_on(BUDGET, small(needed), "all").expert_bytes == 2_400_000
    with pytest.raises(MimoError, match=r"all experts take 2\.4 MB, and 1\.4 MB are needed besides"):
        fit_on(BUDGET, small(needed - 1), "all")
    with pytest.raises(MimoError, match=r"all experts \(stacked ones must all be resident\) take 2\.4 MB"):
        fit_on(BUDGET, small(needed - 1), "auto", streamed=False)


def test_a_size_fits_to_the_byte():
    needed = 1_100_000 + 256 * 1000 + 6000 + 500_000
    assert fit_on(BUDGET, small(needed), 500_000).expert_bytes == 500_000
    with pytest.raises(MimoError, match=r"--expert-memory asks for 500\.0 kB"):
        fit_on(BUDGET, small(needed - 1), 500_000)
