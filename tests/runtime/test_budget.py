"""Bytes: what the released model takes, by arithmetic and by the headers of what was really written."""

import pytest
from converted import converted_directory, fp8_directory

from mlx_mimo.convert.recipe import named
from mlx_mimo.errors import MimoError, UsageError
from mlx_mimo.models.config import ModelArgs
from mlx_mimo.runtime import released
from mlx_mimo.runtime.budget import (
    GB,
    Budget,
    auto_expert_bytes,
    estimate,
    format_size,
    kv_bytes,
    measure,
    parse_size,
    parse_speed,
)
from mlx_mimo.runtime.source import read_config

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
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_what_is_estimated_from_config_is_what_convert_writes(recipe, item_bytes):
    """To the byte: `plan` before the download and `auto` after it have one opinion."""
    config = read_config(fp8_directory())
    args = ModelArgs.from_dict(config)
    sizes = (args, 512, 64, item_bytes, item_bytes)
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


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * GB), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("17", 17), (5, 5)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "12 parsecs", "0", 0, "1e9", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="expected"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("6GB/s", 6e9), ("800 MB/s", 8e8), ("6GBps", 6e9), ("1.5GiB", 1.5 * 2**30)]
)
def test_speeds(text, expected):
    assert parse_speed(text) == expected


def test_what_is_no_speed():
    with pytest.raises(UsageError, match="6GB/s"):
        parse_speed("fast")


def test_sizes_are_shown_as_the_flag_takes_them():
    assert [format_size(n) for n in (999, 14_155_776, 24 * GB, 2 * 10**12)] == [
        "999 bytes",
        "14.2 MB",
        "24.0 GB",
        "2.0 TB",
    ]
